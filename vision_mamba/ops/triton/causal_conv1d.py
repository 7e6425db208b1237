"""Depthwise causal convolution along scan paths in Triton; a program is a tile of tokens and channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import OPTIONS, alignment, check_dtypes, dense, load_rows, on_device, sigmoid, store_rows, visited

STEPS = 32  # tokens a program
BLOCK = 64  # channels a program

_VARYING = ("batch", "length", "num_paths", "x_b", "x_l", "dy_b", "dy_l", "dy_k", "w_k", "bias_k", "paths_k")


@triton.jit(do_not_specialize=[name for name in _VARYING if name not in ("batch", "dy_b", "dy_l", "dy_k")])
def _forward_kernel(
    x, weight, bias, paths, y, length, num_paths, dim, x_b, x_l, w_k, w_d, w_w, bias_k, paths_k,
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
        weights = tl.load(weight + k * w_k + c * w_d + w * w_w, mask=c_ok, other=0.0).to(tl.float32)
        out += weights[None, :] * load_rows(x_rows, token, x_l, c, c_ok).to(tl.float32)
    if SILU:
        out = out * sigmoid(out)
    store_rows(y + image * length * y_l + k * dim, visited(path, t, length, length), y_l, c, c_ok, out)


@triton.jit(do_not_specialize=_VARYING)
def _backward_kernel(
    dy, x, weight, bias, paths, steps, dx, dweight, dbias,
    batch, length, num_paths, dim, x_b, x_l, dy_b, dy_l, dy_k, w_k, w_d, w_w, bias_k, paths_k,
    WIDTH: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Tiles of tokens in raster order: a token's gradient is a sum over the paths, in one program's registers.

    ``steps`` (K, L) is the inverse of ``paths``: when each path visits a token.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(dim, BLOCK)
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    c_ok = c < dim
    pid = pid // blocks
    tiles = tl.cdiv(length, T)
    here = pid % tiles * T + tl.arange(0, T)
    image = (pid // tiles).to(tl.int64)
    token_here = tl.where(here < length, here, -1)
    x_l = tl.multiple_of(x_l.to(tl.int64), ALIGN)
    dy_l = tl.multiple_of(dy_l.to(tl.int64), ALIGN)
    x_rows = x + tl.multiple_of(image * x_b, ALIGN)

    grad_x = tl.zeros([T, BLOCK], tl.float32)
    for path_index in range(num_paths):
        k = tl.cast(path_index, tl.int64)
        dy_rows = dy + tl.multiple_of(image * dy_b + k * dy_k, ALIGN)
        path = paths + k * paths_k
        t = tl.load(steps + k * length + here, mask=here < length, other=-WIDTH)
        part = (pid.to(tl.int64) * num_paths + k) * dim
        shift = tl.zeros([BLOCK], tl.float32)
        if bias is not None:
            shift = tl.load(bias + k * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)
        for ahead in tl.static_range(WIDTH):
            # The output `ahead` steps later reads this token through the weight that lies `ahead` before the last.
            token = visited(path, tl.where(here < length, t + ahead, -1), length, length)
            grad = load_rows(dy_rows, token, dy_l, c, c_ok).to(tl.float32)
            if SILU:
                out = tl.zeros([T, BLOCK], tl.float32) + shift[None, :]
                for w in tl.static_range(WIDTH):
                    source = visited(path, t + (ahead - (WIDTH - 1 - w)), length, length)
                    weights = tl.load(weight + k * w_k + c * w_d + w * w_w, mask=c_ok, other=0.0).to(tl.float32)
                    out += weights[None, :] * load_rows(x_rows, source, x_l, c, c_ok).to(tl.float32)
                sig = sigmoid(out)
                grad = grad * sig * (1.0 + out * (1.0 - sig))
            last = tl.load(weight + k * w_k + c * w_d + (WIDTH - 1 - ahead) * w_w, mask=c_ok, other=0.0)
            grad_x += grad * last.to(tl.float32)[None, :]
            if ahead == 0:
                if bias is not None:
                    tl.store(dbias + part + c, tl.sum(grad, axis=0), mask=c_ok)
                for w in tl.static_range(WIDTH):
                    source = visited(path, t - (WIDTH - 1 - w), length, length)
                    read = load_rows(x_rows, source, x_l, c, c_ok).to(tl.float32)
                    tl.store(dweight + part * WIDTH + w * dim + c, tl.sum(grad * read, axis=0), mask=c_ok)
    store_rows(dx + image * length * dim, token_here, dim, c, c_ok, grad_x)


def _inverse(paths: Tensor) -> Tensor:
    order = torch.arange(paths.shape[1], dtype=torch.int32, device=paths.device).expand_as(paths)
    return torch.empty_like(order, memory_format=torch.contiguous_format).scatter_(1, paths.long(), order)


def _arguments(x, weight, bias, paths, silu) -> tuple[dict, int]:
    check_dtypes(x=x, weight=weight, bias=bias)
    x, paths = dense(x), dense(paths)
    bias = None if bias is None else dense(bias)
    batch, length, dim = x.shape
    given = {
        "x": x, "weight": weight, "bias": bias, "paths": paths,
        "length": length, "num_paths": paths.shape[0], "dim": dim, "x_b": x.stride(0), "x_l": x.stride(1),
        "w_k": weight.stride(0), "w_d": weight.stride(1), "w_w": weight.stride(2),
        "bias_k": 0 if bias is None else bias.stride(0), "paths_k": paths.stride(0), "WIDTH": weight.shape[2],
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
            _forward_kernel[(programs,)](**given, y=y, num_warps=4, **OPTIONS)
    return y


def causal_conv1d_backward(dy, x, weight, bias, paths, silu):
    """Gradients of x, weight and bias (None without a bias)."""
    given, tiles = _arguments(x, weight, bias, paths, silu)
    check_dtypes(dy=dy)
    dy = dense(dy)
    num_paths, dim, width = weight.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = x.new_empty(tiles, num_paths, width, dim, dtype=torch.float32)
    dbias = None if bias is None else x.new_empty(tiles, num_paths, dim, dtype=torch.float32)
    given |= {
        "dy": dy, "steps": _inverse(paths), "dx": dx, "dweight": dweight, "dbias": dbias, "batch": x.shape[0],
        "dy_b": dy.stride(0), "dy_l": dy.stride(1), "dy_k": dy.stride(2),
        "ALIGN": alignment(given["ALIGN"], *dy.stride()[:-1]),
    }  # fmt: skip
    programs = tiles * triton.cdiv(dim, BLOCK)
    if programs > 0:
        with on_device(x):
            _backward_kernel[(programs,)](**given, num_warps=4, **OPTIONS)
    return (
        dx,
        dweight.sum(0).transpose(1, 2).contiguous().to(weight.dtype),
        dbias.sum(0).to(bias.dtype) if dbias is not None else None,
    )
