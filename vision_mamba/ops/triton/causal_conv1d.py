"""Depthwise causal convolution along scan paths in Triton; a program walks segments of a path for a block of channels.

A lane has the last tokens of its segment in registers, and so reads each token once (and the few before its segment),
where a tile of outputs would read it once for each weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import sum_of_parts
from .path_sums import sum_beside, sum_of_paths
from .runtime import (
    alignment,
    cdiv,
    check_dtypes,
    dense,
    jit_without,
    launch,
    multiprocessors,
    new_by_path,
    offset_type,
    on_device,
    segment_steps,
    sigmoid,
    visited,
)

BLOCK = 64  # channels a program
ROWS = 8  # segments a program; with four warps a lane has four channels of one of them
MAX_WIDTH = 4
_UNROLLED = 4  # steps: no fewer than the widest convolution looks back, so that all it looks at stays where it is


class _Config(NamedTuple):
    programs: int  # a multiprocessor
    registers: int  # a thread, at most: with them so many programs fit


_FORWARD = _Config(6, 80)
_BACKWARD = _Config(3, 168)

_jit = jit_without(
    ("segments", "steps", "length", "num_paths", "x_b", "x_l", "dy_b", "dy_l", "dy_k", "dx_b", "dx_l", "dx_k")
    + ("w_k", "bias_k", "paths_k")
)


@triton.jit
def _place(segments, steps, length, dim, num_paths, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels and path; image, first position and end of each segment."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(dim, BLOCK)
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    pid = pid // blocks
    segment = pid // num_paths * ROWS + tl.arange(0, ROWS)
    an_image = tl.cdiv(length, steps)
    start = segment % an_image * steps
    end = tl.where(segment < segments, tl.minimum(start + steps, length), 0)
    image = tl.where(segment < segments, segment // an_image, 0)
    return c, (pid % num_paths).to(tl.int64), image.to(tl.int64), start, end


@triton.jit
def _tap(weight, k, w_k, back: tl.constexpr, dim, c, c_ok, WIDTH: tl.constexpr):
    """The weights of the token so many steps back; zeros beyond the width."""
    at = k * w_k + (WIDTH - 1 - back) * dim + c
    return tl.load(weight + at, mask=c_ok & (back < WIDTH), other=0.0).to(tl.float32)[None, :]


@triton.jit
def _weights(weight, bias, k, w_k, bias_k, dim, c, c_ok, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Those of a token and of the three before it, [1, channels], and the bias."""
    shift = tl.zeros([1, BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    return (
        _tap(weight, k, w_k, 0, dim, c, c_ok, WIDTH),
        _tap(weight, k, w_k, 1, dim, c, c_ok, WIDTH),
        _tap(weight, k, w_k, 2, dim, c, c_ok, WIDTH),
        _tap(weight, k, w_k, 3, dim, c, c_ok, WIDTH),
        shift,
    )


@triton.jit
def _tokens(path, t, end, length):
    """Those that a path visits at t and at the three steps after it."""
    return (
        visited(path, t, end, length),
        visited(path, t + 1, end, length),
        visited(path, t + 2, end, length),
        visited(path, t + 3, end, length),
    )


@triton.jit
def _load(rows, token, stride, c_ok):
    """[segments, channels] of these tokens; zeros where there is none."""
    mask = (token >= 0)[:, None] & c_ok[None, :]
    return tl.load(rows + (token * stride)[:, None], mask=mask, other=0.0)


@triton.jit
def _load_all(rows, token0, token1, token2, token3, stride, c_ok):
    return (
        _load(rows, token0, stride, c_ok),
        _load(rows, token1, stride, c_ok),
        _load(rows, token2, stride, c_ok),
        _load(rows, token3, stride, c_ok),
    )


@triton.jit
def _store(rows, token, stride, c_ok, value):
    mask = (token >= 0)[:, None] & c_ok[None, :]
    tl.store(rows + (token * stride)[:, None], value.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _floats(a, b, c, d):
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@triton.jit
def _convolved(x0, x1, x2, x3, tap0, tap1, tap2, tap3, shift, WIDTH: tl.constexpr):
    """Of a token and the three before it; those beyond the width are left out, as they may not be numbers."""
    out = shift + tap0 * x0
    if WIDTH > 1:
        out += tap1 * x1
    if WIDTH > 2:
        out += tap2 * x2
    if WIDTH > 3:
        out += tap3 * x3
    return out


@triton.jit
def _activated(out, SILU: tl.constexpr):
    if SILU:
        out = out * sigmoid(out)
    return out


@_jit
def _conv_forward_kernel(
    x, weight, bias, paths, y, segments, steps, length, num_paths, dim, x_b, x_l, w_k, bias_k, paths_k,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Four steps at a time. Their rows are read while the four before are computed, and their tokens before that."""
    c, k, image, start, end = _place(segments, steps, length, dim, num_paths, ROWS, BLOCK)
    c_ok = c < dim
    x_l = (x_l // ALIGN).to(OFFSET) * ALIGN
    y_l = tl.cast(num_paths * dim, OFFSET)
    x_rows = x + tl.multiple_of(image * x_b, ALIGN)[:, None] + c[None, :]
    y_rows = y + (image * length * num_paths * dim + k * dim)[:, None] + c[None, :]
    path = paths + k * paths_k
    tap0, tap1, tap2, tap3, shift = _weights(weight, bias, k, w_k, bias_k, dim, c, c_ok, BLOCK, WIDTH)
    x1 = _load(x_rows, visited(path, start - 1, end, length), x_l, c_ok).to(tl.float32)
    x2 = _load(x_rows, visited(path, start - 2, end, length), x_l, c_ok).to(tl.float32)
    x3 = _load(x_rows, visited(path, start - 3, end, length), x_l, c_ok).to(tl.float32)
    token0, token1, token2, token3 = _tokens(path, start, end, length)
    row0, row1, row2, row3 = _load_all(x_rows, token0, token1, token2, token3, x_l, c_ok)
    then0, then1, then2, then3 = _tokens(path, start + 4, end, length)
    for t in range(8, steps + 8, 4):
        at0, at1, at2, at3 = token0, token1, token2, token3
        n0, n1, n2, n3 = _floats(row0, row1, row2, row3)
        token0, token1, token2, token3 = then0, then1, then2, then3
        row0, row1, row2, row3 = _load_all(x_rows, token0, token1, token2, token3, x_l, c_ok)
        then0, then1, then2, then3 = _tokens(path, start + t, end, length)
        out = _convolved(n0, x1, x2, x3, tap0, tap1, tap2, tap3, shift, WIDTH)
        _store(y_rows, at0, y_l, c_ok, _activated(out, SILU))
        out = _convolved(n1, n0, x1, x2, tap0, tap1, tap2, tap3, shift, WIDTH)
        _store(y_rows, at1, y_l, c_ok, _activated(out, SILU))
        out = _convolved(n2, n1, n0, x1, tap0, tap1, tap2, tap3, shift, WIDTH)
        _store(y_rows, at2, y_l, c_ok, _activated(out, SILU))
        out = _convolved(n3, n2, n1, n0, tap0, tap1, tap2, tap3, shift, WIDTH)
        _store(y_rows, at3, y_l, c_ok, _activated(out, SILU))
        x1, x2, x3 = n3, n2, n1


@triton.jit
def _slope(grad, x0, x1, x2, x3, tap0, tap1, tap2, tap3, shift, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """The gradient before the activation."""
    if SILU:
        out = _convolved(x0, x1, x2, x3, tap0, tap1, tap2, tap3, shift, WIDTH)
        sig = sigmoid(out)
        grad = grad * sig * (1.0 + out * (1.0 - sig))
    return grad


@triton.jit
def _with_step(sum0, sum1, sum2, sum3, sum_bias, s, x0, x1, x2, x3):
    return sum0 + s * x0, sum1 + s * x1, sum2 + s * x2, sum3 + s * x3, sum_bias + s


@_jit
def _conv_backward_kernel(
    dy, x, weight, bias, paths, dx, sums,
    segments, steps, length, num_paths, dim, x_b, x_l, dy_b, dy_l, dy_k, dx_b, dx_l, dx_k, w_k, bias_k, paths_k,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """What a path gives to the gradient of x, and a program's sums: for the weights in their order, then for the bias.

    A token's gradient is known three steps later, as it has a part of each slope (the gradient before the activation)
    since then. So a segment goes on for three steps into the next one, which leaves those tokens to it.
    """
    c, k, image, start, end = _place(segments, steps, length, dim, num_paths, ROWS, BLOCK)
    c_ok = c < dim
    x_l = (x_l // ALIGN).to(OFFSET) * ALIGN
    dy_l = (dy_l // ALIGN).to(OFFSET) * ALIGN
    dx_l = (dx_l // ALIGN).to(OFFSET) * ALIGN
    x_rows = x + tl.multiple_of(image * x_b, ALIGN)[:, None] + c[None, :]
    dy_rows = dy + tl.multiple_of(image * dy_b + k * dy_k, ALIGN)[:, None] + c[None, :]
    dx_rows = dx + tl.multiple_of(image * dx_b + k * dx_k, ALIGN)[:, None] + c[None, :]
    path = paths + k * paths_k
    tap0, tap1, tap2, tap3, shift = _weights(weight, bias, k, w_k, bias_k, dim, c, c_ok, BLOCK, WIDTH)
    x1 = _load(x_rows, visited(path, start - 1, end, length), x_l, c_ok).to(tl.float32)
    x2 = _load(x_rows, visited(path, start - 2, end, length), x_l, c_ok).to(tl.float32)
    x3 = _load(x_rows, visited(path, start - 3, end, length), x_l, c_ok).to(tl.float32)
    s1 = tl.zeros([ROWS, BLOCK], tl.float32)
    s2, s3, sum0, sum1, sum2, sum3, sum_bias = s1, s1, s1, s1, s1, s1, s1
    at1 = tl.full([ROWS], -1, tl.int32)
    at2, at3 = at1, at1
    token0, token1, token2, token3 = _tokens(path, start, end, length)
    row0, row1, row2, row3 = _load_all(x_rows, token0, token1, token2, token3, x_l, c_ok)
    dy0, dy1, dy2, dy3 = _load_all(dy_rows, token0, token1, token2, token3, dy_l, c_ok)
    then0, then1, then2, then3 = _tokens(path, start + 4, end, length)
    for t in range(8, steps + 8, 4):
        n0, n1, n2, n3 = _floats(row0, row1, row2, row3)
        g0, g1, g2, g3 = _floats(dy0, dy1, dy2, dy3)
        back1, back2, back3, at0, at1, at2, at3 = at3, at2, at1, token0, token1, token2, token3
        token0, token1, token2, token3 = then0, then1, then2, then3
        row0, row1, row2, row3 = _load_all(x_rows, token0, token1, token2, token3, x_l, c_ok)
        dy0, dy1, dy2, dy3 = _load_all(dy_rows, token0, token1, token2, token3, dy_l, c_ok)
        then0, then1, then2, then3 = _tokens(path, start + t, end, length)
        sa = _slope(g0, n0, x1, x2, x3, tap0, tap1, tap2, tap3, shift, WIDTH, SILU)
        _store(dx_rows, back3, dx_l, c_ok, _convolved(s3, s2, s1, sa, tap0, tap1, tap2, tap3, 0.0, WIDTH))
        sum0, sum1, sum2, sum3, sum_bias = _with_step(sum0, sum1, sum2, sum3, sum_bias, sa, n0, x1, x2, x3)
        sb = _slope(g1, n1, n0, x1, x2, tap0, tap1, tap2, tap3, shift, WIDTH, SILU)
        _store(dx_rows, back2, dx_l, c_ok, _convolved(s2, s1, sa, sb, tap0, tap1, tap2, tap3, 0.0, WIDTH))
        sum0, sum1, sum2, sum3, sum_bias = _with_step(sum0, sum1, sum2, sum3, sum_bias, sb, n1, n0, x1, x2)
        sc = _slope(g2, n2, n1, n0, x1, tap0, tap1, tap2, tap3, shift, WIDTH, SILU)
        _store(dx_rows, back1, dx_l, c_ok, _convolved(s1, sa, sb, sc, tap0, tap1, tap2, tap3, 0.0, WIDTH))
        sum0, sum1, sum2, sum3, sum_bias = _with_step(sum0, sum1, sum2, sum3, sum_bias, sc, n2, n1, n0, x1)
        sd = _slope(g3, n3, n2, n1, n0, tap0, tap1, tap2, tap3, shift, WIDTH, SILU)
        _store(dx_rows, at0, dx_l, c_ok, _convolved(sa, sb, sc, sd, tap0, tap1, tap2, tap3, 0.0, WIDTH))
        sum0, sum1, sum2, sum3, sum_bias = _with_step(sum0, sum1, sum2, sum3, sum_bias, sd, n3, n2, n1, n0)
        x1, x2, x3 = n3, n2, n1
        s1, s2, s3 = sd, sc, sb

    # Three steps of the next segment; where there is none, they are zeros.
    beyond = tl.where(end == start + steps, tl.minimum(end + 3, length), 0)
    token0, token1, token2, _ = _tokens(path, start + steps, beyond, length)
    n0 = _load(x_rows, token0, x_l, c_ok).to(tl.float32)
    n1 = _load(x_rows, token1, x_l, c_ok).to(tl.float32)
    n2 = _load(x_rows, token2, x_l, c_ok).to(tl.float32)
    g0 = _load(dy_rows, token0, dy_l, c_ok).to(tl.float32)
    g1 = _load(dy_rows, token1, dy_l, c_ok).to(tl.float32)
    g2 = _load(dy_rows, token2, dy_l, c_ok).to(tl.float32)
    sa = _slope(g0, n0, x1, x2, x3, tap0, tap1, tap2, tap3, shift, WIDTH, SILU)
    _store(dx_rows, at1, dx_l, c_ok, _convolved(s3, s2, s1, sa, tap0, tap1, tap2, tap3, 0.0, WIDTH))
    sb = _slope(g1, n1, n0, x1, x2, tap0, tap1, tap2, tap3, shift, WIDTH, SILU)
    _store(dx_rows, at2, dx_l, c_ok, _convolved(s2, s1, sa, sb, tap0, tap1, tap2, tap3, 0.0, WIDTH))
    sc = _slope(g2, n2, n1, n0, x1, tap0, tap1, tap2, tap3, shift, WIDTH, SILU)
    _store(dx_rows, at3, dx_l, c_ok, _convolved(s1, sa, sb, sc, tap0, tap1, tap2, tap3, 0.0, WIDTH))

    group = tl.program_id(0) // (tl.cdiv(dim, BLOCK) * num_paths)
    at = sums + (group.to(tl.int64) * num_paths + k) * (WIDTH + 1) * dim + c
    tl.store(at + (WIDTH - 1) * dim, tl.sum(sum0, axis=0), mask=c_ok)
    if WIDTH > 1:
        tl.store(at + (WIDTH - 2) * dim, tl.sum(sum1, axis=0), mask=c_ok)
    if WIDTH > 2:
        tl.store(at + (WIDTH - 3) * dim, tl.sum(sum2, axis=0), mask=c_ok)
    if WIDTH > 3:
        tl.store(at + (WIDTH - 4) * dim, tl.sum(sum3, axis=0), mask=c_ok)
    tl.store(at + WIDTH * dim, tl.sum(sum_bias, axis=0), mask=c_ok)


def _plan(x: Tensor, num_paths: int, config: _Config) -> tuple[dict[str, int], int]:
    walks = cdiv(x.shape[2], BLOCK) * num_paths
    wanted = multiprocessors(x.device) * config.programs
    steps = segment_steps(x.shape[0], x.shape[1], ROWS, walks, wanted, _UNROLLED)
    segments = x.shape[0] * cdiv(x.shape[1], steps)
    return {"segments": segments, "steps": steps}, cdiv(segments, ROWS)


def _arguments(x, weight, bias, paths, silu) -> dict:
    check_dtypes(x=x, weight=weight, bias=bias)
    if weight.shape[2] > MAX_WIDTH:
        raise RuntimeError(
            f"backend 'triton' convolves up to {MAX_WIDTH} tokens, but weight has a width of {weight.shape[2]}; "
            "use backend='reference'"
        )
    x, paths = dense(x), dense(paths)
    bias = None if bias is None else dense(bias)
    length, dim = x.shape[1:]
    # (K, width, D): with the channels last a thread loads its weights in wide words, as it does its tokens.
    shared = weight.stride(0) == 0
    weight = (weight[:1] if shared else weight).transpose(1, 2).contiguous()
    return {
        "x": x, "weight": weight, "bias": bias, "paths": paths,
        "length": length, "num_paths": paths.shape[0], "dim": dim, "x_b": x.stride(0), "x_l": x.stride(1),
        "w_k": 0 if shared else weight.stride(0),
        "bias_k": 0 if bias is None else bias.stride(0), "paths_k": paths.stride(0), "WIDTH": weight.shape[1],
        "ROWS": ROWS, "BLOCK": BLOCK, "ALIGN": alignment(dim, x.stride(0), x.stride(1)),
        "OFFSET": offset_type(length, paths.shape[0] * dim, x.stride(1)), "SILU": silu,
    }  # fmt: skip


def causal_conv1d_forward(x, weight, bias, paths, silu) -> Tensor:
    """(batch, L, D), (K, D, width), (K, D), (K, L) -> (batch, L, K, D)."""
    given = _arguments(x, weight, bias, paths, silu)
    y = x.new_empty(x.shape[0], x.shape[1], paths.shape[0], x.shape[2])
    if y.numel() > 0:
        segments, groups = _plan(x, len(paths), _FORWARD)
        programs = groups * len(paths) * cdiv(x.shape[2], BLOCK)
        with on_device(x):
            launch(_conv_forward_kernel, (programs,), given | segments | {"y": y}, 4, _FORWARD.registers)
    return y


def causal_conv1d_backward(dy, x, weight, bias, paths, silu, beside=None):
    """Gradients of x, weight and bias (None without a bias); that of x with ``beside`` (batch, L, D) behind it."""
    given = _arguments(x, weight, bias, paths, silu)
    check_dtypes(dy=dy)
    dy = dense(dy)
    num_paths, dim, width = weight.shape
    by_path = new_by_path(x, *x.shape[:2], num_paths, dim, merge=True)
    segments, groups = _plan(x, num_paths, _BACKWARD) if dy.numel() > 0 else ({}, 0)
    sums = x.new_empty(groups, num_paths, width + 1, dim, dtype=torch.float32)
    given |= {
        "dy": dy, "dx": by_path, "sums": sums,
        "dy_b": dy.stride(0), "dy_l": dy.stride(1), "dy_k": dy.stride(2),
        "dx_b": by_path.stride(0), "dx_l": by_path.stride(1), "dx_k": by_path.stride(2),
        "ALIGN": alignment(given["ALIGN"], *dy.stride()[:-1]),
        "OFFSET": offset_type(given["length"], num_paths * dim, x.stride(1), dy.stride(1)),
    }  # fmt: skip
    if dy.numel() > 0:
        programs = groups * num_paths * cdiv(dim, BLOCK)
        with on_device(x):
            launch(_conv_backward_kernel, (programs,), given | segments, 4, _BACKWARD.registers)
    sums = sum_of_parts(sums)
    dweight = sums[:, :width].transpose(1, 2).contiguous().to(weight.dtype)
    dx = sum_of_paths(by_path) if beside is None else sum_beside(by_path, beside)
    return dx, dweight, sums[:, width].to(bias.dtype) if bias is not None else None
