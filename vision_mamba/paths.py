"""Scan paths: the orders in which a scan visits the tokens of an image.

A path is a permutation of the ``height * width`` token indices (raster order, row by row); a table
``paths`` of K paths is an int32 tensor (K, L). Tables are built once per size and device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def raster(height: int, width: int) -> Tensor:
    """Row by row, each from left to right."""
    return torch.arange(height * width, dtype=torch.int32)


def reverse(height: int, width: int) -> Tensor:
    """Raster order from the last token to the first."""
    return raster(height, width).flip(0)


def column(height: int, width: int) -> Tensor:
    """Column by column, each from top to bottom."""
    return raster(height, width).reshape(height, width).t().reshape(-1)


def column_reverse(height: int, width: int) -> Tensor:
    """Column order from the last token to the first."""
    return column(height, width).flip(0)


PATHS: dict[str, Callable[[int, int], Tensor]] = {
    "raster": raster,
    "reverse": reverse,
    "column": column,
    "column_reverse": column_reverse,
}

#: The four directions of SS2D (Liu et al. 2024, VMamba, section 4.2), in the official order.
SS2D = ("raster", "column", "reverse", "column_reverse")

_cache: dict[tuple, Tensor] = {}


def scan_paths(names: Sequence[str], height: int, width: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Table of named paths over a ``height`` x ``width`` grid of tokens.

    Args:
        names: one of :data:`PATHS` a row, for example ``("raster", "reverse")`` or :data:`SS2D`.
        height, width: tokens a column and a row.
        device: where the table lies.

    Returns:
        (K, height * width) int32. Cached: do not write into it.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in PATHS]
    if unknown:
        raise ValueError(f"unknown scan path {unknown[0]!r}; known are {', '.join(PATHS)}")
    if torch.compiler.is_compiling():
        return torch.stack([PATHS[name](height, width) for name in names]).to(device)
    key = (tuple(names), height, width, str(device))
    table = _cache.get(key)
    if table is None:
        # A table made in inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False):
            table = torch.stack([PATHS[name](height, width) for name in names]).to(device)
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
        seed: fixes the table (the same for every call with this seed, size and count).
        generator: draws from this CPU generator instead; with neither, from torch's default one.

    Raises:
        ValueError: both ``seed`` and ``generator`` given.
    """
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
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
