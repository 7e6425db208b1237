"""Sums over paths in one pass with what else is to be done to them.

A gate that all paths share is none of the scan's business: each of its programs would read the gate, and their
backward pass find y again for the gate's gradient, which is more work than these passes. y need not be kept for that
either: it is in what was given out, so long as no gate is exactly zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .runtime import alignment, as_rows, cdiv, jit_without, launch, on_device, power_of_2, sigmoid

_TILE = 1024  # numbers of a program
_LEAST_GATE = tl.constexpr(2.0**-60)
_jit = jit_without(("rows", "parts_k", "z_l", "dy_l", "beside_l"))


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


def _launch(kernel, rows: int, dim: int, tensors: dict[str, Tensor], strides: dict[str, int], **given) -> None:
    block = min(power_of_2(dim), 128)
    given |= dict(ROWS=max(_TILE // block, 1), BLOCK=block, ALIGN=alignment(dim, *strides.values()))
    if rows * dim > 0:
        with on_device(next(iter(tensors.values()))):
            grid = cdiv(rows, given["ROWS"]), cdiv(dim, block)
            launch(kernel, grid, tensors | strides | dict(rows=rows, dim=dim) | given, 4)


def gated_sum(parts: Tensor, z: Tensor) -> Tensor:
    """Parts (batch, L, K, D) by ``runtime.new_by_path``, and gates (batch, L, 1, D) -> (batch, L, D)."""
    batch, length, _, dim = parts.shape
    y, z_rows = parts.new_empty(batch, length, dim), as_rows(z)
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
