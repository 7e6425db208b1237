"""Files that hold a training run's state: written atomically, read with `weights_only=True`."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch

from vision_mamba import checkpoint
from vision_mamba.errors import UserError
from vision_mamba.files import leftovers, replacing

FORMAT = "vision_mamba/1"
LAST, BEST, CONFIG, LOG = "last.pth", "best.pth", "config.yaml", "log.csv"
RUN_FILES = (LAST, BEST, CONFIG, LOG)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that a reader sees the old file or the new one, never a part."""
    with replacing(path, durable=True) as temporary:
        torch.save({"format": FORMAT, **state, "versions": versions()}, temporary)


def write_text(text: str, path: Path) -> None:
    """Writes a small text file with the same guarantee as `save_checkpoint`."""
    with replacing(path, durable=True) as temporary:
        temporary.write_bytes(text.encode())


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of a writer that was killed."""
    for name in (*RUN_FILES, "curves.png", "confusion.png", "per_class.csv"):
        for path in leftovers(folder / name):
            path.unlink()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of `tools/train.py`.

    Raises:
        UserError: The file is missing, damaged, or of another format.
    """
    try:
        state = checkpoint.read_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"checkpoint not found: {path}") from None
    except ValueError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
    if state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of tools/train.py; use model.checkpoint to start from its weights")
    return state


def read_training_state(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that a run can continue from; raises UserError where it holds weights only."""
    state = read_checkpoint(path)
    if "optimizer" not in state:
        raise UserError(f"{path} holds weights only; resume from {LAST}, or set model.checkpoint to start from it")
    return state


def versions() -> dict[str, str]:
    """The versions a checkpoint records."""
    try:
        own = metadata.version("vision-mamba-zoo")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        own = "unknown"
    return {
        "vision_mamba": own,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
