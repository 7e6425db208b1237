"""Depthwise causal convolution along scan paths in Triton; a program is a tile of tokens and channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import (
    alignment,
    check_dtypes,
    dense,
    jit_without,
    launch,
    load_rows,
    multiprocessors,
    offset_type,
    on_device,
    sigmoid,
    store_rows,
    visited,
)

BLOCK = 64  # channels a program
MAX_WIDTH = 4


class _Config(NamedTuple):
    steps: int  # tokens a program's tile
    programs: int  # a multiprocessor; in the backward pass each adds a row to the sums over tokens
    registers: int | None = None  # a thread, at most: sums, weights and four readings would take more


_FORWARD = _Config(32, 10)
_BACKWARD = _Config(16, 4, registers=128)
_INPUT_STEPS = 32  # of the gradient of x: a program a tile

_jit = jit_without(("tiles", "length", "num_paths", "x_b", "x_l", "dy_b", "dy_l", "dy_k", "w_k", "bias_k", "paths_k"))


@triton.jit
def _place(dim, num_paths, BLOCK: tl.constexpr):
    """channels, which of them exist, path, first tile and number of programs that share out the tiles of a path."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(dim, BLOCK)
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    pid = pid // blocks
    walkers = tl.num_programs(0) // (blocks * num_paths)
    return c, c < dim, (pid % num_paths).to(tl.int64), pid // num_paths, walkers


@triton.jit
def _tap(weight, k, w_k, ahead: tl.constexpr, dim, c, c_ok, WIDTH: tl.constexpr):
    """The weights by which a token enters the output `ahead` steps later; zeros beyond the width."""
    at = k * w_k + (WIDTH - 1 - ahead) * dim + c
    return tl.load(weight + at, mask=c_ok & (ahead < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def _earlier(x_rows, path, t, ahead: tl.constexpr, length, x_l, c, c_ok):
    """The tokens that a path visits `ahead` steps before t."""
    return load_rows(x_rows, visited(path, t - ahead, length, length), x_l, c, c_ok).to(tl.float32)


@_jit
def _conv_forward_kernel(
    x, weight, bias, paths, y, tiles, length, num_paths, dim, x_b, x_l, w_k, bias_k, paths_k,
    WIDTH: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """A program walks every so many tiles of one path: to load the weights takes as long as half a tile."""
    c, c_ok, k, first, walkers = _place(dim, num_paths, BLOCK)
    tiles_a_image = tl.cdiv(length, T)
    x_l = (x_l // ALIGN).to(OFFSET) * ALIGN
    y_l = tl.cast(num_paths * dim, OFFSET)
    path = paths + k * paths_k
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)
    tap0 = _tap(weight, k, w_k, 0, dim, c, c_ok, WIDTH)
    tap1 = _tap(weight, k, w_k, 1, dim, c, c_ok, WIDTH)
    tap2 = _tap(weight, k, w_k, 2, dim, c, c_ok, WIDTH)
    tap3 = _tap(weight, k, w_k, 3, dim, c, c_ok, WIDTH)
    for tile in range(first, tiles, walkers):
        t = tile % tiles_a_image * T + tl.arange(0, T)
        image = (tile // tiles_a_image).to(tl.int64)
        x_rows = x + tl.multiple_of(image * x_b, ALIGN)
        token = visited(path, t, length, length)
        out = shift[None, :] + tap0[None, :] * load_rows(x_rows, token, x_l, c, c_ok).to(tl.float32)
        if WIDTH > 1:
            out += tap1[None, :] * _earlier(x_rows, path, t, 1, length, x_l, c, c_ok)
        if WIDTH > 2:
            out += tap2[None, :] * _earlier(x_rows, path, t, 2, length, x_l, c, c_ok)
        if WIDTH > 3:
            out += tap3[None, :] * _earlier(x_rows, path, t, 3, length, x_l, c, c_ok)
        if SILU:
            out = out * sigmoid(out)
        store_rows(y + image * length * num_paths * dim + k * dim, token, y_l, c, c_ok, out)


@_jit
def _conv_backward_kernel(
    dy, x, weight, bias, paths, slope, steps, sums,
    tiles, length, num_paths, dim, x_b, x_l, dy_b, dy_l, dy_k, w_k, bias_k, paths_k,
    WIDTH: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Gradient before the activation, ``slope`` (K, batch, L, D) in the path's order, and its sums for the weights.

    A program walks every so many tiles of one path, and keeps the sums of all its tiles in registers: those of the
    taps, in the order of ``weight``, and in the last row that of the bias. Along the first image it writes down when
    the path visits each token: ``steps`` (K, L), the inverse of ``paths``.
    """
    c, c_ok, k, first, walkers = _place(dim, num_paths, BLOCK)
    tiles_a_image = tl.cdiv(length, T)
    batch = tiles // tiles_a_image
    x_l = (x_l // ALIGN).to(OFFSET) * ALIGN
    dy_l = (dy_l // ALIGN).to(OFFSET) * ALIGN
    path = paths + k * paths_k
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)
    tap0 = _tap(weight, k, w_k, 0, dim, c, c_ok, WIDTH)
    tap1 = _tap(weight, k, w_k, 1, dim, c, c_ok, WIDTH)
    tap2 = _tap(weight, k, w_k, 2, dim, c, c_ok, WIDTH)
    tap3 = _tap(weight, k, w_k, 3, dim, c, c_ok, WIDTH)
    sum0 = tl.zeros([T, BLOCK], tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    sum_bias = sum0
    for tile in range(first, tiles, walkers):
        t = tile % tiles_a_image * T + tl.arange(0, T)
        image = (tile // tiles_a_image).to(tl.int64)
        x_rows = x + tl.multiple_of(image * x_b, ALIGN)
        dy_rows = dy + tl.multiple_of(image * dy_b + k * dy_k, ALIGN)
        token = visited(path, t, length, length)
        grad = load_rows(dy_rows, token, dy_l, c, c_ok).to(tl.float32)
        read0 = load_rows(x_rows, token, x_l, c, c_ok).to(tl.float32)
        out = shift[None, :] + tap0[None, :] * read0
        if WIDTH > 1:
            read1 = _earlier(x_rows, path, t, 1, length, x_l, c, c_ok)
            out += tap1[None, :] * read1
        if WIDTH > 2:
            read2 = _earlier(x_rows, path, t, 2, length, x_l, c, c_ok)
            out += tap2[None, :] * read2
        if WIDTH > 3:
            read3 = _earlier(x_rows, path, t, 3, length, x_l, c, c_ok)
            out += tap3[None, :] * read3
        if SILU:
            sig = sigmoid(out)
            grad = grad * sig * (1.0 + out * (1.0 - sig))
        tl.store(steps + k * length + token, t, mask=tl.where(image == 0, token, -1) >= 0)
        step = tl.where(t < length, t, -1)
        store_rows(slope + (k * batch + image) * length * dim, step, tl.cast(dim, OFFSET), c, c_ok, grad)
        sum_bias += grad
        sum0 += grad * read0
        if WIDTH > 1:
            sum1 += grad * read1
        if WIDTH > 2:
            sum2 += grad * read2
        if WIDTH > 3:
            sum3 += grad * read3
    at = sums + (first.to(tl.int64) * num_paths + k) * (WIDTH + 1) * dim + c
    tl.store(at + (WIDTH - 1) * dim, tl.sum(sum0, axis=0), mask=c_ok)
    if WIDTH > 1:
        tl.store(at + (WIDTH - 2) * dim, tl.sum(sum1, axis=0), mask=c_ok)
    if WIDTH > 2:
        tl.store(at + (WIDTH - 3) * dim, tl.sum(sum2, axis=0), mask=c_ok)
    if WIDTH > 3:
        tl.store(at + (WIDTH - 4) * dim, tl.sum(sum3, axis=0), mask=c_ok)
    tl.store(at + WIDTH * dim, tl.sum(sum_bias, axis=0), mask=c_ok)


@_jit
def _conv_input_kernel(
    slope, weight, steps, dx, tiles, length, num_paths, dim, w_k,
    WIDTH: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Tiles of tokens in raster order: a token's gradient is a sum over the paths, in one program's registers."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(dim, BLOCK)
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    c_ok = c < dim
    pid = pid // blocks
    tiles_a_image = tl.cdiv(length, T)
    batch = tiles // tiles_a_image
    token = pid % tiles_a_image * T + tl.arange(0, T)
    image = (pid // tiles_a_image).to(tl.int64)
    grad = tl.zeros([T, BLOCK], tl.float32)
    for path_index in range(num_paths):
        k = tl.cast(path_index, tl.int64)
        rows = slope + (k * batch + image) * length * dim
        t = tl.load(steps + k * length + token, mask=token < length, other=length)
        for ahead in tl.static_range(WIDTH):
            tap = _tap(weight, k, w_k, ahead, dim, c, c_ok, WIDTH)
            step = tl.where(t + ahead < length, t + ahead, -1)
            grad += tap[None, :] * load_rows(rows, step, tl.cast(dim, OFFSET), c, c_ok).to(tl.float32)
    token = tl.where(token < length, token, -1)
    store_rows(dx + image * length * dim, token, tl.cast(dim, OFFSET), c, c_ok, grad)


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
        "BLOCK": BLOCK, "ALIGN": alignment(dim, x.stride(0), x.stride(1)),
        "OFFSET": offset_type(length, paths.shape[0] * dim, x.stride(1)), "SILU": silu,
    }  # fmt: skip


def _tiles(x: Tensor, steps: int) -> dict[str, int]:
    return {"T": steps, "tiles": x.shape[0] * triton.cdiv(x.shape[1], steps)}


def _walkers(x: Tensor, num_paths: int, config: _Config) -> int:
    """How many programs share out the tiles of a path and a block of channels."""
    parts = triton.cdiv(x.shape[2], BLOCK) * num_paths
    return min(_tiles(x, config.steps)["tiles"], triton.cdiv(multiprocessors(x.device) * config.programs, parts))


def causal_conv1d_forward(x, weight, bias, paths, silu) -> Tensor:
    """(batch, L, D), (K, D, width), (K, D), (K, L) -> (batch, L, K, D)."""
    given = _arguments(x, weight, bias, paths, silu)
    y = x.new_empty(x.shape[0], x.shape[1], paths.shape[0], x.shape[2])
    if y.numel() > 0:
        programs = _walkers(x, len(paths), _FORWARD) * len(paths) * triton.cdiv(x.shape[2], BLOCK)
        with on_device(x):
            launch(_conv_forward_kernel, (programs,), given | _tiles(x, _FORWARD.steps) | {"y": y}, 4)
    return y


def causal_conv1d_backward(dy, x, weight, bias, paths, silu):
    """Gradients of x, weight and bias (None without a bias)."""
    given = _arguments(x, weight, bias, paths, silu)
    check_dtypes(dy=dy)
    dy = dense(dy)
    num_paths, dim, width = weight.shape
    blocks = triton.cdiv(dim, BLOCK)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    slope = x.new_empty(num_paths, *x.shape)
    steps = torch.empty_like(paths, memory_format=torch.contiguous_format)
    walkers = _walkers(x, num_paths, _BACKWARD) if dy.numel() > 0 else 0
    # One sum a program, added up afterwards in a fixed order: equal bits every time, which atomics would not give.
    sums = x.new_empty(walkers, num_paths, width + 1, dim, dtype=torch.float32)
    given |= {
        "dy": dy, "slope": slope, "steps": steps, "sums": sums, "dx": dx,
        "dy_b": dy.stride(0), "dy_l": dy.stride(1), "dy_k": dy.stride(2),
        "ALIGN": alignment(given["ALIGN"], *dy.stride()[:-1]),
        "OFFSET": offset_type(given["length"], num_paths * dim, x.stride(1), dy.stride(1)),
    }  # fmt: skip
    if dy.numel() > 0:
        with on_device(x):
            programs = walkers * num_paths * blocks
            launch(_conv_backward_kernel, (programs,), given | _tiles(x, _BACKWARD.steps), 4, _BACKWARD.registers)
            given |= _tiles(x, _INPUT_STEPS)
            launch(_conv_input_kernel, (given["tiles"] * blocks,), given, 4)
    sums = sums.sum(0)
    dweight = sums[:, :width].transpose(1, 2).contiguous().to(weight.dtype)
    return dx, dweight, sums[:, width].to(bias.dtype) if bias is not None else None
