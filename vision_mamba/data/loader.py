"""Batches that depend on (seed, epoch, position) only.

The order of an epoch follows from (seed, epoch); the random numbers of one sample's augmentation from (seed, epoch,
position in that order). Nothing depends on the number of workers, on what was loaded before, or on which batch an
epoch is entered at, so a resumed run sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vision_mamba.errors import UserError


class Samples(Protocol):
    """A map-style set of (image, target)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


Key = tuple[int, int, int]  # (epoch, position in the epoch's order over all ranks, index into the dataset)


def create_loader(
    dataset: Samples,
    *,
    batch_size: int,
    train: bool,
    transform: Callable[[Any], torch.Tensor],
    seed: int = 0,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    num_workers: int = 0,
    num_aug_repeats: int = 0,
    distributed: bool = False,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool | None = None,
    pin_memory: bool = False,
    persistent_workers: bool = True,
    prefetch_factor: int | None = None,
) -> EpochLoader:
    """A loader of ``(images (B, C, H, W) float32, targets (B,) int64)``; ``images`` are what ``transform`` makes them.

    Training shuffles; ranks get shares of equal length (the order wraps round where it must). Evaluation keeps the
    dataset's order, and each rank gets exactly its own share: no sample is counted twice, shares may differ by one.

    Args:
        dataset: map-style, of ``(image, target)``.
        batch_size: samples a batch and rank.
        train: training or evaluation.
        transform: from ``build_transform``.
        finish: done to each batch of images in the process that iterates, such as ``BatchNormalise`` where the
            transform leaves 8-bit images.
        seed: with the epoch it decides everything random.
        num_workers: processes; 0 loads in the caller's.
        num_aug_repeats: repeated augmentation (2 and more): a batch cycle shows each image that many times,
            spread over the ranks, and an epoch keeps its length.
        distributed, rank, world_size: this process's share.
        drop_last: drop a short last batch; None drops it in training.
        pin_memory, persistent_workers, prefetch_factor: as in torch's DataLoader.

    Raises:
        UserError: fewer samples than one batch, where a short batch is dropped.
    """
    if not distributed:
        rank, world_size = 0, 1
    drop_last = train if drop_last is None else drop_last
    sampler = EpochSampler(
        len(dataset), batch_size, shuffle=train, seed=seed, repeats=num_aug_repeats, rank=rank, world_size=world_size
    )
    if drop_last and len(sampler) < batch_size:
        raise UserError(
            f"{len(sampler)} images a process cannot fill one batch of {batch_size}; lower batch_size to "
            f"{max(len(sampler), 1)} or give more images"
        )
    return EpochLoader(
        SeededSamples(dataset, transform, seed if train else None),
        finish=finish,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers and num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=_start_worker,
        # Without a generator of its own, DataLoader draws from the global one and so shifts the model's dropout.
        generator=torch.Generator().manual_seed(seed),
    )


class EpochLoader(DataLoader):
    """A DataLoader whose epoch, and first batch of the epoch, are set from outside.

    ``len()`` is always the number of batches of a whole epoch.
    """

    def __init__(self, *args: Any, finish: Callable[[torch.Tensor], torch.Tensor] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finish = finish

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.finish is None else ((self.finish(images), targets) for images, targets in batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration yields batches ``start_batch``, ``start_batch + 1`` ... of ``epoch``."""
        assert isinstance(self.sampler, EpochSampler)
        self.sampler.epoch = epoch
        self.sampler.start = start_batch * self.sampler.batch_size


class EpochSampler(Sampler):
    """Yields the keys of one rank's samples of one epoch."""

    def __init__(
        self, length: int, batch_size: int, *, shuffle: bool, seed: int, repeats: int, rank: int, world_size: int
    ) -> None:
        self.length, self.batch_size = length, batch_size
        self.shuffle, self.seed, self.repeats = shuffle, seed, repeats
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        if self.shuffle:
            return math.ceil(self.length / self.world_size)
        return len(range(self.rank, self.length, self.world_size))

    def __iter__(self) -> Iterator[Key]:
        if not self.shuffle:
            order = list(range(self.length))
        elif self.repeats > 1:
            order = self._repeated()
        else:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        for i in range(self.start, len(self)):
            position = self.rank + i * self.world_size
            yield self.epoch, position, order[position % self.length]

    def _repeated(self) -> list[int]:
        from timm.data.distributed_sampler import RepeatAugSampler

        # timm's sampler gives one rank's share; asked as a single process for it, it gives the whole order.
        whole = RepeatAugSampler(
            range(self.length), num_replicas=1, rank=0, num_repeats=self.repeats, selected_round=0, selected_ratio=1
        )
        whole.set_epoch(mix_seed(self.seed, self.epoch))
        return list(whole)


class SeededSamples(Dataset):
    """Transforms samples, with every random generator seeded by the sample's place; no seed: nothing is random."""

    def __init__(self, dataset: Samples, transform: Callable[[Any], torch.Tensor], seed: int | None) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        # An array is half the way from a file to albumentations, and all of it from memory.
        arrays = getattr(transform, "takes_arrays", False) and hasattr(dataset, "pixels")
        self.arrays: Any = dataset if arrays else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int]:
        epoch, position, index = key
        if self.arrays is not None:
            image, target = self.arrays.pixels(index), self.arrays.targets[index]
        else:
            image, target = self.dataset[index]
        if self.seed is None:
            return self.transform(image), target
        seed = mix_seed(self.seed, epoch, position)
        if hasattr(self.transform, "set_random_seed"):  # it has generators of its own and uses no other
            self.transform.set_random_seed(seed % 2**32)
            return self.transform(image), target
        # With no workers this is the training process: its own random state must come out untouched.
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            return self.transform(image), target
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def mix_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers, such that near inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _start_worker(worker_id: int) -> None:
    import sys

    torch.set_num_threads(1)
    if "cv2" in sys.modules:  # albumentations' threads would fight the other workers'
        sys.modules["cv2"].setNumThreads(0)
