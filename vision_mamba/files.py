"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` and moves it there when the block ends well.

    A reader sees the old file or the whole new one; a block that fails leaves nothing behind, a killed process leaves
    the temporary file (see :func:`leftovers`).

    Args:
        path: file to write; its folder is made.
        durable: wait until the disk has it, so that it outlives a crash of the machine too.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if durable:
            _to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            _to_disk(path.parent)  # the rename itself must reach the disk
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(path: str | os.PathLike) -> Iterator[Path]:
    """Temporary files of killed writers of ``path``."""
    path = Path(path)
    return path.parent.glob(f".{path.stem}.*{path.suffix}")


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
