"""Depthwise 3x3 convolution of channels-last maps in Triton; a program walks strips of rows for a block of channels.

A lane has in registers what the last columns of its strip are to the next outputs, and so reads each column once; bias
and activation cost no pass over memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import sum_of_parts
from .runtime import (
    LOG2E,
    alignment,
    cdiv,
    check_dtypes,
    dense,
    jit_without,
    launch,
    multiprocessors,
    offset_type,
    on_device,
    segment_steps,
    sigmoid,
)

BLOCK = 32  # channels a program
STRIPS = 16  # a program; with four warps a lane has four channels of one of them
_STAGES = tl.constexpr(3)  # columns that are on their way, and those that are computed


class _Config(NamedTuple):
    rows: int  # of outputs in a strip
    unrolled: int  # columns
    programs: int  # a multiprocessor
    registers: int  # a thread, at most: with them so many programs fit


_FORWARD = _Config(rows=2, unrolled=2, programs=4, registers=128)
_BACKWARD = _Config(rows=1, unrolled=3, programs=2, registers=255)

_jit = jit_without(
    ("strips", "columns", "height", "width") + ("x_b", "x_h", "x_w", "dy_b", "dy_h", "dy_w", "y_b", "y_h", "y_w")
)


@triton.jit
def _tail(x):
    """The normal distribution beyond ``|x|``, to 1e-7 (Abramowitz and Stegun 1964, 7.1.26), and ``exp(-x^2 / 2)``."""
    density = tl.exp2(x * x * (-0.5 * LOG2E))
    r = tl.rsqrt(1.0 + 0.2316418882663604 * tl.abs(x))  # as in runtime.sigmoid
    t = r * r
    p = t * 0.5307027145 - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    return p * t * density, density


@triton.jit
def _activated(out, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        out = out * sigmoid(out)
    if ACTIVATION == "gelu":
        tail, _ = _tail(out)
        out = tl.maximum(out, 0.0) - tl.abs(out) * tail
    return out


@triton.jit
def _slope(dy, out, ACTIVATION: tl.constexpr):
    """The gradient before the activation."""
    if ACTIVATION == "silu":
        sig = sigmoid(out)
        dy = dy * sig * (1.0 + out * (1.0 - sig))
    if ACTIVATION == "gelu":
        tail, density = _tail(out)
        dy = dy * (tl.where(out > 0, 1.0 - tail, tail) + out * density * 0.3989422804014327)
    return dy


@triton.jit
def _place(strips, columns, height, width, dim, LINES: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels; image, first row, first column and end of each strip of so many ``LINES``."""
    blocks = tl.cdiv(dim, BLOCK)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    strip = tl.program_id(0) // blocks * STRIPS + tl.arange(0, STRIPS)
    # Neighbours in a program are neighbours in the map: what one reads is in the cache for the next.
    bands = tl.cdiv(height, LINES)
    row = strip % bands * LINES
    rest = strip // bands
    across = tl.cdiv(width, columns)
    start = rest % across * columns
    end = tl.where(strip < strips, tl.minimum(start + columns, width), 0)
    image = tl.where(strip < strips, rest // across, 0).to(tl.int64)
    return c, image, row, start, end


@triton.jit
def _rows_at(base, image, row, b, h, height, c, OFFSET: tl.constexpr, ALIGN: tl.constexpr):
    """Where rows begin for these channels, and which of them exist."""
    at = tl.multiple_of(image * b, ALIGN)[:, None] + tl.multiple_of(row.to(OFFSET) * h, ALIGN)[:, None]
    return base + at + c[None, :], (row >= 0) & (row < height)


@triton.jit
def _load(rows, exist, column, stride, last, c_ok):
    mask = (exist & (column >= 0) & (column < last))[:, None] & c_ok[None, :]
    return tl.load(rows + (column * stride)[:, None], mask=mask, other=0.0)


@triton.jit
def _store(rows, exist, column, stride, end, c_ok, value):
    mask = (exist & (column < end))[:, None] & c_ok[None, :]
    tl.store(rows + (column * stride)[:, None], value.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _tap(weight, place: tl.constexpr, c, c_ok, FLIPPED: tl.constexpr):
    at: tl.constexpr = 8 - place if FLIPPED else place
    return tl.load(weight + c * 9 + at, mask=c_ok, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _taps(weight, c, c_ok, FLIPPED: tl.constexpr):
    """The weights of rows above, here and below, of the columns before, here and behind."""
    return (
        _tap(weight, 0, c, c_ok, FLIPPED),
        _tap(weight, 1, c, c_ok, FLIPPED),
        _tap(weight, 2, c, c_ok, FLIPPED),
        _tap(weight, 3, c, c_ok, FLIPPED),
        _tap(weight, 4, c, c_ok, FLIPPED),
        _tap(weight, 5, c, c_ok, FLIPPED),
        _tap(weight, 6, c, c_ok, FLIPPED),
        _tap(weight, 7, c, c_ok, FLIPPED),
        _tap(weight, 8, c, c_ok, FLIPPED),
    )


@triton.jit
def _shift(bias, c, c_ok, BLOCK: tl.constexpr):
    shift = tl.zeros([1, BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    return shift


@triton.jit
def _column(row0, row1, row2, row3, is0, is1, is2, is3, column, stride, last, c_ok):
    """Four rows of one column, in float32."""
    return (
        _load(row0, is0, column, stride, last, c_ok).to(tl.float32),
        _load(row1, is1, column, stride, last, c_ok).to(tl.float32),
        _load(row2, is2, column, stride, last, c_ok).to(tl.float32),
        _load(row3, is3, column, stride, last, c_ok).to(tl.float32),
    )


@_jit
def _conv2d_forward_kernel(
    x, weight, bias, y, strips, columns, height, width, dim, x_b, x_h, x_w, y_b, y_h, y_w,
    STRIPS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    UNROLLED: tl.constexpr, FLIPPED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Two rows of outputs. A column gives to those before it, at it and behind it: the last two wait in registers."""
    c, image, row, start, end = _place(strips, columns, height, width, dim, 2, STRIPS, BLOCK)
    c_ok = c < dim
    x_w = (x_w // ALIGN).to(OFFSET) * ALIGN
    y_w = (y_w // ALIGN).to(OFFSET) * ALIGN
    row0, is0 = _rows_at(x, image, row - 1, x_b, x_h, height, c, OFFSET, ALIGN)
    row1, is1 = _rows_at(x, image, row, x_b, x_h, height, c, OFFSET, ALIGN)
    row2, is2 = _rows_at(x, image, row + 1, x_b, x_h, height, c, OFFSET, ALIGN)
    row3, is3 = _rows_at(x, image, row + 2, x_b, x_h, height, c, OFFSET, ALIGN)
    out1, _ = _rows_at(y, image, row, y_b, y_h, height, c, OFFSET, ALIGN)
    out2, _ = _rows_at(y, image, row + 1, y_b, y_h, height, c, OFFSET, ALIGN)
    k0, k1, k2, k3, k4, k5, k6, k7, k8 = _taps(weight, c, c_ok, FLIPPED)
    shift = _shift(bias, c, c_ok, BLOCK)

    a, b, d, e = _column(row0, row1, row2, row3, is0, is1, is2, is3, start - 1, x_w, width, c_ok)
    here1, here2 = shift + k0 * a + k3 * b + k6 * d, shift + k0 * b + k3 * d + k6 * e
    a, b, d, e = _column(row0, row1, row2, row3, is0, is1, is2, is3, start, x_w, width, c_ok)
    here1, here2 = here1 + k1 * a + k4 * b + k7 * d, here2 + k1 * b + k4 * d + k7 * e
    next1, next2 = shift + k0 * a + k3 * b + k6 * d, shift + k0 * b + k3 * d + k6 * e
    for t in tl.range(0, columns, UNROLLED, num_stages=_STAGES):
        for i in tl.static_range(UNROLLED):
            at = start + t + i
            a, b, d, e = _column(row0, row1, row2, row3, is0, is1, is2, is3, at + 1, x_w, width, c_ok)
            here1, here2 = here1 + k2 * a + k5 * b + k8 * d, here2 + k2 * b + k5 * d + k8 * e
            _store(out1, is1, at, y_w, end, c_ok, _activated(here1, ACTIVATION))
            _store(out2, is2, at, y_w, end, c_ok, _activated(here2, ACTIVATION))
            here1, here2 = next1 + k1 * a + k4 * b + k7 * d, next2 + k1 * b + k4 * d + k7 * e
            next1, next2 = shift + k0 * a + k3 * b + k6 * d, shift + k0 * b + k3 * d + k6 * e


@triton.jit
def _columns_of_three(row0, row1, row2, dy_row, is0, is1, is2, column, dy_column, stride, dy_stride, last, end, c_ok):
    """Of three rows one column, and of the gradient one, in float32."""
    return (
        _load(row0, is0, column, stride, last, c_ok).to(tl.float32),
        _load(row1, is1, column, stride, last, c_ok).to(tl.float32),
        _load(row2, is2, column, stride, last, c_ok).to(tl.float32),
        _load(dy_row, is1, dy_column, dy_stride, end, c_ok).to(tl.float32),
    )


@_jit
def _conv2d_backward_kernel(
    dy, x, weight, bias, slope, sums, strips, columns, height, width, dim,
    x_b, x_h, x_w, dy_b, dy_h, dy_w, y_b, y_h, y_w,
    STRIPS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    UNROLLED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One row of the gradient before the activation; a program's sums for the weights as they lie, and the bias."""
    c, image, row, start, end = _place(strips, columns, height, width, dim, 1, STRIPS, BLOCK)
    c_ok = c < dim
    x_w = (x_w // ALIGN).to(OFFSET) * ALIGN
    dy_w = (dy_w // ALIGN).to(OFFSET) * ALIGN
    y_w = (y_w // ALIGN).to(OFFSET) * ALIGN
    row0, is0 = _rows_at(x, image, row - 1, x_b, x_h, height, c, OFFSET, ALIGN)
    row1, is1 = _rows_at(x, image, row, x_b, x_h, height, c, OFFSET, ALIGN)
    row2, is2 = _rows_at(x, image, row + 1, x_b, x_h, height, c, OFFSET, ALIGN)
    dy_row, _ = _rows_at(dy, image, row, dy_b, dy_h, height, c, OFFSET, ALIGN)
    slope_row = dy_row
    if ACTIVATION is not None:  # else it is what was given
        slope_row, _ = _rows_at(slope, image, row, y_b, y_h, height, c, OFFSET, ALIGN)
    k0, k1, k2, k3, k4, k5, k6, k7, k8 = _taps(weight, c, c_ok, False)
    shift = _shift(bias, c, c_ok, BLOCK)
    s0 = tl.zeros([STRIPS, BLOCK], tl.float32)
    s1, s2, s3, s4, s5, s6, s7, s8, s9 = s0, s0, s0, s0, s0, s0, s0, s0, s0

    # Columns of rows a, b, d: one and the two before it.
    a0, b0, d0, _ = _columns_of_three(
        row0, row1, row2, dy_row, is0, is1, is2, start - 1, start, x_w, dy_w, width, 0, c_ok
    )  # fmt: skip
    a1, b1, d1, _ = _columns_of_three(row0, row1, row2, dy_row, is0, is1, is2, start, start, x_w, dy_w, width, 0, c_ok)
    for t in tl.range(0, columns, UNROLLED, num_stages=_STAGES):
        for i in tl.static_range(UNROLLED):
            at = start + t + i
            a2, b2, d2, s = _columns_of_three(
                row0, row1, row2, dy_row, is0, is1, is2, at + 1, at, x_w, dy_w, width, end, c_ok
            )  # fmt: skip
            if ACTIVATION is not None:
                out = shift + k0 * a0 + k1 * a1 + k2 * a2
                out += k3 * b0 + k4 * b1 + k5 * b2
                out += k6 * d0 + k7 * d1 + k8 * d2
                s = _slope(s, out, ACTIVATION)
                _store(slope_row, is1, at, y_w, end, c_ok, s)
            s0, s1, s2, s9 = s0 + s * a0, s1 + s * a1, s2 + s * a2, s9 + s
            s3, s4, s5 = s3 + s * b0, s4 + s * b1, s5 + s * b2
            s6, s7, s8 = s6 + s * d0, s7 + s * d1, s8 + s * d2
            a0, b0, d0, a1, b1, d1 = a1, b1, d1, a2, b2, d2

    part = sums + (tl.program_id(0) // tl.cdiv(dim, BLOCK)).to(tl.int64) * 10 * dim
    tl.store(part + c * 9, tl.sum(s0, axis=0), mask=c_ok)
    tl.store(part + c * 9 + 1, tl.sum(s1, axis=0), mask=c_ok)
    tl.store(part + c * 9 + 2, tl.sum(s2, axis=0), mask=c_ok)
    tl.store(part + c * 9 + 3, tl.sum(s3, axis=0), mask=c_ok)
    tl.store(part + c * 9 + 4, tl.sum(s4, axis=0), mask=c_ok)
    tl.store(part + c * 9 + 5, tl.sum(s5, axis=0), mask=c_ok)
    tl.store(part + c * 9 + 6, tl.sum(s6, axis=0), mask=c_ok)
    tl.store(part + c * 9 + 7, tl.sum(s7, axis=0), mask=c_ok)
    tl.store(part + c * 9 + 8, tl.sum(s8, axis=0), mask=c_ok)
    tl.store(part + 9 * dim + c, tl.sum(s9, axis=0), mask=c_ok)


@functools.lru_cache(maxsize=1024)
def _plan(shape: torch.Size, config: _Config, device: torch.device, **strides: tuple[int, ...]) -> tuple[dict, int]:
    """Sizes of a launch and strides by the names of tensors; and how many programs a block of channels has."""
    images, height, width, dim = shape
    bands, wanted = images * cdiv(height, config.rows), multiprocessors(device) * config.programs
    columns = segment_steps(bands, width, STRIPS, cdiv(dim, BLOCK), wanted, config.unrolled)
    strips = bands * cdiv(width, columns)
    leading = {
        f"{name}_{axis}": step for name, steps in strides.items() for axis, step in zip("bhw", steps, strict=False)
    }
    in_image = [step for steps in strides.values() for step in steps[1:]]
    given = leading | dict(
        strips=strips, columns=columns, height=height, width=width, dim=dim, STRIPS=STRIPS, BLOCK=BLOCK,
        UNROLLED=config.unrolled, ALIGN=alignment(dim, *leading.values()),
        OFFSET=offset_type(2 * max(height, width), *in_image),
    )  # fmt: skip
    return given, cdiv(strips, STRIPS)


def _convolve(x, weight, bias, activation, flipped: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        plan, groups = _plan(x.shape, _FORWARD, x.device, x=x.stride(), y=y.stride())
        given = plan | dict(x=x, weight=weight, bias=bias, y=y, FLIPPED=flipped, ACTIVATION=activation)
        with on_device(x):
            launch(_conv2d_forward_kernel, (groups * cdiv(x.shape[3], BLOCK),), given, 4, _FORWARD.registers)
    return y


def depthwise_conv2d_forward(x, weight, bias, activation) -> Tensor:
    """(batch, H, W, D), (D, 1, 3, 3), (D,) -> (batch, H, W, D)."""
    check_dtypes(x=x, weight=weight, bias=bias)
    return _convolve(dense(x), weight.contiguous(), None if bias is None else dense(bias), activation, False)


def depthwise_conv2d_backward(dy, x, weight, bias, activation) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias (None without a bias)."""
    check_dtypes(dy=dy)
    dy, x, weight, bias = dense(dy), dense(x), weight.contiguous(), None if bias is None else dense(bias)
    dim = x.shape[3]
    slope = None if activation is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    plan, groups = {}, 0
    if dy.numel() > 0:
        written = x if slope is None else slope
        plan, groups = _plan(x.shape, _BACKWARD, x.device, x=x.stride(), dy=dy.stride(), y=written.stride())
    sums = x.new_empty(groups, 10 * dim, dtype=torch.float32)
    if groups > 0:
        given = plan | dict(dy=dy, x=x, weight=weight, bias=bias, slope=slope, sums=sums, ACTIVATION=activation)
        with on_device(x):
            launch(_conv2d_backward_kernel, (groups * cdiv(dim, BLOCK),), given, 4, _BACKWARD.registers)
    dx = _convolve(dy if slope is None else slope, weight, None, None, True)
    dweight, dbias = sum_of_parts(sums).split((9 * dim, dim))
    return dx.to(x.dtype), dweight.view(weight.shape).to(weight.dtype), None if bias is None else dbias.to(bias.dtype)
