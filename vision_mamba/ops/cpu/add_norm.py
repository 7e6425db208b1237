"""Residual addition and norm on the CPU: forward by torch, backward in numba; a task is a block of rows.

torch's forward is as fast as a kernel of ours that reads and writes once. Of its backward passes only LayerNorm's
is one kernel; RMSNorm's takes several passes over memory.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
import torch.nn.functional as F

from .runtime import KERNEL, flat, run_tasks

ROWS = 64  # a task's: fixed, so that the sums over rows do not depend on the number of threads


@numba.njit(**KERNEL)
def _backward(start, stop, dnormed, step, dsum, dsum_step, total, weight, eps, rms, grad, dweight, dbias):
    rows, dim = total.shape
    zero, one, count = weight.dtype.type(0), weight.dtype.type(1), weight.dtype.type(dim)
    for task in range(start, stop):
        dweight_row = dweight[task]
        for i in range(dim):
            dweight_row[i] = zero
        if dbias.size:
            dbias_row = dbias[task]
            for i in range(dim):
                dbias_row[i] = zero
        for row in range(task * ROWS, min((task + 1) * ROWS, rows)):
            dy, sum_row, grad_row = dnormed[row * step : row * step + dim], total[row], grad[row]
            mean = square = direct = along = zero
            if not rms:
                for i in range(dim):
                    mean += sum_row[i]
                    direct += dy[i] * weight[i]
                mean /= count
                direct /= count
            for i in range(dim):
                off = sum_row[i] - mean
                square += off * off
                along += dy[i] * weight[i] * off
            scale = one / math.sqrt(square / count + weight.dtype.type(eps))
            along = along * scale * scale / count
            for i in range(dim):
                off = sum_row[i] - mean
                grad_row[i] = (dy[i] * weight[i] - direct - off * along) * scale
                dweight_row[i] += dy[i] * off * scale
            if dsum.size:
                dsum_row = dsum[row * dsum_step : row * dsum_step + dim]
                for i in range(dim):
                    grad_row[i] += dsum_row[i]
            if dbias.size:
                dbias_row = dbias[task]
                for i in range(dim):
                    dbias_row[i] += dy[i]


def _rows(tensor, dim, dtype):
    """(..., D) as its memory and the step from row to row; an empty array for None."""
    if tensor is None or tensor.numel() == 0:
        return np.empty(0, np.float64 if dtype == torch.float64 else np.float32), 0
    array, strides = flat(tensor.reshape(-1, dim).to(dtype))
    return array, strides[0]


def add_norm_forward(x, residual, weight, bias, eps, rms, residual_dtype, normed_dtype):
    """(..., D) -> the normalised sum in ``normed_dtype``, the sum in ``residual_dtype`` (None where that is None)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = x.shape[-1:]
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    if rms:
        normed = F.rms_norm(total, shape, weight, eps)
        normed = normed if bias is None else normed + bias
    else:
        normed = F.layer_norm(total, shape, weight, bias, eps)
    normed = normed.to(normed_dtype).contiguous()
    return normed, None if residual_dtype is None else total.to(residual_dtype).contiguous()


def add_norm_backward(dnormed, dsum, total, weight, bias, eps, rms, dtypes):
    """The gradient of the sum in each of ``dtypes``; those of weight and bias (None without a bias)."""
    dtype = torch.float64 if dnormed.dtype == torch.float64 else torch.float32
    dim = weight.shape[0]
    rows = total.detach().to(dtype).contiguous().view(-1, dim)
    tasks = math.ceil(len(rows) / ROWS)
    grad = torch.empty_like(rows)
    dweight = torch.empty(tasks, dim, dtype=dtype)
    dbias = torch.empty(0 if bias is None else tasks, dim, dtype=dtype)
    run_tasks(
        _backward, tasks, 0.7 * rows.numel(), *_rows(dnormed, dim, dtype), *_rows(dsum, dim, dtype), rows.numpy(),
        weight.detach().to(dtype).contiguous().numpy(), eps, rms, grad.numpy(), dweight.numpy(), dbias.numpy(),
    )  # fmt: skip
    grad = grad.view(total.shape)
    return (
        [grad.to(wanted) for wanted in dtypes],
        dweight.sum(0).to(weight.dtype),
        None if bias is None else dbias.sum(0).to(bias.dtype),
    )
