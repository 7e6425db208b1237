"""Depthwise causal convolution along scan paths on the CPU; a task is one image and one path."""

from __future__ import annotations

import numba
import numpy as np
import torch

from .runtime import KERNEL, check_paths, flat, run_tasks, sigmoid


@numba.njit(**KERNEL)
def _convolve(row, x, xs, image, k, t, weight, bias, paths):
    """row[d] = bias[d] + sum_w weight[w, d] * x[token (t - width + 1 + w) of the path, d]."""
    width, dim = weight.shape[1], weight.shape[2]
    oldest = max(0, width - 1 - t)
    at = image * xs[0] + paths[k, t] * xs[1]
    x_row, w_row = x[at : at + dim], weight[k, width - 1]
    if bias.size:
        bias_row = bias[k]
        for i in range(dim):
            row[i] = bias_row[i] + w_row[i] * x_row[i]
    else:
        for i in range(dim):
            row[i] = w_row[i] * x_row[i]
    # Two taps a pass over the row, and the odd one.
    for w in range(width - 2, oldest, -2):
        at = image * xs[0] + paths[k, t - width + 1 + w] * xs[1]
        x_row, w_row = x[at : at + dim], weight[k, w]
        at = image * xs[0] + paths[k, t - width + w] * xs[1]
        x_older, w_older = x[at : at + dim], weight[k, w - 1]
        for i in range(dim):
            row[i] += w_row[i] * x_row[i] + w_older[i] * x_older[i]
    if (width - 1 - oldest) % 2:
        at = image * xs[0] + paths[k, t - width + 1 + oldest] * xs[1]
        x_row, w_row = x[at : at + dim], weight[k, oldest]
        for i in range(dim):
            row[i] += w_row[i] * x_row[i]


@numba.njit(**KERNEL)
def _forward(start, stop, x, xs, weight, bias, paths, silu, y):
    num_paths, length = paths.shape
    dim = weight.shape[2]
    row = np.empty(dim, weight.dtype)
    for task in range(start, stop):
        image, k = divmod(task, num_paths)
        for t in range(length):
            _convolve(row, x, xs, image, k, t, weight, bias, paths)
            y_row = y[image, paths[k, t], k]
            if silu:
                for i in range(dim):
                    y_row[i] = row[i] * sigmoid(row[i])
            else:
                for i in range(dim):
                    y_row[i] = row[i]


@numba.njit(**KERNEL)
def _backward(start, stop, x, xs, weight, bias, paths, silu, dy, dys, dx, dweight, dbias):
    num_paths, length = paths.shape
    width, dim = weight.shape[1], weight.shape[2]
    one = weight.dtype.type(1)
    row = np.empty(dim, weight.dtype)
    for image in range(start, stop):
        for k in range(num_paths):
            for t in range(length):
                at = image * dys[0] + paths[k, t] * dys[1] + k * dys[2]
                dy_row = dy[at : at + dim]
                if silu:
                    _convolve(row, x, xs, image, k, t, weight, bias, paths)
                    for i in range(dim):
                        sig = sigmoid(row[i])
                        row[i] = dy_row[i] * sig * (one + row[i] * (one - sig))
                else:
                    for i in range(dim):
                        row[i] = dy_row[i]
                if bias.size:
                    for i in range(dim):
                        dbias[image, k, i] += row[i]
                for w in range(max(0, width - 1 - t), width):
                    token = paths[k, t - width + 1 + w]
                    at = image * xs[0] + token * xs[1]
                    x_row = x[at : at + dim]
                    w_row, dw_row, dx_row = weight[k, w], dweight[image, k, w], dx[image, token]
                    for i in range(dim):
                        dw_row[i] += row[i] * x_row[i]
                    for i in range(dim):
                        dx_row[i] += row[i] * w_row[i]


def _prepare(x, weight, bias):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    array, strides = flat(x.to(dtype))
    weight = weight.detach().to(dtype).transpose(1, 2).contiguous()  # (K, width, D)
    bias = torch.empty(0, 0, dtype=dtype) if bias is None else bias.detach().to(dtype).contiguous()
    return dtype, array, strides[:2], weight.numpy(), bias.numpy()


def causal_conv1d_forward(x, weight, bias, paths, silu) -> torch.Tensor:
    """(batch, L, D), (K, D, width), (K, D), (K, L) -> (batch, L, K, D)."""
    dtype, array, strides, weight_array, bias_array = _prepare(x, weight, bias)
    y = torch.empty(x.shape[0], x.shape[1], weight.shape[0], x.shape[2], dtype=dtype)
    paths = check_paths(paths)
    run_tasks(
        _forward, x.shape[0] * paths.shape[0], 1.0 * y.numel(), array, strides, weight_array, bias_array, paths, silu,
        y.numpy(),
    )  # fmt: skip
    return y.to(x.dtype)


def causal_conv1d_backward(dy, x, weight, bias, paths, silu):
    """Gradients of x, weight and bias (None without a bias)."""
    dtype, array, strides, weight_array, bias_array = _prepare(x, weight, bias)
    dy_array, dy_strides = flat(dy.to(dtype))
    dx = torch.zeros(x.shape, dtype=dtype)
    dweight = torch.zeros(x.shape[0], *weight_array.shape, dtype=dtype)
    dbias = torch.zeros(x.shape[0], *bias_array.shape, dtype=dtype)
    run_tasks(
        _backward, x.shape[0], 1.7 * dy.numel(), array, strides, weight_array, bias_array, check_paths(paths), silu,
        dy_array, dy_strides[:3], dx.numpy(), dweight.numpy(), dbias.numpy(),
    )  # fmt: skip
    return (
        dx.to(x.dtype),
        dweight.sum(0).transpose(1, 2).to(weight.dtype),
        dbias.sum(0).to(bias.dtype) if bias is not None else None,
    )
