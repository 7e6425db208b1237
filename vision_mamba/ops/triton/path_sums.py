"""Sums over paths in one pass with what else is to be done to them.

A gate that all paths share is none of the scan's business: each of its programs would read the gate, and their
backward pass find y again for the gate's gradient, which is more work than these passes. y need not be kept for that
either: it is in what was given out, so long as no gate is exactly zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import alignment, as_rows, cdiv, check_dtypes, jit_without, launch, on_device, power_of_2, sigmoid

_TILE = 1024  # numbers of a program
_LEAST_GATE = tl.constexpr(2.0**-60)
_jit = jit_without(("rows", "parts_l", "parts_k", "z_l", "dy_l", "beside_l", "length"))


@triton.jit
def _tile_at(rows, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column of a program's numbers, [ROWS, BLOCK], and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < dim)[None, :]


@triton.jit
def _gate(base, at, ok):
    """z and its sigmoid. Gates nearer to zero than the least are that: no result shows it, but y is found from it."""
    z = tl.load(base + at, mask=ok, other=0.0).to(tl.float32)
    z = tl.where(tl.abs(z) < _LEAST_GATE, _LEAST_GATE, z)
    return z, sigmoid(z)


@triton.jit
def _sum(parts, parts_k, at, ok, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in tl.static_range(K):
        here = tl.multiple_of(k * parts_k.to(tl.int64), ALIGN)
        total += tl.load(parts + here + at, mask=ok, other=0.0).to(tl.float32)
    return total


@_jit
def _path_sum_kernel(
    parts, y, rows, dim, parts_l, parts_k, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    row, column, ok = _tile_at(rows, dim, ROWS, BLOCK)
    at = row * tl.multiple_of(parts_l.to(tl.int64), ALIGN) + column
    total = _sum(parts, parts_k, at, ok, K, ROWS, BLOCK, ALIGN)
    tl.store(y + row * dim + column, total.to(y.dtype.element_ty), mask=ok)


@_jit
def _gated_sum_kernel(
    parts, z, y, rows, dim, parts_k, z_l,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row, column, ok = _tile_at(rows, dim, ROWS, BLOCK)
    at = row * dim + column
    total = _sum(parts, parts_k, at, ok, K, ROWS, BLOCK, ALIGN)
    zf, sig = _gate(z, row * tl.multiple_of(z_l.to(tl.int64), ALIGN) + column, ok)
    tl.store(y + at, (total * zf * sig).to(y.dtype.element_ty), mask=ok)


@_jit
def _gated_sum_backward_kernel(
    dy, y, z, dsum, dz, rows, dim, dy_l, z_l, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    row, column, ok = _tile_at(rows, dim, ROWS, BLOCK)
    at = row * dim + column
    zf, sig = _gate(z, row * tl.multiple_of(z_l.to(tl.int64), ALIGN) + column, ok)
    dy_at = row * tl.multiple_of(dy_l.to(tl.int64), ALIGN) + column
    df = tl.load(dy + dy_at, mask=ok, other=0.0).to(tl.float32)
    yf = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(dsum + at, (df * zf * sig).to(dsum.dtype.element_ty), mask=ok)
    # silu'(z) / silu(z)
    tl.store(dz + at, (df * yf * (1.0 / zf + (1.0 - sig))).to(dz.dtype.element_ty), mask=ok)


@_jit
def _sum_beside_kernel(
    parts, beside, out, rows, dim, parts_k, beside_l,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row, column, ok = _tile_at(rows, dim, ROWS, BLOCK)
    total = _sum(parts, parts_k, row * dim + column, ok, K, ROWS, BLOCK, ALIGN)
    other = tl.load(beside + row * tl.multiple_of(beside_l.to(tl.int64), ALIGN) + column, mask=ok, other=0.0)
    at = row * (2 * dim) + column
    tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)
    tl.store(out + at + dim, other.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _tile_of_image(length, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Image, the row of [ROWS, BLOCK] among the tokens of all images, column, and which of them exist."""
    tiles = tl.cdiv(length, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = (token < length)[:, None] & (column < dim)[None, :]
    return image, (image * length + token)[:, None], column[None, :], ok


@_jit
def _weighted_sum_kernel(y, weights, out, length, dim, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    image, row, column, ok = _tile_of_image(length, dim, ROWS, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in tl.static_range(K):
        at = row * (K * dim) + k * dim + column
        weight = tl.load(weights + image * K + k).to(tl.float32)
        total += tl.load(y + at, mask=ok, other=0.0).to(tl.float32) * weight
    tl.store(out + row * dim + column, total.to(out.dtype.element_ty), mask=ok)


@_jit
def _weighted_sum_backward_kernel(
    dout, y, weights, dy, dweights, length, dim, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """``dweights`` is (programs, K): one part a program, in an order that the shape alone decides."""
    image, row, column, ok = _tile_of_image(length, dim, ROWS, BLOCK)
    df = tl.load(dout + row * dim + column, mask=ok, other=0.0).to(tl.float32)
    part = dweights + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * K
    for k in tl.static_range(K):
        at = row * (K * dim) + k * dim + column
        weight = tl.load(weights + image * K + k).to(tl.float32)
        yf = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dy + at, (df * weight).to(dy.dtype.element_ty), mask=ok)
        tl.store(part + k, tl.sum(tl.sum(df * yf, axis=1), axis=0))


@_jit
def _add_over_tokens_kernel(x, means, length, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    image, row, column, ok = _tile_of_image(length, dim, ROWS, BLOCK)
    mean = tl.load(means + image * dim + column, mask=column < dim, other=0.0).to(tl.float32) / length
    at = row * dim + column
    total = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) + mean
    tl.store(x + at, total.to(x.dtype.element_ty), mask=ok)


def _tile(dim: int, numbers: int) -> dict[str, int]:
    block = min(power_of_2(dim), 128)
    return dict(ROWS=max(numbers // block, 1), BLOCK=block)


def _launch(kernel, rows: int, dim: int, tensors: dict[str, Tensor], strides: dict[str, int], **given) -> None:
    tile = _tile(dim, _TILE)
    grid = cdiv(rows, tile["ROWS"]), cdiv(dim, tile["BLOCK"])
    given |= tile | strides | dict(rows=rows, dim=dim, ALIGN=alignment(dim, *strides.values()))
    _launch_grid(kernel, grid, tensors, given)


def _launch_grid(kernel, grid: tuple[int, int], tensors: dict[str, Tensor], given: dict) -> None:
    if grid[0] * grid[1] > 0:
        with on_device(next(iter(tensors.values()))):
            launch(kernel, grid, tensors | given, 4)


def sum_of_paths(parts: Tensor) -> Tensor:
    """Sum in float32 over the paths of (batch, L, K, D), all paths dense or each, as ``runtime.new_by_path`` gives."""
    batch, length, num_paths, dim = parts.shape
    if num_paths <= 2:  # PyTorch's sum of two is as fast
        first, *others = parts.unbind(2)
        return first + others[0] if others else first
    y = parts.new_empty(batch, length, dim)
    strides = dict(parts_l=parts.stride(1), parts_k=parts.stride(2))
    _launch(_path_sum_kernel, batch * length, dim, dict(parts=parts, y=y), strides, K=num_paths)
    return y


def gated_sum(parts: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Parts (batch, L, K, D) by ``runtime.new_by_path``, and gates (batch, L, 1, D) -> (batch, L, D) in ``dtype``."""
    batch, length, _, dim = parts.shape
    y, z_rows = parts.new_empty(batch, length, dim, dtype=dtype), as_rows(z)
    strides = dict(parts_k=parts.stride(2), z_l=z_rows.stride(0))
    _launch(_gated_sum_kernel, *z_rows.shape, dict(parts=parts, z=z_rows, y=y), strides, K=parts.shape[2])
    return y


def gated_sum_backward(dy: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of each part of the sum, in the dtype of ``y``, and of z, by what :func:`gated_sum` returned."""
    dsum, dz = y.new_empty(y.shape), z.new_empty(z.shape)
    dy_rows, z_rows = as_rows(dy), as_rows(z)
    strides = dict(dy_l=dy_rows.stride(0), z_l=z_rows.stride(0))
    _launch(
        _gated_sum_backward_kernel,
        *z_rows.shape,
        dict(dy=dy_rows, y=y.contiguous(), z=z_rows, dsum=dsum, dz=dz),
        strides,
    )
    return dsum, dz


def sum_beside(parts: Tensor, beside: Tensor) -> Tensor:
    """The sum of (batch, L, K, D) by ``runtime.new_by_path``, and (batch, L, D) behind it -> (batch, L, 2 D)."""
    batch, length, num_paths, dim = parts.shape
    out, rows = parts.new_empty(batch, length, 2 * dim), as_rows(beside)
    strides = dict(parts_k=parts.stride(2), beside_l=rows.stride(0))
    _launch(_sum_beside_kernel, *rows.shape, dict(parts=parts, beside=rows, out=out), strides, K=num_paths)
    return out


def _over_images(batch: int, length: int, dim: int) -> tuple[tuple[int, int], dict]:
    """Programs over the tokens of each image, and their sizes."""
    tile = _tile(dim, 2 * _TILE)
    return (batch * cdiv(length, tile["ROWS"]), cdiv(dim, tile["BLOCK"])), tile | dict(length=length, dim=dim)


def weighted_sum(y: Tensor, weights: Tensor) -> Tensor:
    """``sum_k weights[b, k] * y[b, l, k, d]``: (batch, L, K, D) and (batch, K) -> (batch, L, D)."""
    check_dtypes(y=y, weights=weights)
    batch, length, num_paths, dim = y.shape
    grid, sizes = _over_images(batch, length, dim)
    out = y.new_empty(batch, length, dim)
    tensors = dict(y=y.contiguous(), weights=weights.contiguous(), out=out)
    _launch_grid(_weighted_sum_kernel, grid, tensors, sizes | dict(K=num_paths))
    return out


def weighted_sum_backward(dout: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what :func:`weighted_sum` was given."""
    check_dtypes(dout=dout)
    batch, length, num_paths, dim = y.shape
    grid, sizes = _over_images(batch, length, dim)
    dy = y.new_empty(y.shape)
    parts = y.new_empty(batch, grid[0] * grid[1] // max(batch, 1), num_paths, dtype=torch.float32)
    tensors = dict(dout=dout.contiguous(), y=y.contiguous(), weights=weights.contiguous(), dy=dy, dweights=parts)
    _launch_grid(_weighted_sum_backward_kernel, grid, tensors, sizes | dict(K=num_paths))
    return dy, parts.sum(1).to(weights.dtype)


def add_over_tokens(x: Tensor, means: Tensor) -> Tensor:
    """``x + means / L`` over the tokens, in place where ``x`` is dense: (batch, L, K, D) and (batch, K, D)."""
    check_dtypes(x=x, means=means)
    batch, length, num_paths, dim = x.shape
    x = x.contiguous()
    grid, sizes = _over_images(batch, length, num_paths * dim)
    _launch_grid(_add_over_tokens_kernel, grid, dict(x=x, means=means.contiguous()), sizes)
    return x
