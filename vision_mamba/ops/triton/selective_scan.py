"""Selective scan in Triton. Tensors arrive in the canonical shapes of ``ops/selective_scan.py``.

A program walks one path of one image for one block of channels, a tile of steps at a time. The recurrence
inside a tile is unrolled: all steps of a state element lie in one thread, so it is a chain of fused
multiply-adds while the loads of the next tile are in flight. Short of programs, the path is cut into
spans which run at once: a first kernel finds what each span does to the state, a second links the spans.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.jit import JITFunction

from ..selective_scan import step_sizes
from .path_sums import gated_sum, gated_sum_backward, sum_of_paths
from .runtime import (
    HAS_GLUON,
    LOG2E,
    VARYING,
    alignment,
    cdiv,
    check_dtypes,
    compile_together,
    dense,
    jit_without,
    launch,
    load_rows,
    locate,
    multiprocessors,
    new_by_path,
    offset_type,
    on_device,
    power_of_2,
    sigmoid,
    softplus,
    step_of,
    store_rows,
    visited,
)

_jit = jit_without(VARYING)


@triton.jit
def _locate(num_paths, groups, per_group, num_spans, LOOP_PATHS: tl.constexpr, BLOCK: tl.constexpr):
    """image, span, path, group, block within the group, channels, which of them exist."""
    blocks = tl.cdiv(per_group, BLOCK)
    image, span_index, k, group, block = locate(num_paths, groups, blocks, num_spans, LOOP_PATHS)
    inside = block * BLOCK + tl.arange(0, BLOCK)
    return image, span_index, k, group, block, group * per_group + inside, inside < per_group


@triton.jit
def _settled(tile):
    """The same tile [T, columns], computed before it is handed to the lanes and warps that use it.

    A sum over one tile is nothing to compute, but Triton moves no change of layout across a sum. Without
    it, each lane (and each warp) would receive the operands and repeat the arithmetic, such as the softplus.
    """
    return tl.sum(tile[None, :, :], axis=0)


@triton.jit
def _load_states(base, token, stride, n, n_ok):
    """Rows of B or C, for ``_states``: [T, N]; with one state [T, P], of which the first column counts.

    Triton has every lane load a tensor with fewer numbers than lanes for itself, all of it, with
    the arithmetic of all its addresses. With the columns that are masked out it has as many.
    """
    if n.shape[0] > 1:
        tile = load_rows(base, token, stride, n, n_ok)
    else:
        column = tl.arange(0, 32 // token.shape[0])
        tile = load_rows(base, token, stride, column, column == 0)
    return tile


@triton.jit
def _states(tile, NP: tl.constexpr):
    """What ``_load_states`` loaded, as float32 [T, N]."""
    tile = tile.to(tl.float32)
    if NP == 1:
        tile = tl.sum(tile, axis=1)[:, None]
    else:
        tile = _settled(tile)
    return tile


@triton.jit
def _step_sizes(delta, bias, position, end, SOFTPLUS: tl.constexpr):
    """delta with bias, before and after softplus; 0 at steps past the end, so the state stays.

    By position, not by token: each lane would load the path once more for the mask.
    """
    raw = delta.to(tl.float32) + bias[None, :]
    dt = raw
    if SOFTPLUS:
        dt = softplus(raw, delta.dtype.primitive_bitwidth)
    return raw, _settled(tl.where((position < end)[:, None], dt, 0.0))


@triton.jit
def _scan_tile(dt, dtu, b, a2, h, T: tl.constexpr):
    """decay, states before and after each step [T, N, channels]; the state after the tile."""
    index = tl.arange(0, T)[:, None, None]
    decay = tl.exp2(dt[:, None, :] * a2[None, :, :])
    x = dtu[:, None, :] * b[:, :, None]
    before = x
    after = x
    for s in tl.static_range(T):
        before = tl.where(index == s, h, before)
        h = step_of(decay, index, s) * h + step_of(x, index, s)
        after = tl.where(index == s, h, after)
    return decay, before, after, h


@triton.jit
def _sum_states(x, WARPS: tl.constexpr):
    """Sum over N of [T, N, channels], of which a thread holds every WARPS-th state.

    First what lies in a thread, then the rest of it permuted so that it does too. Triton's own sum over
    several warps writes to shared memory with all lanes of a warp in one bank.
    """
    if WARPS == 1:
        return tl.sum(x, axis=1)
    T: tl.constexpr = x.shape[0]
    NP: tl.constexpr = x.shape[1]
    BLOCK: tl.constexpr = x.shape[2]
    x = tl.sum(tl.reshape(x, (T, NP // WARPS, WARPS, BLOCK)), axis=1)
    return tl.sum(tl.permute(x, (1, 0, 2)), axis=0)


@triton.jit
def _sum_channels(x):
    """Sum over the channels of [T, N, channels], which are the lanes of a warp.

    Permuted, the tile passes through shared memory once and a thread then holds all its channels. A sum
    over lanes takes five shuffles for every number.
    """
    return tl.sum(tl.permute(x, (2, 0, 1)), axis=0)


@_jit
def _scan_forward_kernel(
    u, delta, A, B, C, D, z, bias, paths, initial, y, last_state, states,
    length, num_paths, groups, per_group, span, num_spans, saves,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, z_b, z_l, z_k, y_b, y_l, y_k,
    B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g, A_k, A_d, A_n, D_k, bias_k, paths_k, h_b, h_s, h_k, h_n, border_n,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, SOFTPLUS: tl.constexpr, LOOP_PATHS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    image, span_index, k0, group, block, c, c_ok = _locate(num_paths, groups, per_group, num_spans, LOOP_PATHS, BLOCK)
    n = tl.arange(0, NP)
    n_ok = n < N
    nc_ok = n_ok[:, None] & c_ok[None, :]
    step = tl.arange(0, T)
    dim = groups * per_group
    num_chunks = tl.cdiv(length, CHUNK)
    start = span_index * span
    end = tl.minimum(start + span, length)
    u_l = (u_l // ALIGN).to(OFFSET) * ALIGN
    delta_l = (delta_l // ALIGN).to(OFFSET) * ALIGN
    z_l = (z_l // ALIGN).to(OFFSET) * ALIGN
    y_l = (y_l // ALIGN).to(OFFSET) * ALIGN
    B_l = B_l.to(OFFSET)
    C_l = C_l.to(OFFSET)

    paths_here = 1
    if LOOP_PATHS:
        paths_here = num_paths
    for k in range(k0, k0 + paths_here):
        u_rows = u + tl.multiple_of(image * u_b + tl.cast(k, tl.int64) * u_k, ALIGN)
        delta_rows = delta + tl.multiple_of(image * delta_b + tl.cast(k, tl.int64) * delta_k, ALIGN)
        y_rows = y + tl.multiple_of(image * y_b + tl.cast(k, tl.int64) * y_k, ALIGN)
        if z is not None:
            z_rows = z + tl.multiple_of(image * z_b + tl.cast(k, tl.int64) * z_k, ALIGN)
        B_rows = B + image * B_b + tl.cast(k, tl.int64) * B_k + group.to(tl.int64) * B_g
        C_rows = C + image * C_b + tl.cast(k, tl.int64) * C_k + group.to(tl.int64) * C_g
        path = paths + tl.cast(k, tl.int64) * paths_k

        a_at = tl.cast(k, tl.int64) * A_k + c[None, :].to(tl.int64) * A_d + n[:, None].to(tl.int64) * A_n
        a2 = tl.load(A + a_at, mask=nc_ok, other=0.0).to(tl.float32) * LOG2E
        d = tl.zeros([BLOCK], tl.float32)
        if D is not None:
            d = tl.load(D + tl.cast(k, tl.int64) * D_k + c, mask=c_ok, other=0.0).to(tl.float32)
        shift = tl.zeros([BLOCK], tl.float32)
        if bias is not None:
            shift = tl.load(bias + tl.cast(k, tl.int64) * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)
        h = tl.zeros([1, NP, BLOCK], tl.float32)
        if initial is not None:
            h_at = image * h_b + span_index.to(tl.int64) * h_s + tl.cast(k, tl.int64) * h_k
            h_at = h_at + n[:, None].to(tl.int64) * h_n + c[None, :]
            h = tl.load(initial + h_at, mask=nc_ok, other=0.0).to(tl.float32)[None, :, :]

        # One tile ahead in the rows, two in the path: no load waits for another one.
        token_next = visited(path, start + step, end, length)
        delta_next = load_rows(delta_rows, token_next, delta_l, c, c_ok)
        u_next = load_rows(u_rows, token_next, u_l, c, c_ok)
        if z is not None:
            z_next = load_rows(z_rows, token_next, z_l, c, c_ok)
        b_next = _load_states(B_rows, token_next, B_l, n, n_ok)
        c_next = _load_states(C_rows, token_next, C_l, n, n_ok)
        token_after = visited(path, start + T + step, end, length)
        for t0 in range(start, end, T):
            token = token_next
            delta_tile = delta_next
            u_tile = u_next
            b_tile = b_next
            c_tile = c_next
            if z is not None:
                z_tile = z_next
            token_next = token_after
            delta_next = load_rows(delta_rows, token_next, delta_l, c, c_ok)
            u_next = load_rows(u_rows, token_next, u_l, c, c_ok)
            if z is not None:
                z_next = load_rows(z_rows, token_next, z_l, c, c_ok)
            b_next = _load_states(B_rows, token_next, B_l, n, n_ok)
            c_next = _load_states(C_rows, token_next, C_l, n, n_ok)
            token_after = visited(path, t0 + 2 * T + step, end, length)
            if LOOP_PATHS:  # the sum over the paths that were walked before
                y_before = load_rows(y_rows, tl.where(k > 0, token, -1), y_l, c, c_ok)

            # A branch at run time where nothing is saved, too: with it, ptxas issues the loads above before the
            # arithmetic below. Without it the kernel is 6 to 17 % slower on an H100.
            if (saves != 0) & (t0 % CHUNK == 0):
                border = states + ((image * num_chunks + t0 // CHUNK) * num_paths + k) * N * border_n
                # In three axes like h: for a store in two Triton would carry h in a second layout, computed again.
                border += n[None, :, None].to(tl.int64) * border_n
                tl.store(border + c[None, None, :], h, mask=nc_ok[None, :, :])

            _, dt = _step_sizes(delta_tile, shift, t0 + step, end, SOFTPLUS)
            uf = u_tile.to(tl.float32)
            _, _, after, h = _scan_tile(dt, _settled(dt * uf), _states(b_tile, NP), a2, h, T)
            out = _sum_states(after * _states(c_tile, NP)[:, :, None], WARPS) + d[None, :] * uf
            if z is not None:
                zf = z_tile.to(tl.float32)
                out = out * zf * sigmoid(zf)
            if LOOP_PATHS:
                out = out + y_before
            store_rows(y_rows, token, y_l, c, c_ok, out)

        state_at = (image * num_paths + k) * N * dim + c[None, :].to(tl.int64) * N + n[:, None]
        if span_index == num_spans - 1:
            tl.store(last_state + state_at[None, :, :], h, mask=nc_ok[None, :, :])
        if LOOP_PATHS:
            tl.debug_barrier()  # the next path reads rows that other threads of the program wrote


@_jit
def _span_forward_kernel(
    u, delta, A, B, bias, paths, change, total,
    length, num_paths, groups, per_group, span, num_spans,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, B_g, A_k, A_d, A_n, bias_k, paths_k, border_n,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """What a span does to the state: change [.., N, D] from zero, and the sum of its steps [.., D]."""
    image, span_index, k, group, block, c, c_ok = _locate(num_paths, groups, per_group, num_spans, False, BLOCK)
    n = tl.arange(0, NP)
    n_ok = n < N
    nc_ok = n_ok[:, None] & c_ok[None, :]
    step = tl.arange(0, T)
    start = span_index * span
    end = tl.minimum(start + span, length)
    u_l = (u_l // ALIGN).to(OFFSET) * ALIGN
    delta_l = (delta_l // ALIGN).to(OFFSET) * ALIGN
    B_l = B_l.to(OFFSET)
    u_rows = u + tl.multiple_of(image * u_b + tl.cast(k, tl.int64) * u_k, ALIGN)
    delta_rows = delta + tl.multiple_of(image * delta_b + tl.cast(k, tl.int64) * delta_k, ALIGN)
    B_rows = B + image * B_b + tl.cast(k, tl.int64) * B_k + group.to(tl.int64) * B_g
    path = paths + tl.cast(k, tl.int64) * paths_k
    a_at = tl.cast(k, tl.int64) * A_k + c[None, :].to(tl.int64) * A_d + n[:, None].to(tl.int64) * A_n
    a2 = tl.load(A + a_at, mask=nc_ok, other=0.0).to(tl.float32) * LOG2E
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + tl.cast(k, tl.int64) * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)
    h = tl.zeros([1, NP, BLOCK], tl.float32)
    dt_sum = tl.zeros([T, BLOCK], tl.float32)

    token_next = visited(path, start + step, end, length)
    delta_next = load_rows(delta_rows, token_next, delta_l, c, c_ok)
    u_next = load_rows(u_rows, token_next, u_l, c, c_ok)
    b_next = _load_states(B_rows, token_next, B_l, n, n_ok)
    token_after = visited(path, start + T + step, end, length)
    for t0 in range(start, end, T):
        delta_tile = delta_next
        u_tile = u_next
        b_tile = b_next
        token_next = token_after
        delta_next = load_rows(delta_rows, token_next, delta_l, c, c_ok)
        u_next = load_rows(u_rows, token_next, u_l, c, c_ok)
        b_next = _load_states(B_rows, token_next, B_l, n, n_ok)
        token_after = visited(path, t0 + 2 * T + step, end, length)
        _, dt = _step_sizes(delta_tile, shift, t0 + step, end, SOFTPLUS)
        _, _, _, h = _scan_tile(dt, _settled(dt * u_tile.to(tl.float32)), _states(b_tile, NP), a2, h, T)
        dt_sum += dt
    at = ((image * num_spans + span_index) * num_paths + k) * border_n
    tl.store(total + at + c, tl.sum(dt_sum, axis=0), mask=c_ok)
    tl.store(change + at * N + n[None, :, None].to(tl.int64) * border_n + c[None, None, :], h, mask=nc_ok[None, :, :])


@_jit
def _span_backward_kernel(
    delta, A, C, z, bias, paths, dy, change, total,
    length, num_paths, groups, per_group, span, num_spans,
    delta_b, delta_l, delta_k, z_b, z_l, z_k, dy_b, dy_l, dy_k, C_b, C_l, C_k, C_g, A_k, A_d, A_n,
    bias_k, paths_k, border_n,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The same of the gradient of the state, which runs from the last step to the first."""
    image, span_index, k, group, block, c, c_ok = _locate(num_paths, groups, per_group, num_spans, False, BLOCK)
    n = tl.arange(0, NP)
    n_ok = n < N
    nc_ok = n_ok[:, None] & c_ok[None, :]
    step = tl.arange(0, T)
    index = tl.arange(0, T)[:, None, None]
    start = span_index * span
    end = tl.minimum(start + span, length)
    delta_l = (delta_l // ALIGN).to(OFFSET) * ALIGN
    z_l = (z_l // ALIGN).to(OFFSET) * ALIGN
    dy_l = (dy_l // ALIGN).to(OFFSET) * ALIGN
    C_l = C_l.to(OFFSET)
    delta_rows = delta + tl.multiple_of(image * delta_b + tl.cast(k, tl.int64) * delta_k, ALIGN)
    dy_rows = dy + tl.multiple_of(image * dy_b + tl.cast(k, tl.int64) * dy_k, ALIGN)
    if z is not None:
        z_rows = z + tl.multiple_of(image * z_b + tl.cast(k, tl.int64) * z_k, ALIGN)
    C_rows = C + image * C_b + tl.cast(k, tl.int64) * C_k + group.to(tl.int64) * C_g
    path = paths + tl.cast(k, tl.int64) * paths_k
    a_at = tl.cast(k, tl.int64) * A_k + c[None, :].to(tl.int64) * A_d + n[:, None].to(tl.int64) * A_n
    a2 = tl.load(A + a_at, mask=nc_ok, other=0.0).to(tl.float32) * LOG2E
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = tl.load(bias + tl.cast(k, tl.int64) * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)
    g = tl.zeros([1, NP, BLOCK], tl.float32)
    dt_sum = tl.zeros([T, BLOCK], tl.float32)

    num_tiles = tl.cdiv(end - start, T)
    for i in range(num_tiles):
        position = start + (num_tiles - 1 - i) * T + step
        token = visited(path, position, end, length)
        delta_tile = load_rows(delta_rows, token, delta_l, c, c_ok)
        dout = load_rows(dy_rows, token, dy_l, c, c_ok).to(tl.float32)
        c_tile = _load_states(C_rows, token, C_l, n, n_ok)
        if z is not None:
            zf = load_rows(z_rows, token, z_l, c, c_ok).to(tl.float32)
            dout = dout * zf * sigmoid(zf)
        _, dt = _step_sizes(delta_tile, shift, position, end, SOFTPLUS)
        dt_sum += dt
        decay = tl.exp2(dt[:, None, :] * a2[None, :, :])
        direct = dout[:, None, :] * _states(c_tile, NP)[:, :, None]
        for s in tl.static_range(T - 1, -1, -1):
            g = step_of(decay, index, s) * (g + step_of(direct, index, s))
    at = ((image * num_spans + span_index) * num_paths + k) * border_n
    tl.store(total + at + c, tl.sum(dt_sum, axis=0), mask=c_ok)
    tl.store(change + at * N + n[None, :, None].to(tl.int64) * border_n + c[None, None, :], g, mask=nc_ok[None, :, :])


@triton.jit
def _spans_at(image, s, k, num_spans, num_paths, border_n, c_ok, REVERSE: tl.constexpr):
    """Where the sums of these spans begin, [SPANS, 1], and which of [SPANS, channels] exist."""
    ok = (s < num_spans)[:, None] & c_ok[None, :]
    if REVERSE:
        s = num_spans - 1 - s
    return (((image * num_spans + s) * num_paths + k) * border_n)[:, None], ok


@_jit
def _link_spans_kernel(
    A, initial, change, total, num_paths, groups, per_group, num_spans, A_k, A_d, A_n, h_b, h_k, h_n, border_n,
    N: tl.constexpr, BLOCK: tl.constexpr, SPANS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Puts into ``change``, in place, the state with which each span starts.

    A program links one state of each channel, so that it can have the loads of many spans under way.
    """
    image, _, k, group, block, c, c_ok = _locate(num_paths, groups, per_group, 1, False, BLOCK)
    n = tl.program_id(1)
    index = tl.arange(0, SPANS)
    a_at = tl.cast(k, tl.int64) * A_k + c.to(tl.int64) * A_d + tl.cast(n, tl.int64) * A_n
    a2 = tl.load(A + a_at, mask=c_ok, other=0.0).to(tl.float32) * LOG2E
    h = tl.zeros([1, BLOCK], tl.float32)
    if initial is not None:
        h_at = image * h_b + tl.cast(k, tl.int64) * h_k + tl.cast(n, tl.int64) * h_n + c
        h = tl.load(initial + h_at, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    of_state = tl.cast(n, tl.int64) * border_n + c[None, :]
    at, ok = _spans_at(image, index, k, num_spans, num_paths, border_n, c_ok, REVERSE)
    x_next = tl.load(change + at * N + of_state, mask=ok, other=0.0)
    total_next = tl.load(total + at + c[None, :], mask=ok, other=0.0)
    for i in range(0, num_spans, SPANS):
        state_at = at * N + of_state
        x = x_next
        x_ok = ok
        decay = tl.exp2(total_next * a2[None, :])
        # One tile ahead: the chain of a tile is shorter than its loads.
        at, ok = _spans_at(image, i + SPANS + index, k, num_spans, num_paths, border_n, c_ok, REVERSE)
        x_next = tl.load(change + at * N + of_state, mask=ok, other=0.0)
        total_next = tl.load(total + at + c[None, :], mask=ok, other=0.0)
        before = x
        for r in tl.static_range(SPANS):
            before = tl.where(index[:, None] == r, h, before)
            h = step_of(decay, index[:, None], r) * h + step_of(x, index[:, None], r)
        tl.store(change + state_at, before, mask=x_ok)


@_jit
def _scan_backward_kernel(
    u, delta, A, B, C, D, z, bias, paths, states, dy, dlast,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial,
    batch, length, num_paths, groups, per_group, span, num_spans,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, z_b, z_l, z_k, dy_b, dy_l, dy_k, du_b, du_l, du_k, dz_b, dz_l, dz_k,
    B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g, A_k, A_d, A_n, D_k, bias_k, paths_k, h_b, h_s, h_k, h_n, border_n,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, SOFTPLUS: tl.constexpr, LOOP_PATHS: tl.constexpr, WARPS: tl.constexpr,
    ADD_DU: tl.constexpr, ADD_DZ: tl.constexpr,
):  # fmt: skip
    """Chunks of TILES tiles from the last to the first; a chunk's states are found again from its border.

    The states before each tile of the chunk stay in registers; within a tile all of them do.
    """
    image, span_index, k0, group, block, c, c_ok = _locate(num_paths, groups, per_group, num_spans, LOOP_PATHS, BLOCK)
    n = tl.arange(0, NP)
    n_ok = n < N
    nc_ok = n_ok[:, None] & c_ok[None, :]
    step = tl.arange(0, T)
    index = tl.arange(0, T)[:, None, None]
    tile_index = tl.arange(0, TILES)[:, None, None]
    CHUNK: tl.constexpr = T * TILES
    dim = groups * per_group
    num_chunks = tl.cdiv(length, CHUNK)
    start = span_index * span
    end = tl.minimum(start + span, length)
    u_l = (u_l // ALIGN).to(OFFSET) * ALIGN
    delta_l = (delta_l // ALIGN).to(OFFSET) * ALIGN
    z_l = (z_l // ALIGN).to(OFFSET) * ALIGN
    dy_l = (dy_l // ALIGN).to(OFFSET) * ALIGN
    du_l = (du_l // ALIGN).to(OFFSET) * ALIGN
    dz_l = (dz_l // ALIGN).to(OFFSET) * ALIGN
    B_l = B_l.to(OFFSET)
    C_l = C_l.to(OFFSET)
    ddelta_l = dim.to(OFFSET) * num_paths
    dB_l = num_paths.to(OFFSET) * groups * N

    paths_here = 1
    if LOOP_PATHS:
        paths_here = num_paths
    for k in range(k0, k0 + paths_here):
        u_rows = u + tl.multiple_of(image * u_b + tl.cast(k, tl.int64) * u_k, ALIGN)
        delta_rows = delta + tl.multiple_of(image * delta_b + tl.cast(k, tl.int64) * delta_k, ALIGN)
        dy_rows = dy + tl.multiple_of(image * dy_b + tl.cast(k, tl.int64) * dy_k, ALIGN)
        du_rows = du + tl.multiple_of(image * du_b + tl.cast(k, tl.int64) * du_k, ALIGN)
        ddelta_rows = ddelta + image * length * ddelta_l + k * dim
        if z is not None:
            z_rows = z + tl.multiple_of(image * z_b + tl.cast(k, tl.int64) * z_k, ALIGN)
            dz_rows = dz + tl.multiple_of(image * dz_b + tl.cast(k, tl.int64) * dz_k, ALIGN)
        B_rows = B + image * B_b + tl.cast(k, tl.int64) * B_k + group.to(tl.int64) * B_g
        C_rows = C + image * C_b + tl.cast(k, tl.int64) * C_k + group.to(tl.int64) * C_g
        partial = (block.to(tl.int64) * batch + image) * length * dB_l + (k * groups + group) * N
        path = paths + tl.cast(k, tl.int64) * paths_k

        a_at = tl.cast(k, tl.int64) * A_k + c[None, :].to(tl.int64) * A_d + n[:, None].to(tl.int64) * A_n
        a2 = tl.load(A + a_at, mask=nc_ok, other=0.0).to(tl.float32) * LOG2E
        d = tl.zeros([BLOCK], tl.float32)
        if D is not None:
            d = tl.load(D + tl.cast(k, tl.int64) * D_k + c, mask=c_ok, other=0.0).to(tl.float32)
        shift = tl.zeros([BLOCK], tl.float32)
        if bias is not None:
            shift = tl.load(bias + tl.cast(k, tl.int64) * bias_k + c, mask=c_ok, other=0.0).to(tl.float32)
        g = tl.zeros([1, NP, BLOCK], tl.float32)
        if dlast is not None:
            h_at = image * h_b + span_index.to(tl.int64) * h_s + tl.cast(k, tl.int64) * h_k
            h_at = h_at + n[:, None].to(tl.int64) * h_n + c[None, :]
            g = tl.load(dlast + h_at, mask=nc_ok, other=0.0).to(tl.float32)[None, :, :]
        da = tl.zeros([NP, BLOCK], tl.float32)
        dd = tl.zeros([T, BLOCK], tl.float32)
        dshift = tl.zeros([T, BLOCK], tl.float32)

        first_chunk = start // CHUNK
        chunks_here = tl.cdiv(end - start, CHUNK)
        for i in range(chunks_here):
            chunk = first_chunk + chunks_here - 1 - i
            t_chunk = chunk * CHUNK
            tiles = tl.minimum(tl.cdiv(end - t_chunk, T), TILES)
            t_last = t_chunk + (tiles - 1) * T
            border = states + ((image * num_chunks + chunk) * num_paths + k) * N * border_n
            h = tl.load(border + n[:, None].to(tl.int64) * border_n + c[None, :], mask=nc_ok, other=0.0)[None, :, :]

            # The first loads of both sweeps together, then one tile ahead in each.
            last_token = visited(path, t_last + step, end, length)
            token_next = visited(path, t_chunk + step, t_last, length)
            delta_last = load_rows(delta_rows, last_token, delta_l, c, c_ok)
            u_last = load_rows(u_rows, last_token, u_l, c, c_ok)
            dy_next = load_rows(dy_rows, last_token, dy_l, c, c_ok)
            b_last = _load_states(B_rows, last_token, B_l, n, n_ok)
            c_next = _load_states(C_rows, last_token, C_l, n, n_ok)
            if z is not None:
                z_next = load_rows(z_rows, last_token, z_l, c, c_ok)
            delta_next = load_rows(delta_rows, token_next, delta_l, c, c_ok)
            u_next = load_rows(u_rows, token_next, u_l, c, c_ok)
            b_next = _load_states(B_rows, token_next, B_l, n, n_ok)
            token_after = visited(path, t_chunk + T + step, t_last, length)

            borders = tl.broadcast_to(h, (TILES, NP, BLOCK))
            for s in range(1, tiles):
                token = token_next
                delta_tile = delta_next
                u_tile = u_next
                b_tile = b_next
                token_next = token_after
                delta_next = load_rows(delta_rows, token_next, delta_l, c, c_ok)
                u_next = load_rows(u_rows, token_next, u_l, c, c_ok)
                b_next = _load_states(B_rows, token_next, B_l, n, n_ok)
                token_after = visited(path, t_chunk + (s + 1) * T + step, t_last, length)
                _, dt = _step_sizes(delta_tile, shift, t_chunk + (s - 1) * T + step, end, SOFTPLUS)
                _, _, _, h = _scan_tile(dt, _settled(dt * u_tile.to(tl.float32)), _states(b_tile, NP), a2, h, T)
                borders = tl.where(tile_index == s, h, borders)

            token_next = last_token
            delta_next = delta_last
            u_next = u_last
            b_next = b_last
            token_after = visited(path, tl.where(tiles > 1, t_last - T, -T) + step, end, length)
            for j in range(tiles):
                s = tiles - 1 - j
                position = t_chunk + s * T + step
                token = token_next
                delta_tile = delta_next
                uf = u_next.to(tl.float32)
                dout = dy_next.to(tl.float32)
                bf = _states(b_next, NP)
                cf = _states(c_next, NP)
                if z is not None:
                    zf = z_next.to(tl.float32)
                token_next = token_after
                delta_next = load_rows(delta_rows, token_next, delta_l, c, c_ok)
                u_next = load_rows(u_rows, token_next, u_l, c, c_ok)
                dy_next = load_rows(dy_rows, token_next, dy_l, c, c_ok)
                b_next = _load_states(B_rows, token_next, B_l, n, n_ok)
                c_next = _load_states(C_rows, token_next, C_l, n, n_ok)
                if z is not None:
                    z_next = load_rows(z_rows, token_next, z_l, c, c_ok)
                token_after = visited(path, tl.where(s > 1, t_chunk + (s - 2) * T, -T) + step, end, length)
                if ADD_DU:
                    du_before = load_rows(du_rows, tl.where(k > 0, token, -1), du_l, c, c_ok)
                if ADD_DZ:
                    dz_before = load_rows(dz_rows, tl.where(k > 0, token, -1), dz_l, c, c_ok)

                raw, dt = _step_sizes(delta_tile, shift, position, end, SOFTPLUS)
                h = step_of(borders, tile_index, s)
                decay, before, after, _ = _scan_tile(dt, _settled(dt * uf), bf, a2, h, T)
                if z is not None:
                    out = _sum_states(after * cf[:, :, None], WARPS) + d[None, :] * uf
                    sig = sigmoid(zf)
                    gate = dout * out * sig * (1.0 + zf * (1.0 - sig))
                    dout = dout * zf * sig
                    if ADD_DZ:
                        gate += dz_before
                    store_rows(dz_rows, token, dz_l, c, c_ok, gate)
                store_rows(dC + partial, token, dB_l, n, n_ok, _sum_channels(after * dout[:, None, :]))

                grad = dout[:, None, :] * cf[:, :, None]
                passed = grad
                for r in tl.static_range(T - 1, -1, -1):
                    here = step_of(grad, index, r) + g
                    grad = tl.where(index == r, here, grad)
                    g = step_of(decay, index, r) * here
                    passed = tl.where(index == r, g, passed)
                store_rows(dB + partial, token, dB_l, n, n_ok, _sum_channels(grad * (dt * uf)[:, None, :]))
                gb = _sum_states(grad * bf[:, :, None], WARPS)
                power = passed * before  # the gradient of delta * A
                da += tl.sum(power * dt[:, None, :], axis=0)
                ddt = _sum_states(power * a2[None, :, :], WARPS) * (1.0 / LOG2E) + gb * uf
                if SOFTPLUS:
                    ddt = ddt * sigmoid(raw)
                # Through steps that do not exist g passes on, so ddt is not zero there.
                dshift += tl.where((position < end)[:, None], ddt, 0.0)
                dd += dout * uf
                grad_u = dt * gb + d[None, :] * dout
                if ADD_DU:
                    grad_u += du_before
                store_rows(du_rows, token, du_l, c, c_ok, grad_u)
                store_rows(ddelta_rows, token, ddelta_l, c, c_ok, ddt)

        at = ((image * num_spans + span_index) * num_paths + k) * border_n
        tl.store(dA + at * N + n[:, None].to(tl.int64) * border_n + c[None, :], da, mask=nc_ok)
        if D is not None:
            tl.store(dD + at + c, tl.sum(dd, axis=0), mask=c_ok)
        if bias is not None:
            tl.store(dbias + at + c, tl.sum(dshift, axis=0), mask=c_ok)
        if dinitial is not None:
            state_at = (image * num_paths + k) * N * dim + c[None, :].to(tl.int64) * N + n[:, None]
            if span_index == 0:
                tl.store(dinitial + state_at[None, :, :], g, mask=nc_ok[None, :, :])
        if LOOP_PATHS:
            tl.debug_barrier()  # the next path reads rows that other threads of the program wrote


@triton.jit
def _column_sums(partial, rows, columns, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of these columns of (rows, columns), in an order that the shape alone decides."""
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for r in range(0, rows, ROWS):
        at = (r + row).to(tl.int64)[:, None] * columns + column[None, :]
        sums += tl.load(partial + at, mask=(r + row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["tokens", "blocks", "rows", "channels", "border_n"])
def _add_partials_kernel(
    partial_B, partial_C, partial_A, partial_D, partial_bias, dB, dC, dA, dD, dbias,
    tokens, blocks, rows, channels, border_n, N: tl.constexpr,
    TOKENS: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of which several programs have a part: one launch, for such a sum takes hardly longer than its start.

    dB and dC from (blocks, tokens); dA (K, D, N) from (rows, K, N, D), dD and dbias (K, D) from (rows, K, D).
    """
    pid = tl.program_id(0)
    of_tokens = tl.cdiv(tokens, TOKENS)
    of_A = tl.cdiv(channels * N, COLUMNS)
    if pid < of_tokens:
        at = pid.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        ok = at < tokens
        sum_B = tl.zeros([TOKENS], tl.float32)
        sum_C = tl.zeros([TOKENS], tl.float32)
        for b in range(0, blocks, AT_ONCE):
            for i in tl.static_range(AT_ONCE):  # in one piece, so that all these loads are under way at once
                here = tl.cast(b + i, tl.int64) * tokens + at
                there = at < tl.where(b + i < blocks, tokens, 0)
                sum_B += tl.load(partial_B + here, mask=there, other=0.0)
                sum_C += tl.load(partial_C + here, mask=there, other=0.0)
        tl.store(dB + at, sum_B.to(dB.dtype.element_ty), mask=ok)
        tl.store(dC + at, sum_C.to(dC.dtype.element_ty), mask=ok)
    elif pid < of_tokens + of_A:
        column = (pid - of_tokens) * COLUMNS + tl.arange(0, COLUMNS)
        sums = _column_sums(partial_A, rows, channels * N, column, ROWS, COLUMNS)
        k = column // border_n // N
        n = column // border_n % N
        at = (k * border_n + column % border_n) * N + n
        tl.store(dA + at, sums.to(dA.dtype.element_ty), mask=column < channels * N)
    else:
        column = (pid - of_tokens - of_A) * COLUMNS + tl.arange(0, COLUMNS)
        if partial_D is not None:
            sums = _column_sums(partial_D, rows, channels, column, ROWS, COLUMNS)
            tl.store(dD + column, sums.to(dD.dtype.element_ty), mask=column < channels)
        if partial_bias is not None:
            sums = _column_sums(partial_bias, rows, channels, column, ROWS, COLUMNS)
            tl.store(dbias + column, sums.to(dbias.dtype.element_ty), mask=column < channels)


class _Config(NamedTuple):
    states: int  # N rounded up to a power of two
    steps: int  # a tile
    warps: int  # they share out the states
    tiles: int = 1  # a chunk: the backward pass holds the states before each of them in registers
    resident: int = 12  # warps a multiprocessor that hide most of the latency
    registers: int | None = None  # a thread; a limit leaves room for more warps
    gluon: bool = False
    block: int = 32  # channels a program; one a lane in the portable kernels: a row of them is one coalesced access
    spans: int = 1  # a path


MAX_STATES = 256  # of a channel: eight warps then hold one step of them
_REGISTERS = 168  # a thread: twelve warps then fit on a multiprocessor of 65536
_SPAN_STEPS = 64  # shorter spans cost more in launches than they gain
_LONG = 320  # more steps pay for long tiles, of which the last one may be half empty
_BACKWARD_RESIDENT = 8  # programs of the Gluon kernel that a multiprocessor holds, of one warp with 255 registers


def _forward_config(num_states: int, fills: bool = True) -> _Config:
    """A thread holds up to 16 states of a channel, and 64 numbers of a tile.

    Where the batch does not fill the device with such programs, but has one for each multiprocessor, more warps
    share the states, 4 each, over a longer tile: they exchange sums at every tile, but nothing is walked
    twice as with spans.
    """
    states = power_of_2(num_states)
    warps = min(max(states // 16, 1), 8)
    steps = min(max(64 * warps // states, 4), 16)
    share = min(4, 8 // warps, 16 // steps, states // (4 * warps))
    if fills or share < 2:
        return _Config(states, steps, warps, registers=_REGISTERS)
    warps, steps = warps * share, steps * share
    return _Config(states, steps, warps, resident=warps, registers=_REGISTERS)  # one program a multiprocessor


def _backward_config(num_states: int) -> _Config:
    """A thread holds half of it, 4 states and 32 numbers: the tile is there as decay, state and gradient."""
    states = power_of_2(num_states)
    warps = min(max(states // 4, 1), 8)
    steps = min(32 * warps // states, 8)
    registers = _REGISTERS if steps * states // warps <= 8 else None  # more numbers would not fit
    # Warps that wait for each other at barriers need many programs; spans cost them little beside the rest.
    resident = 24 if warps > 1 else 8
    return _Config(states, steps, warps, tiles=8 if steps == 4 else 4, resident=resident, registers=registers)


def _gluon_forward_config(num_states: int, device: torch.device, programs: int, length: int) -> _Config:
    """By how many ``programs`` of 32 channels there are. Enough of them: one warp each, with tiles of 8 steps.

    Too few: four warps share out the states of a path. They take an eighth more instructions, but fill the device with
    a quarter of the programs; a longer walk pays for tiles of 32 steps. Fewer still: 16 channels a program, which take
    another fifth more, unless spans of a long path make up for the missing programs. The bounds are those of an H200
    (benchmarks/README.md).
    """
    states = power_of_2(num_states)
    single = _Config(states, 8, 1, resident=12, registers=168, gluon=True)  # ptxas would take 240
    wanted = _wanted_programs(device, single)
    if 8 * programs >= 7 * wanted:
        return single
    shared = _Config(states, 32 if length > _LONG else 16, 4, gluon=True)
    if programs < wanted // 18 and length > _LONG:
        spans = _gluon_spans(programs, length, multiprocessors(device), backward=False)
        if spans > 1:
            return shared._replace(spans=spans)
    return shared if programs >= wanted // 6 else _Config(states, 32, 4, block=16, gluon=True)


def _gluon_backward_config(num_states: int, device: torch.device, programs: int, length: int) -> _Config:
    """With ``programs`` of 32 channels; twice as many as the device holds are better than few that walk all paths."""
    states = power_of_2(num_states)
    steps = 64 // states  # a lane then holds 64 numbers of a tile
    spans = _gluon_spans(programs, length, multiprocessors(device), backward=True)
    return _Config(states, steps, 1, tiles=_chunk(num_states) // steps, resident=16, gluon=True, spans=spans)


@functools.lru_cache(maxsize=1024)
def _gluon_spans(programs: int, length: int, processors: int, backward: bool) -> int:
    """Into how many spans paths are cut, if ``programs`` walk one each on so many multiprocessors.

    The fewest steps one after the other, as they were timed on an H200 (benchmarks/README.md): a program's start takes
    as long as some 16; programs on a multiprocessor slow each other down, in the forward pass all and in the backward
    pass those of one scheduler; linking spans takes its time, and the first walk over them a part of a step's. One walk
    of the forward pass is that of 16 channels a program.
    """
    if backward and programs > processors * _BACKWARD_RESIDENT:
        return 1  # a last wave that is not full costs less than to walk everything twice

    def cost(spans: int) -> float:
        steps, spans = _span_steps(length, spans, 16 if backward else 32)
        if not backward:
            if spans == 1:
                return length * (0.31 * cdiv(2 * programs, processors) + 0.25)
            together = cdiv(programs * spans, processors)
            return (steps + 16) * max(together + 0.1, 0.55 * together + 1.2) + 5 * spans
        waves, rest = divmod(programs * spans / (processors * _BACKWARD_RESIDENT), 1)
        # By programs a scheduler: one, one or two, two.
        waves += 0.0 if rest == 0 else 0.6 if rest <= 0.5 else 0.87 if rest <= 0.75 else 1.0
        first = 0 if spans == 1 else 0.1 + 0.03 * waves
        return (steps + 16) * (waves + first) + (12 if spans > 1 else 0)

    most = min(length // (_SPAN_STEPS if backward else 32), math.isqrt(length))
    return min(range(1, max(most, 1) + 1), key=cost)


def _span_steps(length: int, spans: int, tile: int) -> tuple[int, int]:
    """Steps of a span, of whole tiles, if a path is cut into about so many, and how many there are then."""
    steps = cdiv(cdiv(length, spans), tile) * tile
    return steps, cdiv(length, steps)


def _in_gluon(num_states: int) -> bool:
    return HAS_GLUON and 4 < num_states <= 16


def _uses_gluon(num_states: int, device: torch.device) -> bool:
    return _in_gluon(num_states) and device.type != "cpu"


def _chunk(num_states: int) -> int:
    """Steps between saved states: whole tiles of the forward pass, which saves them between its tiles."""
    if _in_gluon(num_states):
        return 16
    config = _backward_config(num_states)
    return config.steps * config.tiles


def _shares(num_states: int, num_paths: int, device: torch.device) -> int:
    """Among how many scans of the Gluon kernels a lone path's states are shared out, which are more than these hold.

    States know nothing of each other, so such scans read the same tokens, and what they give is added: as paths that
    are walked alike. It takes about half the time of the portable kernels (benchmarks/README.md).
    """
    if num_paths == 1 and not _in_gluon(num_states):
        for shares in range(2, num_states):
            if num_states % shares == 0 and _uses_gluon(num_states // shares, device):
                return shares
    return 1


def _shared_out(shares: int, delta, A, B, C, D, delta_bias, paths) -> tuple[Tensor | None, ...]:
    """These arguments of a path as those of ``shares`` paths, to be added; views, but for D."""

    def states(matrix: Tensor) -> Tensor:
        return matrix.squeeze(2).unflatten(-1, (shares, -1)).transpose(2, 3)

    return (
        delta.expand(-1, -1, shares, -1),
        _states_shared_out(A.unsqueeze(0), shares)[0],
        states(B),
        states(C),
        None if D is None else F.pad(D, (0, 0, 0, shares - 1)),
        None if delta_bias is None else delta_bias.expand(shares, -1),
        paths.expand(shares, -1),
    )


def _states_shared_out(state: Tensor, shares: int) -> Tensor:
    """(batch, 1, D, N) as (batch, shares, D, N / shares)."""
    return state.squeeze(1).unflatten(-1, (shares, -1)).transpose(1, 2)


def _states_together(state: Tensor) -> Tensor:
    """The other way round."""
    return state.transpose(1, 2).flatten(2).unsqueeze(1)


def new_states(u: Tensor, delta: Tensor, B: Tensor, num_states: int, save: bool) -> Tensor:
    """For the border states (batch, chunks, K, numbers) of steps (batch, L, K, D); empty where none are saved.

    In float32 (N, D), of the Gluon kernels (D, N) with N rounded up to a power of two. Where u and delta are bfloat16
    these have 16 bits too: float16 with exponents that neighbours share, which lie behind the states
    (``scan_gluon.py``). Rounded to bfloat16, which has three bits fewer, small gradients of A were off by five percent.
    """
    batch, length, num_paths, dim = delta.shape
    if (shares := _shares(num_states, num_paths, delta.device)) > 1:
        num_paths, num_states = shares, num_states // shares
    numbers, dtype = num_states * dim, torch.float32
    if _uses_gluon(num_states, delta.device):
        numbers = power_of_2(num_states) * dim
        if u.dtype == delta.dtype == torch.bfloat16:
            groups = B.shape[3]
            numbers, dtype = numbers + 8 * groups * cdiv(dim // groups, 16), torch.float16
        numbers = cdiv(numbers, 32) * 32  # aligned, for wide words
    chunks = cdiv(length, _chunk(num_states))
    return delta.new_empty((batch, chunks, num_paths, numbers) if save else (0, 0, 0, 0), dtype=dtype)


def wants_output(u: Tensor, A: Tensor, z: Tensor | None, merge: bool) -> bool:
    """Whether paths are added and gated in a pass of its own, whose result the backward pass then takes.

    Where they share the gate. Not in float16, in which a small gate would leave too little of what it gates.
    """
    num_paths, _, num_states = A.shape
    added = num_paths if merge and num_paths > 1 else _shares(num_states, num_paths, u.device)
    return added > 1 and z is not None and z.shape[2] == 1 and u.dtype != torch.float16


def _wanted_programs(device: torch.device, config: _Config) -> int:
    """How many programs fill the device."""
    if device.type != "cuda":
        return 1
    return multiprocessors(device) * config.resident // config.warps


class _Plan(NamedTuple):
    loop_paths: bool  # a program walks all paths, and sums over them where that is asked for
    span: int
    num_spans: int
    programs: int


def _spans(wanted: int, programs: int, length: int, least: int) -> int:
    """Of the portable kernels, if ``programs`` walk a path each; 1 where fewer than ``least`` would be left."""
    # Linking them takes time too, one span after the other.
    spans = min(wanted // max(programs, 1), length // _SPAN_STEPS, math.isqrt(length))
    return spans if spans >= least else 1


def _plan(batch, length, num_paths, blocks, num_states, device, config, sum_over_paths, least_spans) -> _Plan:
    """By shape and device alone, so that equal calls give equal bits."""
    wanted = _wanted_programs(device, config)
    programs = batch * blocks
    # A few programs short of full is better than partial results of every path in memory.
    if sum_over_paths and 8 * programs >= 7 * wanted:
        return _Plan(True, length, 1, programs)
    programs *= num_paths
    # Each span is walked twice. The first walk costs two thirds of a forward pass, but a fifth of a backward pass.
    spans = config.spans if config.gluon else _spans(wanted, programs, length, least_spans)
    if spans == 1:
        return _Plan(False, length, 1, programs)
    span, spans = _span_steps(length, spans, max(_chunk(num_states), config.steps))
    return _Plan(False, span, spans, programs * spans)


class _Arguments(NamedTuple):
    tensors: dict
    sizes: dict
    strides: dict
    align: int
    offset: tl.dtype

    def blocks(self, config: _Config) -> int:
        """Programs that share the channels of a path of an image."""
        return self.sizes["groups"] * cdiv(self.sizes["per_group"], config.block)


def _names(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    return _named(name, _form(tensor), axes)


_Form = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


def _form(tensor: Tensor | None) -> _Form | None:
    return None if tensor is None else (tensor.shape, tensor.stride())


def _named(name: str, form: _Form | None, axes: str) -> dict[str, int]:
    if form is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    # A path axis of size 1 is read by every path.
    strides = (0 if size == 1 else stride for size, stride in zip(*form, strict=True))
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


@functools.lru_cache(maxsize=1024)
def _layout(u, delta, A, B, C, D, z, bias, paths) -> tuple[dict, dict, int, tl.dtype]:
    """Sizes, strides, alignment of rows and type of offsets, from the tensors' forms; to work them out takes 0.1 ms."""
    (_, length, num_paths, dim), (_, _, _, *of_state) = delta[0], B[0]
    rows = _named("u", u, "blk") | _named("delta", delta, "blk") | _named("z", z, "blk")
    states = _named("B", B, "blkg") | _named("C", C, "blkg")
    strides = rows | states | _named("A", A, "kdn")
    strides |= _named("D", D, "k") | _named("bias", bias, "k") | _named("paths", paths, "k")
    groups = of_state[0]
    sizes = {
        "length": length, "num_paths": num_paths, "groups": groups, "per_group": dim // groups, "border_n": dim,
        "STATE_ALIGN": alignment(*states.values()),
    }  # fmt: skip
    # The rows of the arguments, of ddelta, and of what is added up to dB and dC.
    rows_l = (stride for name, stride in strides.items() if name.endswith("_l"))
    offset = offset_type(length, num_paths * dim, num_paths * math.prod(of_state), *rows_l)
    return sizes, strides, alignment(dim, *rows.values()), offset


def _arguments(u, delta, A, B, C, D, z, delta_bias, paths) -> _Arguments:
    check_dtypes(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    if A.shape[-1] > MAX_STATES:
        raise RuntimeError(
            f"backend 'triton' holds up to {MAX_STATES} states a channel, but A has {A.shape[-1]}; "
            "use backend='reference'"
        )
    u, delta, B, C = dense(u), dense(delta), dense(B), dense(C)
    z, D, delta_bias = (None if t is None else dense(t) for t in (z, D, delta_bias))
    tensors = {
        "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": delta_bias, "paths": dense(paths),
    }  # fmt: skip
    return _Arguments(tensors, *_layout(*map(_form, tensors.values())))


def _state_rows(state: Tensor | None) -> Tensor | None:
    """(batch, K, D, N) as (batch, 1, K, N, D): dense in the channels, as the kernels read it."""
    return None if state is None else state.transpose(2, 3).contiguous().unsqueeze(1)


def _span_changes(plan: _Plan, kernel, given: dict, x: _Arguments, config: _Config) -> tuple[tuple, dict]:
    """The launch that finds what each span does to a state of zeros, (batch, spans, K, N, D), and its sum of steps."""
    batch, _, num_paths, dim = x.tensors["delta"].shape
    shape = batch, plan.num_spans, num_paths
    changes = {
        "change": x.tensors["u"].new_empty(*shape, given["N"], dim, dtype=torch.float32),
        "total": x.tensors["u"].new_empty(*shape, dim, dtype=torch.float32),
    }
    return (kernel, (plan.programs,), given | changes | {"initial": None}, config.warps), changes


def _link(plan: _Plan, given: dict, changes: dict, state: Tensor | None, reverse: bool) -> tuple[tuple, dict]:
    """The launch that gives the state at the start of every span (the gradient at its end if ``reverse``), and where.

    In the place of the spans' changes.
    """
    linked = given | changes | dict(initial=state, REVERSE=reverse, SPANS=16, **_names("h", state, "bskn"))
    # One warp, so that the spans of a tile lie in one thread.
    launch = _link_spans_kernel, (plan.programs // plan.num_spans, given["N"]), linked, 1
    return launch, _names("h", changes["change"], "bskn")


def _launch(launches: list[tuple], plan: _Plan, device: torch.device) -> None:
    if plan.num_spans > 1:  # there are so many kernels then that to compile them one by one takes its time
        compile_together(launches, device)
    for given in launches:
        launch(*given)


def selective_scan_forward(
    u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, save_states, delta_weight=None,
    overwrite_delta=False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y, the last state (batch, K, D, N), and the border states (empty unless asked for).

    With ``delta_weight`` the step sizes are low-rank, and expanded first. y is written over step sizes that nobody
    else has or wants: a program reads those of a tile before it writes there, and no other program's.
    """
    delta = step_sizes(delta, delta_weight)
    if (shares := _shares(A.shape[-1], delta.shape[2], u.device)) > 1:
        delta, A, B, C, D, delta_bias, paths = _shared_out(shares, delta, A, B, C, D, delta_bias, paths)
        if initial_state is not None:
            initial_state = _states_shared_out(initial_state, shares)
        y, last_state, states = selective_scan_forward(
            u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, True, save_states
        )
        return y if merge else y.unsqueeze(2), _states_together(last_state), states
    gate = z if wants_output(u, A, z, merge) else None
    if gate is not None:
        check_dtypes(z=gate)
        z = None
    overwrite = (overwrite_delta or delta_weight is not None) and not merge and not save_states
    overwrite = overwrite and delta.dtype == u.dtype and delta.is_contiguous()  # not one for all paths
    x = _arguments(u, delta, A, B, C, D, z, delta_bias, paths)
    check_dtypes(initial_state=initial_state)
    batch, length, num_paths, dim = delta.shape
    num_states = A.shape[-1]
    # The parts of two paths are added in less time than one walk takes to add to the other's (5 % of the scan in Vim).
    sum_over_paths = merge and num_paths > 2
    config = _forward_config(num_states)
    programs = batch * num_paths * x.blocks(config)
    if _uses_gluon(num_states, u.device):
        config = _gluon_forward_config(num_states, u.device, programs, length)
        sum_over_paths &= config.warps == 1  # the rows of one path are read by other warps than wrote them
    else:
        shared = _forward_config(num_states, fills=False)
        if _wanted_programs(u.device, shared) <= programs < _wanted_programs(u.device, config) // 2:
            config = shared
            sum_over_paths = False  # programs are few enough already
    plan = _plan(
        batch, length, num_paths, x.blocks(config), num_states, u.device, config, sum_over_paths, least_spans=3
    )  # fmt: skip
    initial = _state_rows(initial_state)
    last_state = u.new_empty(batch, num_paths, dim, num_states, dtype=torch.float32)
    states = new_states(u, delta, B, num_states, save_states)
    # The gate's gradient is found from the rounded sum of many parts: not of rounded ones.
    kept = torch.float32 if gate is not None and num_paths > 2 and save_states else u.dtype
    parts = 1 if plan.loop_paths else num_paths
    y = delta if overwrite else new_by_path(u, batch, length, parts, dim, merge, kept)
    given = dict(
        **x.tensors, **x.sizes, **x.strides, **_names("y", y, "blk"), **_names("h", initial, "bskn"),
        initial=initial, y=y, last_state=last_state, states=states, saves=int(save_states), change=None, total=None,
        border_size=states.shape[-1],
        span=plan.span, num_spans=plan.num_spans, N=num_states, NP=config.states, T=config.steps, BLOCK=config.block,
        CHUNK=_chunk(num_states), ALIGN=x.align, OFFSET=x.offset, SOFTPLUS=delta_softplus, LOOP_PATHS=plan.loop_paths,
        WARPS=config.warps,
    )  # fmt: skip
    launches: list[tuple] = []
    kernels = _kernels(config.gluon)
    if plan.num_spans > 1 and plan.programs > 0:
        first, changes = _span_changes(plan, kernels.span_forward, given | {"y": None}, x, config)
        launches = [first]
        if config.gluon:
            given |= changes
        else:
            linked, strides = _link(plan, given, changes, initial, reverse=False)
            launches.append(linked)
            given |= {"initial": changes["change"], **strides}
    if plan.programs > 0:
        launches.append((kernels.forward, (plan.programs,), given, config.warps, config.registers))
    with on_device(u):
        _launch(launches, plan, u.device)
    if merge:
        y = sum_of_paths(y) if gate is None else gated_sum(y, gate, u.dtype)
    return y, last_state, states


class _Kernels(NamedTuple):
    forward: JITFunction
    span_forward: JITFunction  # what a span does to the state
    backward: JITFunction
    span_backward: JITFunction


@functools.cache
def _kernels(gluon: bool) -> _Kernels:
    if not gluon:
        return _Kernels(_scan_forward_kernel, _span_forward_kernel, _scan_backward_kernel, _span_backward_kernel)
    from . import scan_gluon  # only here: older Triton has no Gluon

    return _Kernels(
        scan_gluon.scan_forward_kernel,
        scan_gluon.scan_forward_kernel,
        scan_gluon.scan_backward_kernel,
        scan_gluon.span_backward_kernel,
    )


def _add_partials(partial_A, partial_B, partial_C, partial_D, partial_bias, sums: dict[str, Tensor | None]) -> tuple:
    """The launch that adds them into ``sums``, which has an entry for each gradient."""
    rows, num_paths, num_states, dim = partial_A.shape
    given = dict(
        partial_A=partial_A, partial_B=partial_B, partial_C=partial_C, partial_D=partial_D, partial_bias=partial_bias,
        tokens=partial_B[0].numel(), blocks=len(partial_B), rows=rows, channels=num_paths * dim, border_n=dim,
        N=num_states, TOKENS=512, AT_ONCE=4, ROWS=16, COLUMNS=32, **sums,
    )  # fmt: skip
    columns = [num_paths * dim * num_states]
    if partial_D is not None or partial_bias is not None:
        columns.append(num_paths * dim)
    programs = sum(cdiv(count, given["COLUMNS"]) for count in columns)
    programs += cdiv(given["tokens"], given["TOKENS"])
    return _add_partials_kernel, (programs,), given, 4


def selective_scan_backward(
    dy, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, y=None,
    overwrite_delta=False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; None where there is no input.

    That of delta is written over step sizes that nobody else has or wants, as y is in the forward pass. ``y`` is the
    result of the forward pass, where its gate was apart.
    """
    if (shares := _shares(A.shape[-1], delta.shape[2], u.device)) > 1:
        return _backward_of_shares(
            shares, dy if merge else dy.squeeze(2), dlast_state, states, u, delta, A, B, C, D, z, delta_bias, paths,
            initial_state, delta_softplus, y,
        )  # fmt: skip
    gate_gradient = None
    if y is not None:
        dy, gate_gradient = gated_sum_backward(dy, y, z)
        z = None
    x = _arguments(u, delta, A, B, C, D, z, delta_bias, paths)
    check_dtypes(dy=dy, initial_state=initial_state, dlast_state=dlast_state)
    batch, length, num_paths, dim = delta.shape
    num_states, groups = A.shape[-1], B.shape[3]
    gluon = _uses_gluon(num_states, u.device)
    config = _backward_config(num_states)
    if gluon:
        programs = batch * num_paths * x.blocks(config)
        config = _gluon_backward_config(num_states, u.device, programs, length)
    u_shared = u.shape[2] < num_paths
    z_shared = z is not None and z.shape[2] < num_paths
    plan = _plan(
        batch, length, num_paths, x.blocks(config), num_states, u.device, config, u_shared or z_shared, least_spans=2
    )  # fmt: skip
    dy = dense(dy.unsqueeze(2) if merge else dy)
    dlast = _state_rows(dlast_state)
    borders = states.view(torch.int32) if states.dtype == torch.float16 else states  # two numbers a word

    def token_grad(tensor: Tensor, shared: bool) -> tuple[Tensor, bool]:
        """Where the kernel writes a gradient of (batch, L, 1 or K, D), and whether it sums over the paths."""
        if not shared:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format), False
        if plan.loop_paths:
            return u.new_empty(batch, length, 1, dim), True
        return new_by_path(u, batch, length, num_paths, dim, merge=True), False

    def partial(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return u.new_empty(shape, dtype=dtype)

    def total(tensor: Tensor | None, *shape: int) -> Tensor | None:
        return None if tensor is None else tensor.new_empty(shape)

    du, add_du = token_grad(u, u_shared)
    dz, add_dz = (None, False) if z is None else token_grad(z, z_shared)
    # Several warps of a program may be at different tiles.
    overwrite = overwrite_delta and delta.is_contiguous() and config.warps == 1
    ddelta = delta if overwrite else torch.empty_like(delta, memory_format=torch.contiguous_format)
    # One sum a program, added up afterwards in a fixed order: equal bits every time, which atomics would not give.
    rows = batch * plan.num_spans
    partial_A = partial(rows, num_paths, num_states, dim)
    partial_D = None if D is None else partial(rows, num_paths, dim)
    partial_bias = None if delta_bias is None else partial(rows, num_paths, dim)
    # The same for the blocks of channels. Many numbers, so no finer than what they add up to; but not in float16, for
    # which a part may be too large where the sum is not.
    partial_dtype = torch.bfloat16 if B.dtype == torch.bfloat16 else torch.float32
    partial_B = partial(x.blocks(config) // groups, batch, length, num_paths, groups, num_states, dtype=partial_dtype)
    partial_C = torch.empty_like(partial_B)
    sums = dict(
        dA=total(A, num_paths, dim, num_states), dB=total(B, *B.shape), dC=total(C, *C.shape),
        dD=total(D, num_paths, dim), dbias=total(delta_bias, num_paths, dim),
    )  # fmt: skip
    dinitial = None
    if initial_state is not None:
        dinitial = u.new_empty(batch, num_paths, dim, num_states, dtype=torch.float32)
    given = dict(
        **x.tensors, **x.sizes, **x.strides, **_names("dy", dy, "blk"), **_names("du", du, "blk"),
        **_names("dz", dz, "blk"), **_names("h", dlast, "bskn"), batch=batch, states=borders,
        border_size=borders.shape[-1], dy=dy, dlast=dlast,
        du=du, ddelta=ddelta, dA=partial_A, dB=partial_B, dC=partial_C, dD=partial_D, dz=dz, dbias=partial_bias,
        dinitial=dinitial, span=plan.span, num_spans=plan.num_spans, N=num_states, NP=config.states, T=config.steps,
        BLOCK=config.block,
        TILES=config.tiles, WARPS=config.warps, ALIGN=alignment(x.align, *dy.stride()[:-1]),
        OFFSET=x.offset if offset_type(length, dy.stride(1)) is tl.int32 else tl.int64, SOFTPLUS=delta_softplus,
        LOOP_PATHS=plan.loop_paths, ADD_DU=add_du, ADD_DZ=add_dz,
    )  # fmt: skip
    launches: list[tuple] = []
    kernels = _kernels(config.gluon)
    if plan.num_spans > 1 and plan.programs > 0:
        first, changes = _span_changes(plan, kernels.span_backward, given, x, config)
        linked, strides = _link(plan, given, changes, dlast, reverse=True)
        launches = [first, linked]
        given |= {"dlast": changes["change"], **strides}
    if plan.programs > 0:
        launches.append((kernels.backward, (plan.programs,), given, config.warps, config.registers))
    if num_paths * dim > 0:
        launches.append(_add_partials(partial_A, partial_B, partial_C, partial_D, partial_bias, sums))
    with on_device(u):
        _launch(launches, plan, u.device)

    def summed(grad: Tensor, like: Tensor) -> Tensor:
        return (sum_of_paths(grad).unsqueeze(2) if grad.shape[2] > like.shape[2] else grad).to(like.dtype)

    return (
        summed(du, u),
        ddelta,
        sums["dA"],
        sums["dB"],
        sums["dC"],
        sums["dD"],
        summed(dz, z) if dz is not None else gate_gradient,
        sums["dbias"],
        dinitial.to(initial_state.dtype) if dinitial is not None else None,
    )


def _backward_of_shares(
    shares, dy, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, y
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of a path whose states are shared out, (batch, L, D) of y."""
    each = _shared_out(shares, delta, A, B, C, D, delta_bias, paths)
    dlast, initial = (
        None if state is None else _states_shared_out(state, shares) for state in (dlast_state, initial_state)
    )
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = selective_scan_backward(
        dy, dlast, states, u, *each[:5], z, *each[5:], initial, delta_softplus, True, y
    )
    return (
        du,
        sum_of_paths(ddelta).unsqueeze(2),
        _states_together(dA.unsqueeze(0))[0],
        *(grad.transpose(2, 3).flatten(3).unsqueeze(2) for grad in (dB, dC)),
        None if dD is None else dD[:1],
        dz,
        None if dbias is None else dbias.sum(0, keepdim=True),
        None if dinitial is None else _states_together(dinitial),
    )
