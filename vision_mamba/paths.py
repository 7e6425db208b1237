"""Scan paths: the orders in which a scan visits the tokens of an image.

A path is a permutation of the ``height * width`` token indices (raster order, row by row); a table
``paths`` of K paths is an int32 tensor (K, L). Tables are built once per size and device.

A path is known by its name, ``order[number][_modifier ...]``. The orders are the functions in :data:`PATHS`, ``local``
and ``atrous`` with their number: ``"local7"``. Modifiers apply one after the other: ``_column`` transposes a path (what
it did along rows it does along columns), ``_flip`` mirrors it left to right, ``_reverse`` walks it from its end. So
``"snake_column_reverse"`` goes up and down the columns and begins where ``"snake_column"`` ends. ``"reverse"``,
``"column"`` and ``"antidiagonal"`` stand for ``"raster_reverse"``, ``"raster_column"`` and ``"diagonal_flip"``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# An order takes the grid of token indices, (rows, columns), and returns them in its order, (rows * columns,). It only
# looks at the places in the grid, so a modifier of the grid (transposed, mirrored) modifies the path.


def raster(grid: Tensor) -> Tensor:
    """Row by row, each from left to right."""
    return grid.flatten()


def snake(grid: Tensor) -> Tensor:
    """Row by row, alternately to the right and to the left, so that every step is to a neighbour.

    The continuous scan of Yang et al. 2024, PlainMamba, arXiv 2403.17695; its four directions are this one, ``_column``
    and the reverses of both.
    """
    rows, _ = _coordinates(grid)
    return torch.where(rows % 2 == 0, grid, grid.flip(1)).flatten()


def local(grid: Tensor, side: int) -> Tensor:
    """Window by window of ``side`` x ``side`` tokens, windows and tokens inside them row by row.

    Huang et al. 2024, LocalMamba, arXiv 2403.09338, with sides 2 and 7. Windows at the right and lower edge may be
    smaller; the official code fills them with zeros, which the scan walks too.
    """
    rows, columns = _coordinates(grid)
    return _sorted(grid, rows // side * grid.shape[1] + columns // side)


def atrous(grid: Tensor, step: int) -> Tensor:
    """Every ``step``-th token of every ``step``-th row first, then the other such sub-grids, each row by row.

    After Pei et al. 2024, EfficientVMamba, arXiv 2403.09977, with step 2. There each sub-grid is a scan of its own,
    two of the four column by column; here one path visits them all.
    """
    rows, columns = _coordinates(grid)
    return _sorted(grid, rows % step * step + columns % step)


def diagonal(grid: Tensor) -> Tensor:
    """Diagonal by diagonal from the upper right corner, each from its upper left to its lower right end."""
    rows, columns = _coordinates(grid)
    return _sorted(grid, rows - columns)


def morton(grid: Tensor) -> Tensor:
    """Morton's Z order (1966): quarter by quarter, recursively.

    For any size: the order of the enclosing grid whose side is a power of two, without what lies outside.
    """
    rows, columns = _coordinates(grid)
    bits = torch.arange(16, device=grid.device)  # of coordinates below 2**16
    spread = [((x.unsqueeze(-1) >> bits & 1) << 2 * bits).sum(-1) for x in (rows, columns)]
    return _sorted(grid, 2 * spread[0] + spread[1])


def hilbert(grid: Tensor) -> Tensor:
    """Hilbert's curve (1891) along the longer side of the grid, from its first corner to the other end of that side.

    For any size, by J. Cerveny's rule (github jakubcerveny/gilbert): rectangles are halved, where there is a choice at
    even places. Every step is to a neighbour; only where the longer side is odd and the shorter even, one step is
    diagonal. A compiler takes the table of a size as a constant.
    """
    table = _hilbert_table(operator.index(grid.shape[0]), operator.index(grid.shape[1]))
    return grid.flatten()[table.to(grid.device)]


@torch.compiler.assume_constant_result
def _hilbert_table(height: int, width: int) -> Tensor:
    grid = np.arange(height * width).reshape(height, width)
    # A list: a tracer takes a tensor made of one for a constant, whatever it does with arrays.
    return torch.tensor(_hilbert(grid if width >= height else grid.T).tolist())


def _hilbert(grid: np.ndarray) -> np.ndarray:
    """The curve from the upper left to the upper right corner."""
    height, width = grid.shape
    if min(height, width) == 1:
        return grid.reshape(-1)
    if 2 * width > 3 * height:
        cut = _even_half(width)
        return np.concatenate([_hilbert(grid[:, :cut]), _hilbert(grid[:, cut:])])
    # Down the upper left quarter, along the lower half, up the upper right quarter.
    top, left = _even_half(height), width // 2
    down, up = grid[:top, :left].T, grid[:top, left:][::-1, ::-1].T
    return np.concatenate([_hilbert(down), _hilbert(grid[top:]), _hilbert(up)])


def _even_half(n: int) -> int:
    return n // 2 + (n // 2 % 2 if n > 2 else 0)


def _coordinates(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Row (rows, 1) and column (1, columns) of each place in the grid."""
    rows, columns = (torch.arange(n, device=grid.device) for n in grid.shape)
    return rows.unsqueeze(1), columns.unsqueeze(0)


def _sorted(grid: Tensor, key: Tensor) -> Tensor:
    """The grid's tokens by rising key, row by row where keys are equal."""
    return grid.flatten()[key.expand(grid.shape).flatten().argsort(stable=True)]


#: The orders by name.
PATHS: dict[str, Callable[..., Tensor]] = {
    "raster": raster,
    "snake": snake,
    "local": local,
    "atrous": atrous,
    "diagonal": diagonal,
    "morton": morton,
    "hilbert": hilbert,
}
_NUMBERED = ("local", "atrous")
_ALIASES = {
    "reverse": ("raster", "reverse"),
    "column": ("raster", "column"),
    "antidiagonal": ("diagonal", "flip"),
}
_GRID_MODIFIERS: dict[str, Callable[[Tensor], Tensor]] = {"column": Tensor.t, "flip": lambda grid: grid.flip(1)}

#: The four directions of SS2D (Liu et al. 2024, VMamba, section 4.2), in the official order.
SS2D = ("raster", "column", "reverse", "column_reverse")

#: What one name stands for where a model scans along so many paths.
_DIRECTIONS = {1: ("",), 2: ("", "_reverse"), 4: ("", "_column", "_reverse", "_column_reverse")}

_cache: dict[tuple, Tensor] = {}


def expand_paths(paths: str | Sequence[str], num_paths: int) -> tuple[str, ...]:
    """The names of a table's rows, from one name for them all or from one name a row.

    Args:
        paths: a sequence of names is taken as it is, of any length. One name stands for ``num_paths`` directions: for
            itself, for itself and its reverse (2), or for itself, its transpose and the reverses of both (4, the order
            of :data:`SS2D`).
        num_paths: 1, 2 or 4.

    Raises:
        ValueError: an unknown name, or none.
    """
    names = tuple(f"{paths}{end}" for end in _DIRECTIONS[num_paths]) if isinstance(paths, str) else tuple(paths)
    if not names:
        raise ValueError("paths is empty; give the name of a scan path, or one name a row")
    for name in names:
        _parse(name)
    return names


def _parse(name: str) -> tuple[str, int | None, list[str]]:
    """Order, its number and the modifiers of a path's name."""
    first, *modifiers = name.split("_")
    if first in _ALIASES:
        first, alias_modifier = _ALIASES[first]
        modifiers = [alias_modifier, *modifiers]
    order = first.rstrip("0123456789")
    digits = first[len(order) :]
    if order not in PATHS or not all(m == "reverse" or m in _GRID_MODIFIERS for m in modifiers):
        numbered = [f"{known}N" if known in _NUMBERED else known for known in PATHS]
        raise ValueError(
            f"unknown scan path {name!r}; known are {', '.join([*numbered, *_ALIASES])}, each also with "
            f"{', '.join(f'_{m}' for m in _GRID_MODIFIERS)} or _reverse after it; N is a number, as in local7"
        )
    if order not in _NUMBERED and digits:
        raise ValueError(f"scan path {name!r}: {order} takes no number")
    if order in _NUMBERED and (not digits or int(digits) < 1):
        raise ValueError(f"scan path {name!r}: {order} needs a number of at least 1, for example {order}2")
    return order, int(digits) if digits else None, modifiers


def _row(name: str, height: int, width: int, inserted: Sequence[int]) -> Tensor:
    order, number, modifiers = _parse(name)
    grid = torch.arange(height * width, dtype=torch.int32).reshape(height, width)
    # The grid is what the modified path sees of it: the last modifier comes first.
    for modifier in reversed(modifiers):
        if modifier != "reverse":
            grid = _GRID_MODIFIERS[modifier](grid)
    row = PATHS[order](grid) if number is None else PATHS[order](grid, number)
    for place in inserted:
        row = row + (row >= place).to(torch.int32)
        row = torch.cat([row[:place], row.new_full((1,), place), row[place:]])
    return row.flip(0) if modifiers.count("reverse") % 2 else row


def scan_paths(
    names: Sequence[str],
    height: int,
    width: int,
    *,
    inserted: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Table of named paths over a ``height`` x ``width`` grid of tokens.

    Args:
        names: a path a row, for example ``("raster", "reverse")``, ``("snake", "local7_column")`` or :data:`SS2D`.
        height, width: tokens a column and a row.
        inserted: rising places of tokens that are not of the grid (class tokens, registers) in the sequence of all L
            tokens. They have the same places in every path; a reversed path is the reverse of the whole.
        device: where the table lies.

    Returns:
        (K, L) int32 with L = ``height * width + len(inserted)``. Cached: do not write into it.

    Raises:
        ValueError: an unknown name.
    """
    if torch.compiler.is_compiling():
        return torch.stack([_row(name, height, width, inserted) for name in names]).to(device)
    key = (tuple(names), height, width, tuple(inserted), str(device))
    table = _cache.get(key)
    if table is None:
        # A table made in inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False):
            table = torch.stack([_row(name, height, width, inserted) for name in names]).to(device)
        if type(table) is Tensor:  # not the fake tensor of a tracer
            _cache[key] = table
    return table


def random_paths(
    num_paths: int,
    length: int,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Table of random permutations, (num_paths, length) int32.

    Args:
        seed: fixes the table (the same for every call with this seed, size and count, on every device).
        generator: draws from this CPU generator instead; with neither, from torch's default one of ``device``: nothing
            is copied, and a CUDA graph draws anew at every replay.

    Raises:
        ValueError: both ``seed`` and ``generator`` given.
    """
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if seed is None and generator is None:
        return torch.rand(num_paths, length, device=device).argsort(dim=1).to(torch.int32)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=generator) for _ in range(num_paths)]
    return torch.stack(rows).to(device=device, dtype=torch.int32)


def fixed_random_paths(num_paths: int, length: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Table of permutations that look random but are a function of (seed, row, length), (num_paths, length) int32.

    Row k does not depend on how many rows there are, and no generator is involved: the table is the same on every
    device and in every release of torch, and it can be compiled and exported. Cached: do not write into it.
    """
    key = ("fixed_random", num_paths, length, seed, str(device))
    table = _cache.get(key) if not torch.compiler.is_compiling() else None
    if table is None:
        with torch.inference_mode(False):
            token = torch.arange(length, device=device)
            row = torch.arange(num_paths, device=device).unsqueeze(1)
            keys = _hash(_hash(row + _hash(torch.full_like(row, seed % _PRIME))) + token)
            # Stable: two tokens with the same key keep their order, whoever sorts.
            table = keys.sort(dim=1, stable=True).indices.to(torch.int32)
        if type(table) is Tensor and not torch.compiler.is_compiling():
            _cache[key] = table
    return table


_PRIME = 2**31 - 1


def _hash(x: Tensor) -> Tensor:
    """Scatters integers 0 ... 2**32 over 0 ... 2**31; products stay below 2**63, so nothing overflows."""
    for factor in (48271, 1583458089, 784588716):  # multipliers for this modulus: L'Ecuyer 1999, table 2
        x = (x % _PRIME * factor + 12345) % _PRIME
        x = x ^ (x >> 15)
    return x


def check_paths(paths: Tensor) -> Tensor:
    """``paths`` itself if every row is a permutation.

    Raises:
        ValueError: names the first row that is not a permutation of ``range(L)``.
    """
    if paths.ndim != 2 or paths.is_floating_point():
        raise ValueError(f"paths must be integers of shape (K, L), got {paths.dtype} {tuple(paths.shape)}")
    length = paths.shape[1]
    wrong = (paths.sort(dim=1).values != torch.arange(length, device=paths.device)).any(1).nonzero()
    if len(wrong):
        raise ValueError(f"paths[{int(wrong[0])}] is not a permutation of the {length} token indices")
    return paths


def inverse_paths(paths: Tensor) -> Tensor:
    """Position of each token in each path: ``inverse[k, paths[k, t]] == t``. (K, L) int32.

    Raises:
        ValueError: a row is not a permutation.
    """
    return check_paths(paths).argsort(dim=1).to(torch.int32)
