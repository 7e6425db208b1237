"""Residual addition and norm in Triton; a program holds whole rows in registers and reads each of them once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import sum_of_parts
from .runtime import (
    OPTIONS,
    alignment,
    as_rows,
    cdiv,
    check_dtypes,
    jit_without,
    load_rows,
    multiprocessors,
    on_device,
    power_of_2,
    store_rows,
)

_TILE = 2048  # numbers a program holds of a tensor at once, where a row is not longer; half of it in the backward pass
_PROGRAMS = 8  # a multiprocessor, in the backward pass: each adds one row to the sums over rows
_jit = jit_without(("rows", "span", "x_l", "residual_l", "dnormed_l", "dsum_l"))


@triton.jit
def _normalised(r, c_ok, dim, eps, RMS: tl.constexpr):
    """The rows without their mean over their deviation, and one over the deviation."""
    if not RMS:
        mean = tl.sum(r, axis=1) / dim
        r = tl.where(c_ok[None, :], r - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(r * r, axis=1) / dim + eps)
    return r * scale[:, None], scale


@_jit
def _norm_forward_kernel(
    x, shift, residual, weight, bias, normed, total, rows, dim, x_l, residual_l, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.where(row < rows, row, -1)
    c = tl.arange(0, BLOCK)
    c_ok = c < dim
    r = load_rows(x, row, tl.multiple_of(x_l.to(tl.int64), ALIGN), c, c_ok).to(tl.float32)
    if shift is not None:
        r += tl.load(shift + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        r += load_rows(residual, row, tl.multiple_of(residual_l.to(tl.int64), ALIGN), c, c_ok).to(tl.float32)
    if total is not None:
        store_rows(total, row, dim, c, c_ok, r)
    out, _ = _normalised(r, c_ok, dim, eps, RMS)
    out *= tl.load(weight + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    store_rows(normed, row, dim, c, c_ok, out)


@_jit
def _norm_backward_kernel(
    dnormed, dsum, total, shift, weight, grad, grad_other, sums, rows, span, dim, dnormed_l, dsum_l, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, RMS: tl.constexpr,
    BIAS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """``span`` rows a program, whose sums for weight, bias and shift stay in its registers."""
    pid = tl.program_id(0).to(tl.int64)
    dnormed_l = tl.multiple_of(dnormed_l.to(tl.int64), ALIGN)
    dsum_l = tl.multiple_of(dsum_l.to(tl.int64), ALIGN)
    c = tl.arange(0, BLOCK)
    c_ok = c < dim
    w = tl.load(weight + c, mask=c_ok, other=0.0).to(tl.float32)
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    of_bias, of_shift, shifted_by = of_weight, of_weight, tl.zeros([BLOCK], tl.float32)
    if shift is not None:
        shifted_by = tl.load(shift + c, mask=c_ok, other=0.0).to(tl.float32)
    for start in tl.range(0, span, ROWS, num_stages=STAGES):
        row = pid * span + start + tl.arange(0, ROWS)
        row = tl.where(row < rows, row, -1)
        dy = load_rows(dnormed, row, dnormed_l, c, c_ok).to(tl.float32)
        r = load_rows(total, row, dim, c, c_ok).to(tl.float32)
        if shift is not None:
            r += shifted_by[None, :]
        normalised, scale = _normalised(r, c_ok, dim, eps, RMS)
        of_weight += dy * normalised
        if BIAS:
            of_bias += dy
        dy *= w[None, :]
        g = dy - normalised * (tl.sum(dy * normalised, axis=1) / dim)[:, None]
        if not RMS:
            g -= (tl.sum(dy, axis=1) / dim)[:, None]
        g *= scale[:, None]
        if dsum is not None:
            g += load_rows(dsum, row, dsum_l, c, c_ok).to(tl.float32)
        if shift is not None:
            of_shift += tl.where((row >= 0)[:, None], g, 0.0)
        store_rows(grad, row, dim, c, c_ok, g)
        if grad_other is not None:
            store_rows(grad_other, row, dim, c, c_ok, g)
    sums += pid * (SUMS * dim) + c
    tl.store(sums, tl.sum(of_weight, axis=0), mask=c_ok)
    if BIAS:
        tl.store(sums + dim, tl.sum(of_bias, axis=0), mask=c_ok)
    if shift is not None:
        tl.store(sums + (SUMS - 1) * dim, tl.sum(of_shift, axis=0), mask=c_ok)


def _tile(dim: int, numbers: int) -> tuple[dict[str, int], int]:
    """Compile-time sizes by the number of channels alone, and the number of warps: 16 numbers a lane."""
    block = power_of_2(dim)
    return {"ROWS": max(numbers // block, 1), "BLOCK": block}, min(max(block, numbers) // 512, 16)


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    return {f"{name}_l": 0 if tensor is None else tensor.stride(0) for name, tensor in tensors.items()}


def add_norm_forward(x, residual, weight, bias, eps, rms, residual_dtype, dtype) -> tuple[Tensor, Tensor | None]:
    """(..., D) -> the normalised sum in ``dtype``, the sum in ``residual_dtype`` (None where that is None)."""
    return _forward(x, None, residual, weight, bias, eps, rms, residual_dtype, dtype)


def shifted_norm_forward(x, shift, weight, bias, eps, rms, dtype) -> Tensor:
    """The norm of ``x + shift`` in ``dtype``: (..., D) and (D,) -> (..., D)."""
    return _forward(x, shift, None, weight, bias, eps, rms, None, dtype)[0]


def _forward(x, shift, residual, weight, bias, eps, rms, residual_dtype, dtype) -> tuple[Tensor, Tensor | None]:
    normed = x.new_empty(x.shape, dtype=dtype)
    total = None if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype)
    check_dtypes(
        x=x, shift=shift, residual=residual, weight=weight, bias=bias, dtype=normed, residual_dtype=total
    )  # fmt: skip
    rows_x, rows_residual = as_rows(x), None if residual is None else as_rows(residual)
    shift, bias = (None if vector is None else vector.contiguous() for vector in (shift, bias))
    dim = x.shape[-1]
    strides = _strides(x=rows_x, residual=rows_residual)
    tile, warps = _tile(dim, _TILE)
    if x.numel() > 0:
        with on_device(x):
            _norm_forward_kernel[(cdiv(len(rows_x), tile["ROWS"]),)](
                rows_x, shift, rows_residual, weight.contiguous(), bias, normed, total, len(rows_x), dim,
                *strides.values(), eps, **tile, ALIGN=alignment(dim, *strides.values()), RMS=rms, num_warps=warps,
                **OPTIONS,
            )  # fmt: skip
    return normed, total


def add_norm_backward(dnormed, dsum, total, weight, bias, eps, rms, dtypes):
    """The gradient of the sum in each of ``dtypes`` (one or two); those of weight and bias (None without a bias)."""
    grads, sums = _backward(dnormed, dsum, total, None, weight, bias, eps, rms, dtypes)
    return grads, sums[0].to(weight.dtype), None if bias is None else sums[1].to(bias.dtype)


def shifted_norm_backward(dnormed, x, shift, weight, bias, eps, rms):
    """The gradients of what :func:`shifted_norm_forward` was given: x, shift, weight and bias (None without one)."""
    grads, sums = _backward(dnormed, None, x, shift, weight, bias, eps, rms, [x.dtype])
    dbias = None if bias is None else sums[1].to(bias.dtype)
    return grads[0], sums[-1].to(shift.dtype), sums[0].to(weight.dtype), dbias


def _backward(dnormed, dsum, total, shift, weight, bias, eps, rms, dtypes) -> tuple[list[Tensor], Tensor]:
    """The gradient of the sum in each of ``dtypes``; in float32 that of the weight, then those of bias and shift."""
    check_dtypes(dnormed=dnormed, dsum=dsum, total=total, shift=shift, weight=weight)
    rows_dnormed, rows_dsum = as_rows(dnormed), None if dsum is None else as_rows(dsum)
    rows, dim = rows_dnormed.shape
    strides = _strides(dnormed=rows_dnormed, dsum=rows_dsum)
    tile, warps = _tile(dim, _TILE // 2)
    programs = min(cdiv(rows, tile["ROWS"]), multiprocessors(total.device) * _PROGRAMS)
    wanted = 1 + sum(vector is not None for vector in (bias, shift))
    sums = total.new_empty(programs, wanted, dim, dtype=torch.float32)
    grads = [total.new_empty(total.shape, dtype=dtype) for dtype in dtypes]
    if programs > 0:
        span = cdiv(rows, programs * tile["ROWS"]) * tile["ROWS"]
        with on_device(total):
            _norm_backward_kernel[(programs,)](
                rows_dnormed, rows_dsum, total.contiguous(), None if shift is None else shift.contiguous(),
                weight.contiguous(), *grads, *[None] * (2 - len(grads)), sums, rows, span, dim, *strides.values(), eps,
                **tile, STAGES=2 if tile["BLOCK"] <= _TILE else 1,  # next rows: in shared memory, which long ones fill
                ALIGN=alignment(dim, *strides.values()), RMS=rms, BIAS=bias is not None, SUMS=wanted, num_warps=warps,
                **OPTIONS,
            )  # fmt: skip
    return grads, sum_of_parts(sums)
