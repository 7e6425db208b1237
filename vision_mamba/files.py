"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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


@contextmanager
def only_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes that ask for the same out of a folder, which is made, until the block or the process ends.

    On systems and disks without locks nobody is kept out.

    Raises:
        UserError: another one is in there.
    """
    path = Path(folder) / ".writer"
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(path, "w") as file:
        # A lock of this process alone: a killed one's loaders, which outlive it by seconds, do not hold it.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is writing to {folder}: wait for it or stop it, or choose another folder"
            ) from None
        except OSError:
            pass  # a disk without locks
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
