"""A scene cut into overlapping windows, and their scores blended, in memory that does not grow with the scene."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .room import Room

_PANEL = 3072  # pixels: what is held of a scene's width at once


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

    @cached_property
    def tops(self) -> list[int]:
        return starts(self.height, self.window, self.overlap)

    @cached_property
    def lefts(self) -> list[int]:
        return starts(self.width, self.window, self.overlap)

    @property
    def panels(self) -> list[range]:
        """The window columns in groups. One group after the other is seen from the top of the scene to its bottom, so
        what is held in memory is as wide as a group."""
        columns, most = len(self.lefts), max(_PANEL // (self.window - self.overlap), 1)
        count = -(-columns // most)
        return [range(columns * i // count, columns * (i + 1) // count) for i in range(count)]

    @property
    def widest(self) -> int:
        """Pixel columns of the widest group, with those it shares with the next."""
        return max(self.lefts[columns[-1]] - self.lefts[columns[0]] for columns in self.panels) + self.window

    def pixels(self, columns: range) -> range:
        """The pixel columns that no window column after ``columns`` touches, and none before has finished."""
        lefts = [*self.lefts, self.width]
        return range(lefts[columns.start], lefts[columns.stop])

    def rows_for(self, top: int, bottom: int) -> range:
        """Numbers of the window rows that touch the pixel rows from ``top`` to ``bottom``."""
        touching = [i for i, y in enumerate(self.tops) if y < bottom and y + self.window > top]
        return range(touching[0], touching[-1] + 1)


def blend_rows(
    grid: Grid,
    rows: range,
    scores: Iterable[Tensor],
    weights: Tensor,
    *,
    columns: range | None = None,
    load_edge: Callable[[int], Tensor] | None = None,
    save_edge: Callable[[int, Tensor], None] | None = None,
    rooms: Sequence[Room] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Weighted mean of overlapping windows' scores.

    Args:
        grid: the windows.
        rows: which window rows, without a gap.
        scores: (classes, window, window) a window, row by row, on one device; times ``weights``.
        weights: (window, window) of each window's pixels, there too; see :func:`blend_weights`.
        columns: which window columns, without a gap; None for all.
        load_edge: gives for a window row what ``save_edge`` was given where the columns before ended.
        save_edge: takes for a window row what these columns share with those after them.
        rooms: two on the scores' device, for one group of columns after another.

    Yields:
        For each window row its first pixel row, and (classes, pixel rows, ``grid.pixels(columns)``): the rows that no
        later window touches, until the next are asked for. Rows that an omitted earlier window row touches lack its
        part.
    """
    tops, lefts = [*grid.tops, grid.height], grid.lefts
    columns = range(len(lefts)) if columns is None else columns
    scores = iter(scores)
    totals, carries = rooms or [Room(weights.device) for _ in range(2)]
    high, wide = min(grid.window, grid.height), min(grid.window, grid.width)
    left, done = lefts[columns[0]], len(grid.pixels(columns))
    begins = [lefts[column] - left for column in columns]
    # The sum of the weights, the same in each row; from the scene's first column on, for one order of summing.
    covered = weights.new_zeros(high, begins[-1] + wide)
    for begin in (begin - left for begin in lefts[: columns.stop] if begin + wide > left):
        covered[:, max(begin, 0) : begin + wide] += weights[:high, max(-begin, 0) : wide]
    carry: Tensor | None = None  # what this row of windows shares with the next
    most = max((top + high - below for top, below in pairwise(grid.tops)), default=0)  # rows of it
    for row in rows:
        total: Tensor | None = None  # scores times weights and, last, the weights
        for begin in begins:
            window = next(scores)[:, :high, :wide]
            if total is None:
                total = totals.take((len(window) + 1, *covered.shape), window.dtype, grid.widest).zero_()
                total[-1] = covered
                if load_edge:
                    edge = load_edge(row)
                    total[:-1, :, : edge.shape[-1]] += edge
            total[:-1, :, begin : begin + wide] += window
            del window  # it would keep its whole batch while the next is looked at
        assert total is not None
        if save_edge:
            save_edge(row, total[:-1, :, done:])
        total = total[..., :done]
        if carry is not None:
            total[:, : carry.shape[1]] += carry
        rows_done = tops[row + 1] - tops[row]
        if row != rows[-1]:
            carry = carries.take((len(total), most, done), total.dtype, grid.widest)[:, : high - rows_done]
            carry.copy_(total[:, rows_done:])
        yield tops[row], total[:-1, :rows_done].div_(total[-1, :rows_done])
