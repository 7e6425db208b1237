"""Step sizes, B and C of all paths from their own tokens in one kernel, for inference.

Two products of which the second reads what the first one gives: its rank is so small that a program holds it for its
tokens. So the tokens are read once, and nothing but step sizes, B and C is written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .runtime import cdiv, launch, on_device, power_of_2

ROWS = 64  # tokens a program


@triton.jit(do_not_specialize=["tokens"])
def _scan_inputs_kernel(
    x, weight, step_weight, delta, states, tokens, paths,
    D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, STATES: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """RANKS and STATES are powers of two of at least 16 that have room for the rank, and for B and C."""
    k = tl.program_id(0) % paths
    token = (tl.program_id(0) // paths).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = (token < tokens)[:, None]
    width = paths * D  # of the rows of tokens, weights and steps, of which D are the path's
    rank = tl.arange(0, RANKS)
    state = tl.arange(0, STATES)
    inner = tl.arange(0, INNER)
    x_rows = x + token[:, None] * width + k * D
    # The weights' rows: all paths' ranks, then their B, then their C.
    rank_rows = weight + (k * RANK + rank)[None, :] * width + k * D
    state_rows = weight + (paths * (RANK + state // N * N) + k * N + state % N)[None, :] * width + k * D
    low = tl.zeros([ROWS, RANKS], tl.float32)
    found = tl.zeros([ROWS, STATES], tl.float32)
    for c in range(0, D, INNER):
        column = c + inner
        tile = tl.load(x_rows + column[None, :], mask=ok & (column < D)[None, :], other=0.0)
        inside = (column < D)[:, None]
        of_rank = tl.load(rank_rows + column[:, None], mask=inside & (rank < RANK)[None, :], other=0.0)
        of_state = tl.load(state_rows + column[:, None], mask=inside & (state < 2 * N)[None, :], other=0.0)
        low = tl.dot(tile, of_rank, low)
        found = tl.dot(tile, of_state, found)
    # (tokens, B and C, paths, N)
    state_at = token[:, None] * (2 * paths * N) + ((state // N * paths + k) * N + state % N)[None, :]
    tl.store(states + state_at, found.to(states.dtype.element_ty), mask=ok & (state < 2 * N)[None, :])
    low = low.to(x.dtype.element_ty)
    delta_rows = delta + token[:, None] * width + k * D
    step_rows = step_weight + (k * RANK + rank)[:, None] * width + k * D
    for c in tl.static_range(0, D, COLUMNS):
        column = c + tl.arange(0, COLUMNS)
        inside = (column < D)[None, :]
        steps = tl.load(step_rows + column[None, :], mask=inside & (rank < RANK)[:, None], other=0.0)
        tl.store(delta_rows + column[None, :], tl.dot(low, steps).to(delta.dtype.element_ty), mask=ok & inside)


def scan_inputs(x: Tensor, weight: Tensor, step_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``dt, B, C = x @ weight.T``, ``delta = dt @ step_weight``, each path's with its own part of the matrices.

    Sums in float32, rounded where two products would round them.

    Args:
        x: tokens of each path, (batch, L, K, D), bfloat16 or float16, as the weights.
        weight: (K (R + 2N), K D), zero but for each path's own columns: rows of all paths' ranks, of their B, their C.
        step_weight: (K R, K D), zero but for the diagonal blocks.

    Returns:
        delta (batch, L, K, D), B and C (batch, L, K, N).
    """
    batch, length, num_paths, dim = x.shape
    rank = len(step_weight) // num_paths
    num_states = (len(weight) // num_paths - rank) // 2
    delta = x.new_empty(x.shape)
    states = x.new_empty(batch, length, 2, num_paths, num_states)
    given = dict(
        x=x.contiguous(), weight=weight.contiguous(), step_weight=step_weight.contiguous(), delta=delta, states=states,
        tokens=batch * length, paths=num_paths, D=dim, RANK=rank, N=num_states,
        ROWS=ROWS, RANKS=max(power_of_2(rank), 16), STATES=max(power_of_2(2 * num_states), 16),
        INNER=64, COLUMNS=min(max(power_of_2(dim), 16), 128),
    )  # fmt: skip
    if delta.numel() > 0:
        with on_device(x):
            launch(_scan_inputs_kernel, (cdiv(batch * length, ROWS) * num_paths,), given, 4)
    return delta, states[:, :, 0], states[:, :, 1]
