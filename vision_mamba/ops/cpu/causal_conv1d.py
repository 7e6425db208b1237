"""Depthwise causal convolution along scan paths on the CPU; a task is one image and one path."""

from __future__ import annotations

import numba
import numpy as np
import torch

from .runtime import ANY, KERNEL, ZEROS, address, check_paths, dense, memory, on_team, run_tasks, sigmoid


@numba.njit(**KERNEL)
def _start(k, w, shift, weight, weight_by, bias, bias_by, has_bias):
    """A path's taps [width, D], oldest first, and bias; zeros where there is none."""
    width, dim = w.shape
    for tap in range(width):
        w_row = w[tap]
        for i in range(dim):
            w_row[i] = weight[k * weight_by[0] + i * weight_by[1] + tap * weight_by[2]]
    for i in range(dim):
        shift[i] = bias[k * bias_by[0] + i] if has_bias else w.dtype.type(0)


@numba.njit(**KERNEL)
def _convolve(row, x, x_by, image, k, t, w, shift, paths):
    """row[d] = shift[d] + sum over taps of w[tap, d] * x[token (t - width + 1 + tap) of the path, d]."""
    width, dim = w.shape
    oldest = max(0, width - 1 - t)
    first = image * x_by[0] + paths[k, t] * x_by[1]
    x_row, w_row = x[first : first + dim], w[width - 1]
    for i in range(dim):
        row[i] = shift[i] + w_row[i] * x_row[i]
    # Two taps a pass over the row, and the odd one.
    for tap in range(width - 2, oldest, -2):
        first = image * x_by[0] + paths[k, t - width + 1 + tap] * x_by[1]
        x_row, w_row = x[first : first + dim], w[tap]
        first = image * x_by[0] + paths[k, t - width + tap] * x_by[1]
        x_older, w_older = x[first : first + dim], w[tap - 1]
        for i in range(dim):
            row[i] += w_row[i] * x_row[i] + w_older[i] * x_older[i]
    if (width - 1 - oldest) % 2:
        first = image * x_by[0] + paths[k, t - width + 1 + oldest] * x_by[1]
        x_row, w_row = x[first : first + dim], w[oldest]
        for i in range(dim):
            row[i] += w_row[i] * x_row[i]


@numba.njit(**KERNEL)
def _forward(openmp, threads, start, stop, args):
    if threads > 1:
        on_team(openmp, threads, start, stop, args)
        return
    zero, sizes, at, x_by, weight_by, bias_by, silu, y_at = args
    batch, length, num_paths, dim, width = sizes
    x_at, weight_at, bias_at, paths_at = at
    x, weight, bias = memory(x_at, zero, ANY), memory(weight_at, zero, ANY), memory(bias_at, zero, ANY)
    paths = memory(paths_at, np.int32(0), (num_paths, length))
    y = memory(y_at, zero, (batch, length, num_paths, dim))
    row, shift, w = np.empty(dim, x.dtype), np.empty(dim, x.dtype), np.empty((width, dim), x.dtype)
    for task in range(start, stop):
        image, k = divmod(task, num_paths)
        _start(k, w, shift, weight, weight_by, bias, bias_by, bias_at != 0)
        for t in range(length):
            _convolve(row, x, x_by, image, k, t, w, shift, paths)
            y_row = y[image, paths[k, t], k]
            if silu:
                for i in range(dim):
                    y_row[i] = row[i] * sigmoid(row[i])
            else:
                for i in range(dim):
                    y_row[i] = row[i]


@numba.njit(**KERNEL)
def _backward(openmp, threads, start, stop, args):
    if threads > 1:
        on_team(openmp, threads, start, stop, args)
        return
    zero, sizes, at, x_by, weight_by, bias_by, silu, dy_at, dy_by, dx_at, dweight_at, dbias_at = args
    batch, length, num_paths, dim, width = sizes
    x_at, weight_at, bias_at, paths_at = at
    x, weight, bias = memory(x_at, zero, ANY), memory(weight_at, zero, ANY), memory(bias_at, zero, ANY)
    paths, dy = memory(paths_at, np.int32(0), (num_paths, length)), memory(dy_at, zero, ANY)
    dx, dweight = memory(dx_at, zero, (batch, length, dim)), memory(dweight_at, zero, (batch, num_paths, width, dim))
    dbias = memory(dbias_at, zero, (batch, num_paths, dim))
    row, shift, w = np.empty(dim, x.dtype), np.empty(dim, x.dtype), np.empty((width, dim), x.dtype)
    one = x.dtype.type(1)
    for image in range(start, stop):
        for k in range(num_paths):
            _start(k, w, shift, weight, weight_by, bias, bias_by, bias_at != 0)
            for t in range(length):
                first = image * dy_by[0] + paths[k, t] * dy_by[1] + k * dy_by[2]
                dy_row = dy[first : first + dim]
                if silu:
                    _convolve(row, x, x_by, image, k, t, w, shift, paths)
                    for i in range(dim):
                        sig = sigmoid(row[i])
                        row[i] = dy_row[i] * sig * (one + row[i] * (one - sig))
                else:
                    for i in range(dim):
                        row[i] = dy_row[i]
                if dbias_at:
                    dbias_row = dbias[image, k]
                    for i in range(dim):
                        dbias_row[i] += row[i]
                for tap in range(max(0, width - 1 - t), width):
                    token = paths[k, t - width + 1 + tap]
                    first = image * x_by[0] + token * x_by[1]
                    x_row = x[first : first + dim]
                    w_row, dw_row, dx_row = w[tap], dweight[image, k, tap], dx[image, token]
                    for i in range(dim):
                        dw_row[i] += row[i] * x_row[i]
                    for i in range(dim):
                        dx_row[i] += row[i] * w_row[i]


def _arguments(x, weight, bias, paths):
    """The dtype of the computation, what both kernels take, and the tensors whose addresses are in it."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, weight = dense(x, dtype), weight if weight.dtype == dtype else weight.to(dtype)
    bias, paths = None if bias is None else dense(bias, dtype), check_paths(paths)
    tensors = (x, weight, bias, paths)
    sizes = (*x.shape[:2], *weight.shape)
    addresses = tuple([address(tensor) for tensor in tensors])
    strides = x.stride(), weight.stride(), (0, 0) if bias is None else bias.stride()
    return dtype, (ZEROS[dtype], sizes, addresses, *strides), tensors


def causal_conv1d_forward(x, weight, bias, paths, silu) -> torch.Tensor:
    """(batch, L, D), (K, D, width), (K, D), (K, L) -> (batch, L, K, D)."""
    dtype, arguments, _tensors = _arguments(x, weight, bias, paths)
    y = torch.empty(x.shape[0], x.shape[1], weight.shape[0], x.shape[2], dtype=dtype)
    run_tasks(_forward, x.shape[0] * paths.shape[0], 1.0 * y.numel(), *arguments, silu, address(y))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def causal_conv1d_backward(dy, x, weight, bias, paths, silu):
    """Gradients of x, weight and bias (None without a bias)."""
    dtype, arguments, _tensors = _arguments(x, weight, bias, paths)
    dy = dense(dy, dtype)
    num_paths, dim, width = weight.shape
    dx = torch.zeros(x.shape, dtype=dtype)
    dweight = torch.zeros(x.shape[0], num_paths, width, dim, dtype=dtype)
    dbias = None if bias is None else torch.zeros(x.shape[0], num_paths, dim, dtype=dtype)
    run_tasks(
        _backward, x.shape[0], 1.7 * dy.numel(), *arguments, silu, address(dy), dy.stride(), address(dx),
        address(dweight), address(dbias),
    )  # fmt: skip
    return (
        dx.to(x.dtype),
        dweight.sum(0).transpose(1, 2).to(weight.dtype),
        dbias.sum(0).to(bias.dtype) if dbias is not None else None,
    )
