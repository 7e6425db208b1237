"""Memory that is used again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Room:
    """Memory for one tensor after another.

    Tens of megabytes that are taken anew for each row of windows, or for each group of window columns, leave an
    allocator with gaps that fit nothing: memory then grows with the scene after all.
    """

    def __init__(self, device: torch.device | str = "cpu", *, pinned: bool = False) -> None:
        self._device, self._pinned = device, pinned
        self._memory: Tensor | None = None

    def take(self, shape: Sequence[int], dtype: torch.dtype, widest: int = 0) -> Tensor:
        """Any values, where the tensor before was; ``widest`` is the last side of the largest that will be taken."""
        count = math.prod(shape)
        if self._memory is None or len(self._memory) < count:
            self._memory = None  # before, so that there are not both
            most = math.prod(shape[:-1]) * max(shape[-1], widest)
            self._memory = torch.empty(most, dtype=dtype, device=self._device, pin_memory=self._pinned)
        return self._memory[:count].view(shape)
