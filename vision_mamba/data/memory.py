"""Decoded images kept in memory, so that a small set is decoded once and not once an epoch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vision_mamba.errors import UserError

if TYPE_CHECKING:
    from vision_mamba.data.sources import ImageSet

_BLOCK_BYTES = 64 << 20
_SAMPLES = 32
_USABLE = 0.7  # of the memory that is free: training needs some too


class PixelMemory:
    """Arrays of one type and any shapes, one after the other in blocks of memory.

    Loader processes that are forked share the blocks, as nothing writes to them; others get them as shared memory.

    Args:
        arrays: (H, W) or (H, W, C), all of one type.
    """

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        self.blocks: list[torch.Tensor] = []
        self.places: list[tuple[int, int, tuple[int, ...]]] = []  # block, first value in it, shape
        waiting: list[np.ndarray] = []
        values = 0
        for array in arrays:
            self.places.append((len(self.blocks), values, array.shape))
            waiting.append(array.reshape(-1))
            values += array.size
            if values * array.itemsize >= _BLOCK_BYTES:
                self._store(waiting)
                waiting, values = [], 0
        if waiting:
            self._store(waiting)

    def _store(self, arrays: list[np.ndarray]) -> None:
        block = torch.from_numpy(np.concatenate(arrays))
        if multiprocessing.get_start_method() != "fork":
            try:
                block.share_memory_()
            except RuntimeError as error:
                raise UserError(
                    f"data.cache: no shared memory for the images ({error}); set data.cache=false"
                ) from None
        self.blocks.append(block)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> np.ndarray:
        """A view of one array; whoever changes pixels copies them first."""
        block, start, shape = self.places[index]
        return self.blocks[block].numpy()[start : start + int(np.prod(shape))].reshape(shape)


def keep_in_memory(*sets: ImageSet, num_workers: int = 0, progress: bool = True) -> list[str]:
    """Decodes all images of the sets and keeps the pixels: uint8 of pictures, float32 of rasters.

    Args:
        sets: they hold ``memory`` afterwards, unless a line is returned.
        num_workers: threads that decode; 0 is one.
        progress: show a bar.

    Returns:
        One line for each file that cannot be used, as ``check_images`` gives them; an empty list when all is well.

    Raises:
        UserError: the decoded images would take too much of the free memory; their size is estimated from a few
            before any is kept, and counted while they are read.
    """
    from tqdm import tqdm

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each keeps a copy
    total = sum(len(images) for images in sets)
    free = free_memory()
    allowed = float("inf") if free is None else free * _USABLE / processes
    _refuse(sum(_estimate(images) for images in sets), allowed, total, "about")
    bad: list[str] = []
    used = 0
    with (
        ThreadPoolExecutor(max(num_workers, 1)) as pool,
        tqdm(total=total, desc="read images", unit="img", disable=None if progress else True) as bar,
    ):

        def decoded(images: ImageSet) -> Iterable[np.ndarray]:
            nonlocal used
            # A part at a time: all at once would hold every image twice.
            for start in range(0, len(images), 1024):
                part = range(start, min(start + 1024, len(images)))
                for pixels in pool.map(lambda i: _try_decode(images, i), part):
                    bar.update()
                    if isinstance(pixels, str):
                        bad.append(pixels)
                        continue
                    used += pixels.nbytes
                    _refuse(used, allowed, total, "more than")
                    yield pixels

        memories = [PixelMemory(decoded(images)) for images in sets]
    if not bad:
        for images, memory in zip(sets, memories, strict=True):
            images.memory = memory
    return bad


def _try_decode(images: ImageSet, index: int) -> np.ndarray | str:
    try:
        return images.pixels(index)
    except UserError as error:
        return str(error)


def _estimate(images: ImageSet) -> float:
    """Bytes of all decoded images, from some of them."""
    found = [_try_decode(images, i) for i in range(0, len(images), -(-len(images) // _SAMPLES))]
    sizes = [pixels.nbytes for pixels in found if not isinstance(pixels, str)]
    return len(images) * sum(sizes) / len(sizes) if sizes else 0.0


def _refuse(needed: float, allowed: float, images: int, how: str) -> None:
    if needed > allowed:
        raise UserError(
            f"data.cache: {images} decoded images take {how} {_megabytes(needed)}, and {_megabytes(allowed)} may be "
            f"used ({_USABLE:.0%} of what is free, shared by the processes of torchrun here); set data.cache=false"
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def free_memory() -> int | None:
    """Bytes that this process may still take, by the machine and the control group that a container sees as its root;
    None where unknown (no Linux)."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
        # Version 2, then version 1, of the interface; "max" and absurdly large numbers mean no limit.
        for folder, limit, usage, cached in (
            ("", "memory.max", "memory.current", "inactive_file"),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            group = Path("/sys/fs/cgroup") / folder
            if (group / limit).is_file() and (text := (group / limit).read_text().strip()).isdigit():
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / usage).read_text()) - int(counts.get(cached, 0))  # read files give way
                found.append(max(int(text) - used, 0))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)
