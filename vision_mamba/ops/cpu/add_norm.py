"""Residual addition and norm on the CPU; a task is a block of rows."""

from __future__ import annotations

import math

import numba
import torch

from .runtime import ANY, KERNEL, ZEROS, address, dense, memory, on_team, run_tasks

ROWS = 64  # a task's: fixed, so that the sums over rows do not depend on the number of threads


@numba.njit(**KERNEL)
def _forward(openmp, threads, start, stop, args):
    if threads > 1:
        on_team(openmp, threads, start, stop, args)
        return
    (
        zero, rows, dim, x_at, x_step, residual_at, residual_step, weight_at, bias_at, eps, rms, normed_at,
        total_at
    ) = args  # fmt: skip
    x, residual = memory(x_at, zero, ANY), memory(residual_at, zero, ANY)
    weight, bias = memory(weight_at, zero, (dim,)), memory(bias_at, zero, (dim,))
    normed, total = memory(normed_at, zero, (rows, dim)), memory(total_at, zero, (rows, dim))
    one, count = x.dtype.type(1), x.dtype.type(dim)
    for row in range(start * ROWS, min(stop * ROWS, rows)):
        sum_row, normed_row = x[row * x_step : row * x_step + dim], normed[row]
        if total_at:
            x_row, sum_row = sum_row, total[row]
            if residual_at:
                residual_row = residual[row * residual_step : row * residual_step + dim]
                for i in range(dim):
                    sum_row[i] = x_row[i] + residual_row[i]
            else:
                for i in range(dim):
                    sum_row[i] = x_row[i]
        mean = square = zero
        if not rms:
            for i in range(dim):
                mean += sum_row[i]
            mean /= count
        for i in range(dim):
            square += (sum_row[i] - mean) * (sum_row[i] - mean)
        scale = one / math.sqrt(square / count + x.dtype.type(eps))
        for i in range(dim):
            normed_row[i] = (sum_row[i] - mean) * scale * weight[i]
        if bias_at:
            for i in range(dim):
                normed_row[i] += bias[i]


@numba.njit(**KERNEL)
def _backward(openmp, threads, start, stop, args):
    if threads > 1:
        on_team(openmp, threads, start, stop, args)
        return
    (
        zero, rows, dim, dnormed_at, step, dsum_at, dsum_step, total_at, weight_at, eps, rms, grad_at,
        dweight_at, dbias_at
    ) = args  # fmt: skip
    dnormed, dsum = memory(dnormed_at, zero, ANY), memory(dsum_at, zero, ANY)
    total, grad = memory(total_at, zero, (rows, dim)), memory(grad_at, zero, (rows, dim))
    tasks = (rows + ROWS - 1) // ROWS
    weight = memory(weight_at, zero, (dim,))
    dweight, dbias = memory(dweight_at, zero, (tasks, dim)), memory(dbias_at, zero, (tasks, dim))
    one, count = weight.dtype.type(1), weight.dtype.type(dim)
    for task in range(start, stop):
        dweight_row = dweight[task]
        for i in range(dim):
            dweight_row[i] = zero
        if dbias_at:
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
            if dsum_at:
                dsum_row = dsum[row * dsum_step : row * dsum_step + dim]
                for i in range(dim):
                    grad_row[i] += dsum_row[i]
            if dbias_at:
                dbias_row = dbias[task]
                for i in range(dim):
                    dbias_row[i] += dy[i]


def _rows(tensor, dim, dtype):
    """(..., D) as (rows, D) and the step from row to row; 0 for None."""
    if tensor is None or tensor.numel() == 0:
        return None, 0
    tensor = dense(tensor.reshape(-1, dim), dtype)
    return tensor, tensor.stride(0)


def add_norm_forward(x, residual, weight, bias, eps, rms, residual_dtype, normed_dtype):
    """(..., D) -> the normalised sum in ``normed_dtype``, the sum in ``residual_dtype`` (None where that is None)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dim = x.shape[-1]
    rows, step = _rows(x, dim, dtype)
    residual, residual_step = _rows(residual, dim, dtype)
    weight, bias = dense(weight, dtype), None if bias is None else dense(bias, dtype)
    normed = torch.empty(x.shape, dtype=dtype)
    total = None if residual is None and residual_dtype is None else torch.empty(x.shape, dtype=dtype)
    count = x.numel() // dim
    run_tasks(
        _forward, math.ceil(count / ROWS), 0.7 * count * dim, ZEROS[dtype], count, dim, address(rows), step,
        address(residual), residual_step, address(weight), address(bias), eps, rms, address(normed), address(total),
    )  # fmt: skip
    return normed.to(normed_dtype), None if residual_dtype is None else total.to(residual_dtype)


def add_norm_backward(dnormed, dsum, total, weight, bias, eps, rms, dtypes):
    """The gradient of the sum in each of ``dtypes``; those of weight and bias (None without a bias)."""
    dtype = torch.float64 if dnormed.dtype == torch.float64 else torch.float32
    dim = weight.shape[0]
    rows = total.to(dtype).contiguous().view(-1, dim)
    tasks = math.ceil(len(rows) / ROWS)
    dnormed, step = _rows(dnormed, dim, dtype)
    dsum, dsum_step = _rows(dsum, dim, dtype)
    own = dense(weight, dtype)
    grad = torch.empty_like(rows)
    dweight = torch.empty(tasks, dim, dtype=dtype)
    dbias = None if bias is None else torch.empty(tasks, dim, dtype=dtype)
    run_tasks(
        _backward, tasks, 0.7 * rows.numel(), ZEROS[dtype], len(rows), dim, address(dnormed), step, address(dsum),
        dsum_step, address(rows), address(own), eps, rms, address(grad), address(dweight), address(dbias),
    )  # fmt: skip
    grad = grad.view(total.shape)
    return (
        [grad.to(wanted) for wanted in dtypes],
        dweight.sum(0).to(weight.dtype),
        None if dbias is None else dbias.sum(0).to(bias.dtype),
    )
