"""A scene cut into overlapping windows, and their scores blended, with memory that grows with its width alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def starts(length: int, window: int, overlap: int) -> list[int]:
    """First pixels of the windows over ``length`` pixels; the last one is moved back to end with the scene."""
    if length <= window:
        return [0]
    return [*range(0, length - window, window - overlap), length - window]


def blend_weights(window: int, overlap: int, kind: str) -> Tensor:
    """Weights of a window's pixels, (window, window) float32, above 0.

    ``"cosine"``: 1, falling over the overlap as a squared sine, so that two neighbours add up to 1;
    ``"gaussian"``: of standard deviation window / 8 (Isensee et al. 2021, nnU-Net).
    """
    position = torch.arange(window, dtype=torch.float64) + 0.5
    if kind == "gaussian":
        line = torch.exp(-0.5 * ((position - window / 2) / (window / 8)) ** 2).clamp_min(1e-6)
    elif kind == "cosine":
        edge = torch.minimum(position, window - position)
        line = torch.sin(math.pi / 2 * (edge / max(overlap, 1)).clamp_max(1)) ** 2 if overlap else torch.ones(window)
    else:
        raise ValueError(f"blend={kind!r}: allowed are 'cosine' and 'gaussian'")
    return torch.outer(line, line).float()


@dataclass(frozen=True)
class Grid:
    """Windows over a scene of ``height`` x ``width`` pixels, row by row."""

    height: int
    width: int
    window: int
    overlap: int

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.overlap < self.window:
            raise ValueError(f"window {self.window} and overlap {self.overlap}: 0 <= overlap < window is needed")

    @property
    def tops(self) -> list[int]:
        return starts(self.height, self.window, self.overlap)

    @property
    def lefts(self) -> list[int]:
        return starts(self.width, self.window, self.overlap)

    def rows_for(self, top: int, bottom: int) -> range:
        """Numbers of the window rows that touch the pixel rows from ``top`` to ``bottom``."""
        touching = [i for i, y in enumerate(self.tops) if y < bottom and y + self.window > top]
        return range(touching[0], touching[-1] + 1)


def blend_rows(
    grid: Grid, rows: range, scores: Iterable[Tensor], weights: Tensor, finish: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """Weighted mean of overlapping windows' scores.

    Args:
        grid: the windows.
        rows: which window rows, without a gap.
        scores: (classes, window, window) a window, row by row, on one device.
        weights: (window, window) on that device.
        finish: (classes, h, w) of blended scores -> (planes, h, w) of what is kept of them.

    Yields:
        For each window row its first pixel row, and (planes, pixel rows, width): the rows that no later window
        touches. Rows that an omitted earlier window row touches lack its part.
    """
    tops, lefts = grid.tops, grid.lefts
    scores = iter(scores)
    carry: Tensor | None = None  # what this row of windows shares with the next: scores and, last, the weights
    high, wide = min(grid.window, grid.height), min(grid.window, grid.width)
    w = weights[:high, :wide]
    for row in rows:
        top = tops[row]
        rows_done = (tops[row + 1] if row + 1 < len(tops) else grid.height) - top
        finished, below = [], []
        right: Tensor | None = None
        for i, left in enumerate(lefts):
            columns_done = (lefts[i + 1] if i + 1 < len(lefts) else grid.width) - left
            total = torch.cat([next(scores)[:, :high, :wide] * w, w[None]])
            if right is not None:
                total[..., : right.shape[-1]] += right
            total, right = total[..., :columns_done], total[..., columns_done:]
            if carry is not None:
                total[:, : carry.shape[1]] += carry[..., left : left + columns_done]
            finished.append(finish(total[:-1, :rows_done] / total[-1, :rows_done]))
            if row != rows[-1]:
                below.append(total[:, rows_done:].clone())  # a view would keep the whole window
        carry = torch.cat(below, dim=-1) if below else None
        yield top, torch.cat(finished, dim=-1)
