"""Selective scan on the CPU. Tensors arrive in the canonical shapes of ``ops/selective_scan.py``.

A task is one image and one block of channels; it walks all paths, so a merged output needs no locks.
The inner loops run over channels, which are dense in memory whatever the path.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from .runtime import (
    ANY,
    KERNEL,
    LOG2E,
    ZEROS,
    address,
    check_paths,
    dense,
    memory,
    on_team,
    run_tasks,
    sigmoid,
    softplus,
)
from .walk import LANES, add_product, row, tile, walk, walk_back

CHUNK = 16  # steps between saved states: the backward pass recomputes what lies between
BLOCK = 192  # channels a task at most: tiles of a chunk's states [CHUNK, N, BLOCK] stay in the second-level cache


def _split(batch: int, channels: int) -> tuple[int, int]:
    """Into how many blocks a group's channels go, and the size of a block: a task for every thread."""
    blocks = -(-channels // BLOCK)
    while batch * blocks < torch.get_num_threads() and channels // blocks > 32:
        blocks += 1
    size = -(-channels // blocks)
    return -(-channels // size), size


def new_states(u: Tensor, delta: Tensor, B: Tensor, num_states: int, save: bool) -> Tensor:
    """For the border states (batch, chunks, K, N, D) of steps (batch, L, K, D); empty where none are saved."""
    batch, length, num_paths, dim = delta.shape
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    chunks = (length + CHUNK - 1) // CHUNK
    return delta.new_empty((batch, chunks, num_paths, num_states, dim) if save else (0, 0, 0, 0, 0), dtype=dtype)


class _Sizes(NamedTuple):
    batch: int
    length: int
    num_paths: int
    dim: int
    num_states: int
    groups: int
    blocks: int  # of all groups
    size: int  # of a block: channels


class _Addresses(NamedTuple):
    """0 for what there is not."""

    u: int
    delta: int
    A: int
    B: int
    C: int
    D: int
    z: int
    bias: int
    paths: int


class _Strides(NamedTuple):
    """Of (batch, L, K, D), of B and C (batch, L, K, G, N), of A (K, D, N), of D and bias (K, D)."""

    u: tuple[int, ...]
    delta: tuple[int, ...]
    A: tuple[int, ...]
    B: tuple[int, ...]
    C: tuple[int, ...]
    D: tuple[int, ...]
    z: tuple[int, ...]
    bias: tuple[int, ...]


@numba.njit(**KERNEL)
def _start(width, k, c0, at, by, a, d, shift):
    """A path's A * log2(e), D and bias, ``width`` channels from ``c0`` on; zeros beyond and for None."""
    num_states, padded = a.shape
    zero, log2e = a.dtype.type(0), a.dtype.type(LOG2E)
    A = memory(at.A, zero, ANY)
    for n in range(num_states):
        a_row = a[n]
        for i in range(width):
            a_row[i] = A[k * by.A[0] + (c0 + i) * by.A[1] + n * by.A[2]] * log2e
        for i in range(width, padded):
            a_row[i] = zero
    for i in range(padded):
        d[i] = zero
        shift[i] = zero
    if at.D:
        D = memory(at.D, zero, ANY)
        for i in range(width):
            d[i] = D[k * by.D[0] + c0 + i]
    if at.bias:
        bias = memory(at.bias, zero, ANY)
        for i in range(width):
            shift[i] = bias[k * by.bias[0] + c0 + i]


@numba.njit(**KERNEL)
def _forward(openmp, threads, start, stop, args):
    if threads > 1:
        on_team(openmp, threads, start, stop, args)
        return
    (
        zero, sizes, at, by, rank, weight_at, weight_by, initial_at, initial_by, use_softplus, merge, y_at,
        last_state_at, states_at
    ) = args  # fmt: skip
    batch, length, num_paths, dim, num_states, groups, blocks, size = sizes
    u, delta, z = memory(at.u, zero, ANY), memory(at.delta, zero, ANY), memory(at.z, zero, ANY)
    B, C, weight = memory(at.B, zero, ANY), memory(at.C, zero, ANY), memory(weight_at, zero, ANY)
    initial, paths = memory(initial_at, zero, ANY), memory(at.paths, np.int32(0), (num_paths, length))
    y = memory(y_at, zero, (batch, length, 1 if merge else num_paths, dim))
    last_state = memory(last_state_at, zero, (batch, num_paths, dim, num_states))
    states = memory(states_at, zero, (batch, (length + CHUNK - 1) // CHUNK, num_paths, num_states, dim))
    padded = (size + LANES - 1) // LANES * LANES
    h, a, w = tile(num_states, padded, u), tile(num_states, padded, u), tile(rank, padded, u)
    gate_once = merge and by.z[2] == 0  # the paths' sum, where all have one gate or none
    d, shift = row(padded, u), row(padded, u)
    dt, dtu, acc = row(padded, u), row(padded, u), row(padded, u)
    per_group = dim // groups
    blocks_per_group = blocks // groups
    for task in range(start, stop):
        image, block = divmod(task, blocks)
        group, index = divmod(block, blocks_per_group)
        c0 = group * per_group + index * size
        width = min(size, per_group - index * size)
        for k in range(num_paths):
            _start(width, k, c0, at, by, a, d, shift)
            for r in range(rank):
                for i in range(width):
                    w[r, i] = weight[k * weight_by[0] + (c0 + i) * weight_by[1] + r * weight_by[2]]
            h[:] = zero
            if initial_at:
                first = image * initial_by[0] + k * initial_by[1] + c0 * initial_by[2]
                for n in range(num_states):
                    for i in range(width):
                        h[n, i] = initial[first + i * initial_by[2] + n * initial_by[3]]
            for t in range(length):
                if states_at and t % CHUNK == 0:
                    for n in range(num_states):
                        for i in range(width):
                            states[image, t // CHUNK, k, n, c0 + i] = h[n, i]
                token = paths[k, t]
                first = image * by.u[0] + token * by.u[1] + k * by.u[2] + c0
                u_row = u[first : first + width]
                first = image * by.B[0] + token * by.B[1] + k * by.B[2] + group * by.B[3]
                b_row = B[first : first + num_states]
                first = image * by.C[0] + token * by.C[1] + k * by.C[2] + group * by.C[3]
                c_row = C[first : first + num_states]
                first = image * by.delta[0] + token * by.delta[1] + k * by.delta[2]
                if rank:
                    dt[:] = shift
                    add_product(w, delta[first : first + rank], dt)
                else:
                    delta_row = delta[first + c0 : first + c0 + width]
                    for i in range(width):
                        dt[i] = delta_row[i] + shift[i]
                if use_softplus:
                    for i in range(width):
                        dt[i] = softplus(dt[i])
                for i in range(width):
                    dtu[i] = dt[i] * u_row[i]
                    acc[i] = d[i] * u_row[i]
                walk(h, h, None, a, b_row, c_row, dt, dtu, acc)
                y_row = y[image, token, 0 if merge else k, c0 : c0 + width]
                if gate_once and k > 0:
                    for i in range(width):
                        acc[i] += y_row[i]
                if at.z and (k == num_paths - 1 or not gate_once):
                    first = image * by.z[0] + token * by.z[1] + k * by.z[2] + c0
                    z_row = z[first : first + width]
                    for i in range(width):
                        acc[i] *= z_row[i] * sigmoid(z_row[i])
                if merge and k > 0 and not gate_once:
                    for i in range(width):
                        y_row[i] += acc[i]
                else:
                    for i in range(width):
                        y_row[i] = acc[i]
            for n in range(num_states):
                for i in range(width):
                    last_state[image, k, c0 + i, n] = h[n, i]


@numba.njit(**KERNEL)
def _backward(openmp, threads, start, stop, args):
    if threads > 1:
        on_team(openmp, threads, start, stop, args)
        return
    (
        zero, sizes, at, by, use_softplus, u_shared, z_shared, states_at, dy_at, dy_by, dlast_at, du_at,
        ddelta_at, dA_at, dB_at, dC_at, dD_at, dz_at, dbias_at, dinitial_at
    ) = args  # fmt: skip
    batch, length, num_paths, dim, num_states, groups, blocks, size = sizes
    u, delta, z = memory(at.u, zero, ANY), memory(at.delta, zero, ANY), memory(at.z, zero, ANY)
    B, C, dy = memory(at.B, zero, ANY), memory(at.C, zero, ANY), memory(dy_at, zero, ANY)
    paths = memory(at.paths, np.int32(0), (num_paths, length))
    states = memory(states_at, zero, (batch, (length + CHUNK - 1) // CHUNK, num_paths, num_states, dim))
    du = memory(du_at, zero, (batch, length, 1 if u_shared else num_paths, dim))
    ddelta = memory(ddelta_at, zero, (batch, length, num_paths, dim))
    dz = memory(dz_at, zero, (batch, length, 1 if z_shared else num_paths, dim))
    dA = memory(dA_at, zero, (batch, num_paths, num_states, dim))
    of_groups = blocks // groups, batch, length, num_paths, groups, num_states
    dB, dC = memory(dB_at, zero, of_groups), memory(dC_at, zero, of_groups)
    dD, dbias = memory(dD_at, zero, (batch, num_paths, dim)), memory(dbias_at, zero, (batch, num_paths, dim))
    of_states = batch, num_paths, dim, num_states
    dlast, dinitial = memory(dlast_at, zero, of_states), memory(dinitial_at, zero, of_states)
    one, log2e = u.dtype.type(1), u.dtype.type(LOG2E)
    padded = (size + LANES - 1) // LANES * LANES
    # Row 0 is the border state, row s + 1 the state after the chunk's step s.
    h = tile((CHUNK + 1) * num_states, padded, u).reshape(CHUNK + 1, num_states, padded)
    decay = tile(CHUNK * num_states, padded, u).reshape(CHUNK, num_states, padded)
    raw, dts = tile(CHUNK, padded, u), tile(CHUNK, padded, u)
    dtus, outs = tile(CHUNK, padded, u), tile(CHUNK, padded, u)
    a, g, da = tile(num_states, padded, u), tile(num_states, padded, u), tile(num_states, padded, u)
    d, shift = row(padded, u), row(padded, u)
    dout, grad, gb, gdt = row(padded, u), row(padded, u), row(padded, u), row(padded, u)
    per_group = dim // groups
    blocks_per_group = blocks // groups
    for task in range(start, stop):
        image, block = divmod(task, blocks)
        group, index = divmod(block, blocks_per_group)
        c0 = group * per_group + index * size
        width = min(size, per_group - index * size)
        # Lanes beyond: no channel, and no part in sums over channels.
        h[0] = zero
        dts[:] = zero
        dtus[:] = zero
        outs[:] = zero
        dout[:] = zero
        for k in range(num_paths):
            _start(width, k, c0, at, by, a, d, shift)
            da[:] = zero
            g[:] = zero
            if dlast_at:
                for n in range(num_states):
                    for i in range(width):
                        g[n, i] = dlast[image, k, c0 + i, n]
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                t0 = chunk * CHUNK
                steps = min(CHUNK, length - t0)
                for n in range(num_states):
                    for i in range(width):
                        h[0, n, i] = states[image, chunk, k, n, c0 + i]
                for s in range(steps):
                    token = paths[k, t0 + s]
                    first = image * by.u[0] + token * by.u[1] + k * by.u[2] + c0
                    u_row = u[first : first + width]
                    first = image * by.delta[0] + token * by.delta[1] + k * by.delta[2] + c0
                    delta_row = delta[first : first + width]
                    first = image * by.B[0] + token * by.B[1] + k * by.B[2] + group * by.B[3]
                    b_row = B[first : first + num_states]
                    first = image * by.C[0] + token * by.C[1] + k * by.C[2] + group * by.C[3]
                    c_row = C[first : first + num_states]
                    raw_row, dt, dtu, out = raw[s], dts[s], dtus[s], outs[s]
                    for i in range(width):
                        raw_row[i] = delta_row[i] + shift[i]
                    if use_softplus:
                        for i in range(width):
                            dt[i] = softplus(raw_row[i])
                    else:
                        for i in range(width):
                            dt[i] = raw_row[i]
                    for i in range(width):
                        dtu[i] = dt[i] * u_row[i]
                        out[i] = d[i] * u_row[i]
                    walk(h[s], h[s + 1], decay[s], a, b_row, c_row, dt, dtu, out)
                for s in range(steps - 1, -1, -1):
                    token = paths[k, t0 + s]
                    first = image * by.u[0] + token * by.u[1] + k * by.u[2] + c0
                    u_row = u[first : first + width]
                    first = image * by.B[0] + token * by.B[1] + k * by.B[2] + group * by.B[3]
                    b_row = B[first : first + num_states]
                    first = image * by.C[0] + token * by.C[1] + k * by.C[2] + group * by.C[3]
                    c_row = C[first : first + num_states]
                    first = image * dy_by[0] + token * dy_by[1] + k * dy_by[2] + c0
                    dy_row = dy[first : first + width]
                    dt, out = dts[s], outs[s]
                    for i in range(width):
                        dout[i] = dy_row[i]
                    if at.z:
                        first = image * by.z[0] + token * by.z[1] + k * by.z[2] + c0
                        z_row = z[first : first + width]
                        for i in range(width):
                            sig = sigmoid(z_row[i])
                            grad[i] = dout[i] * out[i] * sig * (one + z_row[i] * (one - sig))
                            dout[i] *= z_row[i] * sig
                        dz_row = dz[image, token, 0 if z_shared else k, c0 : c0 + width]
                        if z_shared and k > 0:
                            for i in range(width):
                                dz_row[i] += grad[i]
                        else:
                            for i in range(width):
                                dz_row[i] = grad[i]
                    gb[:] = zero
                    gdt[:] = zero
                    walk_back(
                        h[s], h[s + 1], decay[s], a, b_row, c_row, dt, dtus[s], dout, g, da, gb, gdt,
                        dB[index, image, token, k, group], dC[index, image, token, k, group],
                    )  # fmt: skip
                    for i in range(width):
                        grad[i] = dt[i] * gb[i] + dout[i] * d[i]
                    if at.D:
                        dD_row = dD[image, k, c0 : c0 + width]
                        for i in range(width):
                            dD_row[i] += dout[i] * u_row[i]
                    du_row = du[image, token, 0 if u_shared else k, c0 : c0 + width]
                    if u_shared and k > 0:
                        for i in range(width):
                            du_row[i] += grad[i]
                    else:
                        for i in range(width):
                            du_row[i] = grad[i]
                    # a holds A * log2(e)
                    ddelta_row = ddelta[image, token, k, c0 : c0 + width]
                    for i in range(width):
                        gdt[i] = gdt[i] / log2e + gb[i] * u_row[i]
                    if use_softplus:
                        raw_row = raw[s]
                        for i in range(width):
                            gdt[i] *= sigmoid(raw_row[i])
                    for i in range(width):
                        ddelta_row[i] = gdt[i]
                    if at.bias:
                        dbias_row = dbias[image, k, c0 : c0 + width]
                        for i in range(width):
                            dbias_row[i] += gdt[i]
            for n in range(num_states):
                for i in range(width):
                    dA[image, k, n, c0 + i] = da[n, i]
                    if dinitial_at:
                        dinitial[image, k, c0 + i, n] = g[n, i]


class _Arguments(NamedTuple):
    dtype: torch.dtype
    sizes: _Sizes
    addresses: _Addresses
    strides: _Strides
    tensors: tuple[Tensor | None, ...]  # to be kept as long as their addresses are used


def _arguments(u, delta, A, B, C, D, z, delta_bias, paths) -> _Arguments:
    """What both kernels take, in the dtype of the computation."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, length, num_paths = delta.shape[:3]
    dim, num_states, groups = A.shape[1], A.shape[2], B.shape[3]
    blocks, size = _split(batch, dim // groups)
    u, delta, B, C = dense(u, dtype), dense(delta, dtype), dense(B, dtype), dense(C, dtype)
    A = A if A.dtype == dtype else A.to(dtype)
    D, z, bias = (None if t is None else dense(t, dtype) for t in (D, z, delta_bias))
    paths = check_paths(paths)
    if u.shape[2] < num_paths:  # every path reads the same
        u = u.expand(-1, -1, num_paths, -1)
    if z is not None and z.shape[2] < num_paths:
        z = z.expand(-1, -1, num_paths, -1)
    tensors = (u, delta, A, B, C, D, z, bias, paths)
    return _Arguments(
        dtype,
        _Sizes(batch, length, num_paths, dim, num_states, groups, groups * blocks, size),
        _Addresses(*[address(tensor) for tensor in tensors]),
        _Strides(
            u.stride(), delta.stride(), A.stride(), B.stride(), C.stride(), (0, 0) if D is None else D.stride(),
            (0, 0, 0, 0) if z is None else z.stride(), (0, 0) if bias is None else bias.stride(),
        ),
        tensors,
    )  # fmt: skip


def wants_output(u: Tensor, A: Tensor, z: Tensor | None, merge: bool) -> bool:
    """Whether the backward pass takes y: never, as it has the states at hand."""
    return False


def selective_scan_forward(
    u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, save_states, delta_weight=None,
    overwrite_delta=False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y, the last state (batch, K, D, N), and the border states (empty unless asked for).

    With ``delta_weight`` (K, D, R) or (D, R), ``delta`` is (batch, L, K, R): a row of step sizes is made when the scan
    comes to it, and the tensor of them all, the largest of a block, is never in memory. Memory is not short on a CPU:
    y has its own, whether it might be written over ``delta`` or not.
    """
    x = _arguments(u, delta, A, B, C, D, z, delta_bias, paths)
    batch, length, num_paths, dim, num_states, _, blocks, _ = x.sizes
    y = torch.empty(batch, length, 1 if merge else num_paths, dim, dtype=x.dtype)
    last_state = torch.empty(batch, num_paths, dim, num_states, dtype=x.dtype)
    if save_states:  # of as many channels as delta has where it is not low-rank
        states = new_states(u, delta[..., :1].expand(batch, length, num_paths, dim), B, num_states, True)
    else:
        states = torch.empty(0, 0, 0, 0, 0, dtype=x.dtype)
    weight, rank, weight_strides = delta_weight, 0, (0, 0, 0)
    if weight is not None:
        weight = weight.to(x.dtype).expand(num_paths, -1, -1)
        rank, weight_strides = weight.shape[-1], weight.stride()
    initial = None if initial_state is None else initial_state.to(x.dtype)
    run_tasks(
        _forward, batch * blocks, (1.5 + 0.35 * num_states) * batch * length * num_paths * dim, ZEROS[x.dtype],
        x.sizes, x.addresses, x.strides, rank, address(weight), weight_strides, address(initial),
        (0, 0, 0, 0) if initial is None else initial.stride(), delta_softplus, merge, address(y), address(last_state),
        address(states) if save_states else 0,
    )  # fmt: skip
    return (y.squeeze(2) if merge else y).to(u.dtype), last_state, states


def selective_scan_backward(
    dy, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, y=None,
    overwrite_delta=False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; None where there is no input.

    That of delta has memory of its own, whether it might be written over delta or not.
    """
    x = _arguments(u, delta, A, B, C, D, z, delta_bias, paths)
    dtype = x.dtype
    batch, length, num_paths, dim, num_states, groups, blocks, _ = x.sizes
    dy = dense(dy.unsqueeze(2).expand(-1, -1, num_paths, -1) if merge else dy, dtype)
    dlast = None if dlast_state is None else dlast_state.to(dtype).contiguous()
    states = states.contiguous()

    def like(tensor: Tensor | None, *shape: int) -> Tensor | None:
        return None if tensor is None else torch.zeros(*shape, dtype=dtype)

    du = torch.empty(u.shape, dtype=dtype)
    ddelta = torch.empty(delta.shape, dtype=dtype)
    dz = None if z is None else torch.empty(z.shape, dtype=dtype)
    # Sums over images and channel blocks are taken afterwards, in a fixed order: equal bits every time.
    dA = torch.empty(batch, num_paths, num_states, dim, dtype=dtype)
    dB = torch.empty(blocks // groups, batch, length, num_paths, groups, num_states, dtype=dtype)
    dC = torch.empty_like(dB)
    dD = like(D, batch, num_paths, dim)
    dbias = like(delta_bias, batch, num_paths, dim)
    dinitial = like(initial_state, batch, num_paths, dim, num_states)
    results = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    run_tasks(
        _backward, batch * blocks, (5.5 + 0.65 * num_states) * delta.numel(), ZEROS[dtype], x.sizes, x.addresses,
        x.strides, delta_softplus, u.shape[2] < num_paths, z is not None and z.shape[2] < num_paths,
        address(states), address(dy), dy.stride(), address(dlast), *map(address, results),
    )  # fmt: skip
    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        dA.sum(0).transpose(1, 2).to(A.dtype),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        dD.sum(0).to(D.dtype) if D is not None else None,
        dz.to(z.dtype) if z is not None else None,
        dbias.sum(0).to(delta_bias.dtype) if delta_bias is not None else None,
        dinitial.to(initial_state.dtype) if initial_state is not None else None,
    )
