"""Selective scan on the CPU. Tensors arrive in the canonical shapes of ``ops/selective_scan.py``.

A task is one image and one block of channels; it walks all paths, so a merged output needs no locks.
The inner loops run over channels, which are dense in memory whatever the path.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from .runtime import KERNEL, LOG2E, check_paths, flat, run_tasks, sigmoid, softplus
from .walk import LANES, add_product, walk, walk_back

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


@numba.njit(**KERNEL)
def _start(width, k, c0, A, D, bias, a, d, shift):
    """A path's parameters of ``width`` channels from ``c0`` on; zeros beyond, and for those that there are not."""
    num_states, padded = a.shape
    zero = A.dtype.type(0)
    for n in range(num_states):
        a_row = a[n]
        for i in range(width):
            a_row[i] = A[k, n, c0 + i]
        for i in range(width, padded):
            a_row[i] = zero
    for i in range(padded):
        d[i] = zero
        shift[i] = zero
    if D.size:
        for i in range(width):
            d[i] = D[k, c0 + i]
    if bias.size:
        for i in range(width):
            shift[i] = bias[k, c0 + i]


@numba.njit(**KERNEL)
def _forward(
    start, stop, sizes, u, us, delta, ds, weight, A, B, bs, C, cs, D, z, zs, bias, initial, paths,
    use_softplus, merge, y, last_state, states
):  # fmt: skip
    length, num_paths, dim, num_states, groups, blocks, size = sizes
    zero = A.dtype.type(0)
    padded = (size + LANES - 1) // LANES * LANES
    h = np.empty((num_states, padded), A.dtype)
    a = np.empty((num_states, padded), A.dtype)
    d, shift = np.empty(padded, A.dtype), np.empty(padded, A.dtype)
    rank = weight.shape[1]
    w = np.zeros((rank, padded), A.dtype)
    dt, dtu = np.zeros(padded, A.dtype), np.zeros(padded, A.dtype)
    acc = np.zeros(padded, A.dtype)
    per_group = dim // groups
    blocks_per_group = blocks // groups
    for task in range(start, stop):
        image, block = divmod(task, blocks)
        group, index = divmod(block, blocks_per_group)
        c0 = group * per_group + index * size
        width = min(size, per_group - index * size)
        for k in range(num_paths):
            _start(width, k, c0, A, D, bias, a, d, shift)
            for r in range(rank):
                for i in range(width):
                    w[r, i] = weight[k, r, c0 + i]
            h[:] = zero
            if initial.size:
                for n in range(num_states):
                    for i in range(width):
                        h[n, i] = initial[image, k, n, c0 + i]
            for t in range(length):
                if states.size and t % CHUNK == 0:
                    for n in range(num_states):
                        for i in range(width):
                            states[image, t // CHUNK, k, n, c0 + i] = h[n, i]
                token = paths[k, t]
                at = image * us[0] + token * us[1] + k * us[2] + c0
                u_row = u[at : at + width]
                b0 = image * bs[0] + token * bs[1] + k * bs[2] + group * bs[3]
                b_row = B[b0 : b0 + num_states]
                b0 = image * cs[0] + token * cs[1] + k * cs[2] + group * cs[3]
                c_row = C[b0 : b0 + num_states]
                at = image * ds[0] + token * ds[1] + k * ds[2]
                if rank:
                    dt[:] = shift
                    add_product(w, delta[at : at + rank], dt)
                else:
                    delta_row = delta[at + c0 : at + c0 + width]
                    for i in range(width):
                        dt[i] = delta_row[i] + shift[i]
                if use_softplus:
                    for i in range(width):
                        dt[i] = softplus(dt[i])
                for i in range(width):
                    dtu[i] = dt[i] * u_row[i]
                    acc[i] = d[i] * u_row[i]
                walk(h, h, None, a, b_row, c_row, dt, dtu, acc)
                if z.size:
                    at = image * zs[0] + token * zs[1] + k * zs[2] + c0
                    z_row = z[at : at + width]
                    for i in range(width):
                        acc[i] *= z_row[i] * sigmoid(z_row[i])
                y_row = y[image, token, 0 if merge else k, c0 : c0 + width]
                if merge and k > 0:
                    for i in range(width):
                        y_row[i] += acc[i]
                else:
                    for i in range(width):
                        y_row[i] = acc[i]
            for n in range(num_states):
                for i in range(width):
                    last_state[image, k, c0 + i, n] = h[n, i]


@numba.njit(**KERNEL)
def _backward(
    start, stop, sizes, u, us, delta, ds, A, B, bs, C, cs, D, z, zs, bias, paths, states,
    use_softplus, merge, dy, dys, dlast, u_shared, z_shared,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial
):  # fmt: skip
    length, num_paths, dim, num_states, groups, blocks, size = sizes
    one = A.dtype.type(1)
    zero = A.dtype.type(0)
    log2e = A.dtype.type(LOG2E)
    padded = (size + LANES - 1) // LANES * LANES
    # Row 0 is the border state, row s + 1 the state after the chunk's step s.
    h = np.empty((CHUNK + 1, num_states, padded), A.dtype)
    decay = np.empty((CHUNK, num_states, padded), A.dtype)
    raw, dts = np.empty((CHUNK, padded), A.dtype), np.empty((CHUNK, padded), A.dtype)
    dtus, outs = np.empty((CHUNK, padded), A.dtype), np.empty((CHUNK, padded), A.dtype)
    a = np.empty((num_states, padded), A.dtype)
    g = np.empty((num_states, padded), A.dtype)
    da = np.empty((num_states, padded), A.dtype)
    d, shift = np.empty(padded, A.dtype), np.empty(padded, A.dtype)
    dout, grad = np.empty(padded, A.dtype), np.empty(padded, A.dtype)
    gb, gdt = np.empty(padded, A.dtype), np.empty(padded, A.dtype)
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
            _start(width, k, c0, A, D, bias, a, d, shift)
            da[:] = zero
            g[:] = zero
            if dlast.size:
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
                    at = image * us[0] + token * us[1] + k * us[2] + c0
                    u_row = u[at : at + width]
                    at = image * ds[0] + token * ds[1] + k * ds[2] + c0
                    delta_row = delta[at : at + width]
                    b0 = image * bs[0] + token * bs[1] + k * bs[2] + group * bs[3]
                    b_row = B[b0 : b0 + num_states]
                    b0 = image * cs[0] + token * cs[1] + k * cs[2] + group * cs[3]
                    c_row = C[b0 : b0 + num_states]
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
                    at = image * us[0] + token * us[1] + k * us[2] + c0
                    u_row = u[at : at + width]
                    b0 = image * bs[0] + token * bs[1] + k * bs[2] + group * bs[3]
                    b_row = B[b0 : b0 + num_states]
                    b0 = image * cs[0] + token * cs[1] + k * cs[2] + group * cs[3]
                    c_row = C[b0 : b0 + num_states]
                    at = image * dys[0] + token * dys[1] + (0 if merge else k * dys[2]) + c0
                    dy_row = dy[at : at + width]
                    dt, out = dts[s], outs[s]
                    for i in range(width):
                        dout[i] = dy_row[i]
                    if z.size:
                        at = image * zs[0] + token * zs[1] + k * zs[2] + c0
                        z_row = z[at : at + width]
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
                    if D.size:
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
                    if bias.size:
                        dbias_row = dbias[image, k, c0 : c0 + width]
                        for i in range(width):
                            dbias_row[i] += gdt[i]
            for n in range(num_states):
                for i in range(width):
                    dA[image, k, n, c0 + i] = da[n, i]
                    if dinitial.size:
                        dinitial[image, k, c0 + i, n] = g[n, i]


def _prepare(u, delta, A, B, C, D, z, delta_bias, paths):
    """Arrays for the kernels, in the dtype of the computation."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, length, num_paths = delta.shape[:3]
    dim, num_states, groups = A.shape[1], A.shape[2], B.shape[3]
    blocks, size = _split(batch, dim // groups)
    empty = np.empty((0, 0), np.float64 if dtype == torch.float64 else np.float32)

    def tokens(tensor: Tensor | None):
        if tensor is None:
            return empty.ravel(), (0, 0, 0)
        array, strides = flat(tensor.to(dtype))
        # A path axis of size 1 is read by every path.
        return array, tuple(0 if axis == 1 else step for axis, step in zip(tensor.shape, strides, strict=True))[:-1]

    def parameters(tensor: Tensor | None):
        return empty if tensor is None else tensor.detach().to(dtype).contiguous().numpy()

    a = (A.detach().to(dtype) * LOG2E).transpose(1, 2).contiguous().numpy()  # (K, N, D)
    sizes = (length, num_paths, dim, num_states, groups, groups * blocks, size)
    arrays = dict(
        u=tokens(u), delta=tokens(delta), A=a, B=tokens(B), C=tokens(C), D=parameters(D),
        z=tokens(z), bias=parameters(delta_bias), paths=check_paths(paths),
    )  # fmt: skip
    return dtype, batch, sizes, arrays


def selective_scan_forward(
    u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, save_states, delta_weight=None,
    overwrite_delta=False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y, the last state (batch, K, D, N), and the border states (empty unless asked for).

    With ``delta_weight`` (K, D, R) or (D, R), ``delta`` is (batch, L, K, R): a row of step sizes is made when the scan
    comes to it, and the tensor of them all, the largest of a block, is never in memory. Memory is not short on a CPU:
    y has its own, whether it might be written over ``delta`` or not.
    """
    dtype, batch, sizes, x = _prepare(u, delta, A, B, C, D, z, delta_bias, paths)
    length, num_paths, dim, num_states, _, blocks, _ = sizes
    y = torch.empty(batch, length, 1 if merge else num_paths, dim, dtype=dtype)
    last_state = torch.empty(batch, num_paths, dim, num_states, dtype=dtype)
    states = new_states(u, delta[..., :1].expand(batch, length, num_paths, dim), B, num_states, save_states)
    if delta_weight is None:
        weight = torch.empty(num_paths, 0, dim, dtype=dtype)
    else:
        weight = delta_weight.detach().to(dtype).expand(num_paths, dim, -1).transpose(1, 2).contiguous()
    if initial_state is None:
        initial = torch.empty(0, 0, 0, 0, dtype=dtype)
    else:
        initial = initial_state.detach().to(dtype).transpose(2, 3).contiguous()
    steps = batch * length * num_paths * dim
    run_tasks(
        _forward, batch * blocks, (1.5 + 0.35 * num_states) * steps, sizes,
        *x["u"], *x["delta"], weight.numpy(), x["A"], *x["B"], *x["C"], x["D"],
        *x["z"], x["bias"], initial.numpy(), x["paths"], delta_softplus, merge,
        y.numpy(), last_state.numpy(), states.numpy(),
    )  # fmt: skip
    return (y.squeeze(2) if merge else y).to(u.dtype), last_state, states


def selective_scan_backward(
    dy, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge,
    overwrite_delta=False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; None where there is no input.

    That of delta has memory of its own, whether it might be written over delta or not.
    """
    dtype, batch, sizes, x = _prepare(u, delta, A, B, C, D, z, delta_bias, paths)
    length, num_paths, dim, num_states, groups, blocks, _ = sizes
    dy_array, dy_strides = flat(dy.to(dtype))
    if merge:
        dy_strides = (*dy_strides[:2], 0, 1)

    def like(tensor: Tensor | None, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype) if tensor is not None else torch.empty(0, *shape[1:], dtype=dtype)

    du = torch.empty(u.shape, dtype=dtype)
    ddelta = torch.empty(delta.shape, dtype=dtype)
    dz = torch.empty(z.shape if z is not None else (0, 0, 0, 0), dtype=dtype)
    # Sums over images and channel blocks are taken afterwards, in a fixed order: equal bits every time.
    dA = torch.empty(batch, num_paths, num_states, dim, dtype=dtype)
    dB = torch.empty(blocks // groups, batch, length, num_paths, groups, num_states, dtype=dtype)
    dC = torch.empty_like(dB)
    dD = like(D, batch, num_paths, dim)
    dbias = like(delta_bias, batch, num_paths, dim)
    dinitial = like(initial_state, batch, num_paths, dim, num_states)
    if dlast_state is None:
        dlast = torch.empty(0, 0, 0, 0, dtype=dtype)
    else:
        dlast = dlast_state.to(dtype).contiguous()
    run_tasks(
        _backward, batch * blocks, (5.5 + 0.65 * num_states) * delta.numel(), sizes,
        *x["u"], *x["delta"], x["A"], *x["B"], *x["C"], x["D"], *x["z"],
        x["bias"], x["paths"], states.numpy(), delta_softplus, merge, dy_array, dy_strides[:3],
        dlast.numpy(), u.shape[2] < num_paths, z is not None and z.shape[2] < num_paths,
        du.numpy(), ddelta.numpy(), dA.numpy(), dB.numpy(), dC.numpy(), dD.numpy(), dz.numpy(),
        dbias.numpy(), dinitial.numpy(),
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
