"""Depthwise causal convolution along scan paths in Triton; a program is a tile of tokens and channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import (
    OPTIONS,
    alignment,
    check_dtypes,
    dense,
    jit_without,
    load_rows,
    multiprocessors,
    on_device,
    sigmoid,
    store_rows,
    visited,
)

STEPS = 32  # tokens a program's tile
BLOCK = 64  # channels a program
MAX_WIDTH = 4
_PROGRAMS = 6  # a multiprocessor, where a program walks several tiles: each adds one row to the sums over tokens

_jit = jit_without(("tiles", "length", "num_paths", "x_b", "x_l", "dy_b", "dy_l", "dy_k", "w_k", "bias_k", "paths_k"))


@_jit
def _conv_forward_kernel(
    x, weight, bias, paths, y, length, num_paths, dim, x_b, x_l, w_k, bias_k, paths_k,
    WIDTH: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = tl.cdiv(dim, BLOCK)
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    c_ok = c < dim
    pid = pid // blocks
    k = (pid % num_paths).to(tl.int64)
    pid = pid // num_paths
    tiles = tl.cdiv(length, T)
    t = pid % tiles * T + tl.arange(0, T)
    image = (pid // tiles).to(tl.int64)
    x_l = tl.multiple_of(x_l.to(tl.int64), ALIGN)
    x_rows = x + tl.multiple_of(image * x_b, ALIGN)
    y_l = num_paths.to(tl.int64) * dim
    path = paths + k * paths_k

    out = tl.zeros([T, BLOCK], tl.float32)
    if bias is not None:
        out += tl.load(bias + k * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(WIDTH):
        token = visited(path, t - (WIDTH - 1 - w), length, length)
        weights = tl.load(weight + k * w_k + w * dim + c, mask=c_ok, other=0.0).to(tl.float32)
        out += weights[None, :] * load_rows(x_rows, token, x_l, c, c_ok).to(tl.float32)
    if SILU:
        out = out * sigmoid(out)
    store_rows(y + image * length * y_l + k * dim, visited(path, t, length, length), y_l, c, c_ok, out)


@_jit
def _conv_backward_kernel(
    dy, x, weight, bias, paths, slope, dweight, dbias,
    tiles, length, num_paths, dim, x_b, x_l, dy_b, dy_l, dy_k, w_k, bias_k, paths_k,
    WIDTH: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradient before the activation, ``slope`` (K, batch, L, D) in the path's order, and its sums for the weights.

    A program walks every so many tiles of one path, and keeps the sums of all its tiles in registers.
    """
    blocks = tl.cdiv(dim, BLOCK)
    pid = tl.program_id(0)
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    c_ok = c < dim
    pid = pid // blocks
    k = (pid % num_paths).to(tl.int64)
    first = pid // num_paths
    walkers = tl.num_programs(0) // (blocks * num_paths)
    tiles_a_image = tl.cdiv(length, T)
    batch = tiles // tiles_a_image
    x_l = tl.multiple_of(x_l.to(tl.int64), ALIGN)
    dy_l = tl.multiple_of(dy_l.to(tl.int64), ALIGN)
    path = paths + k * paths_k
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)
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
        grad = load_rows(dy_rows, visited(path, t, length, length), dy_l, c, c_ok).to(tl.float32)
        out = tl.zeros([T, BLOCK], tl.float32) + shift[None, :]
        for w in tl.static_range(WIDTH):
            source = visited(path, t - (WIDTH - 1 - w), length, length)
            read = load_rows(x_rows, source, x_l, c, c_ok).to(tl.float32)
            if SILU:
                weights = tl.load(weight + k * w_k + w * dim + c, mask=c_ok, other=0.0).to(tl.float32)
                out += weights[None, :] * read
            if w == 0:
                read0 = read
            elif w == 1:
                read1 = read
            elif w == 2:
                read2 = read
            else:
                read3 = read
        if SILU:
            sig = sigmoid(out)
            grad = grad * sig * (1.0 + out * (1.0 - sig))
        step = tl.where(t < length, t, -1)
        store_rows(slope + (k * batch + image) * length * dim, step, tl.cast(dim, tl.int64), c, c_ok, grad)
        sum_bias += grad
        sum0 += grad * read0
        if WIDTH > 1:
            sum1 += grad * read1
        if WIDTH > 2:
            sum2 += grad * read2
        if WIDTH > 3:
            sum3 += grad * read3
    part = (first.to(tl.int64) * num_paths + k) * dim
    if bias is not None:
        tl.store(dbias + part + c, tl.sum(sum_bias, axis=0), mask=c_ok)
    at = dweight + part * WIDTH + c
    tl.store(at, tl.sum(sum0, axis=0), mask=c_ok)
    if WIDTH > 1:
        tl.store(at + dim, tl.sum(sum1, axis=0), mask=c_ok)
    if WIDTH > 2:
        tl.store(at + 2 * dim, tl.sum(sum2, axis=0), mask=c_ok)
    if WIDTH > 3:
        tl.store(at + 3 * dim, tl.sum(sum3, axis=0), mask=c_ok)


@_jit
def _conv_input_kernel(
    slope, weight, steps, dx, tiles, length, num_paths, dim, w_k,
    WIDTH: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of tokens in raster order: a token's gradient is a sum over the paths, in one program's registers.

    ``steps`` (K, L) is the inverse of ``paths``: when each path visits a token.
    """
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
            # The output `ahead` steps later reads this token through the weight that lies `ahead` before the last.
            at = k * w_k + (WIDTH - 1 - ahead) * dim + c
            weights = tl.load(weight + at, mask=c_ok, other=0.0).to(tl.float32)
            step = tl.where(t + ahead < length, t + ahead, -1)
            grad += weights[None, :] * load_rows(rows, step, tl.cast(dim, tl.int64), c, c_ok).to(tl.float32)
    token = tl.where(token < length, token, -1)
    store_rows(dx + image * length * dim, token, tl.cast(dim, tl.int64), c, c_ok, grad)


def _inverse(paths: Tensor) -> Tensor:
    order = torch.arange(paths.shape[1], dtype=torch.int32, device=paths.device).expand_as(paths)
    return torch.empty_like(order, memory_format=torch.contiguous_format).scatter_(1, paths.long(), order)


def _arguments(x, weight, bias, paths, silu) -> tuple[dict, int]:
    check_dtypes(x=x, weight=weight, bias=bias)
    if weight.shape[2] > MAX_WIDTH:
        raise RuntimeError(
            f"backend 'triton' convolves up to {MAX_WIDTH} tokens, but weight has a width of {weight.shape[2]}; "
            "use backend='reference'"
        )
    x, paths = dense(x), dense(paths)
    bias = None if bias is None else dense(bias)
    batch, length, dim = x.shape
    # (K, width, D): with the channels last a thread loads its weights in wide words, as it does its tokens.
    shared = weight.stride(0) == 0
    weight = (weight[:1] if shared else weight).transpose(1, 2).contiguous()
    given = {
        "x": x, "weight": weight, "bias": bias, "paths": paths,
        "length": length, "num_paths": paths.shape[0], "dim": dim, "x_b": x.stride(0), "x_l": x.stride(1),
        "w_k": 0 if shared else weight.stride(0),
        "bias_k": 0 if bias is None else bias.stride(0), "paths_k": paths.stride(0), "WIDTH": weight.shape[1],
        "T": STEPS, "BLOCK": BLOCK, "ALIGN": alignment(dim, x.stride(0), x.stride(1)), "SILU": silu,
    }  # fmt: skip
    return given, batch * triton.cdiv(length, STEPS)


def causal_conv1d_forward(x, weight, bias, paths, silu) -> Tensor:
    """(batch, L, D), (K, D, width), (K, D), (K, L) -> (batch, L, K, D)."""
    given, tiles = _arguments(x, weight, bias, paths, silu)
    y = x.new_empty(x.shape[0], x.shape[1], paths.shape[0], x.shape[2])
    programs = tiles * paths.shape[0] * triton.cdiv(x.shape[2], BLOCK)
    if programs > 0:
        with on_device(x):
            _conv_forward_kernel[(programs,)](**given, y=y, num_warps=4, **OPTIONS)
    return y


def causal_conv1d_backward(dy, x, weight, bias, paths, silu):
    """Gradients of x, weight and bias (None without a bias)."""
    given, tiles = _arguments(x, weight, bias, paths, silu)
    check_dtypes(dy=dy)
    dy = dense(dy)
    num_paths, dim, width = weight.shape
    blocks = triton.cdiv(dim, BLOCK)
    walkers = min(tiles, triton.cdiv(multiprocessors(x.device) * _PROGRAMS, blocks * num_paths))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    slope = x.new_empty(num_paths, *x.shape)
    # One sum a program, added up afterwards in a fixed order: equal bits every time, which atomics would not give.
    dweight = x.new_empty(walkers, num_paths, width, dim, dtype=torch.float32)
    dbias = None if bias is None else x.new_empty(walkers, num_paths, dim, dtype=torch.float32)
    sizes = {name: given[name] for name in ("weight", "length", "num_paths", "dim", "w_k", "WIDTH", "T", "BLOCK")}
    given |= {
        "dy": dy, "slope": slope, "dweight": dweight, "dbias": dbias, "tiles": tiles,
        "dy_b": dy.stride(0), "dy_l": dy.stride(1), "dy_k": dy.stride(2),
        "ALIGN": alignment(given["ALIGN"], *dy.stride()[:-1]),
    }  # fmt: skip
    if tiles * blocks > 0:
        with on_device(x):
            _conv_backward_kernel[(walkers * num_paths * blocks,)](**given, num_warps=8, **OPTIONS)
            _conv_input_kernel[(tiles * blocks,)](
                slope=slope, steps=_inverse(paths), dx=dx, tiles=tiles, **sizes, num_warps=4, **OPTIONS
            )
    return (
        dx,
        dweight.sum(0).transpose(1, 2).contiguous().to(weight.dtype),
        dbias.sum(0).to(bias.dtype) if dbias is not None else None,
    )
