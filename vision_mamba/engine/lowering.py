"""Our operators in plain PyTorch around one recurrence, which is all that ``onnx_scan`` has to translate.

A scan becomes gathers, elementwise operators and one ``Scan`` node, whatever the number of tokens. A loop written
out would have a dozen nodes a token, and a scan by doubling keeps all states of all tokens in memory at each level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_mamba import ops  # noqa: F401  # defines the operators that are replaced here


@torch.library.custom_op(
    "vision_mamba::recurrence",
    mutates_args=(),
    schema="(Tensor state, Tensor steps, Tensor x, Tensor B, Tensor C, Tensor A) -> (Tensor, Tensor)",
)
def _recurrence(state, steps, x, B, C, A):
    """``h_t = exp(steps_t A) h_(t-1) + B_t x_t``, ``y_t = C_t h_t``: the last state and y.

    state (..., N, D); steps, x (L, ..., 1, D); B (L, ..., N, 1); C (L, ..., 1, N); A broadcasts to the state.
    """
    y = []
    for t in range(len(steps)):
        state = torch.exp(steps[t] * A) * state + B[t] * x[t]
        y.append(C[t] @ state)
    return state.clone(memory_format=torch.contiguous_format), torch.stack(y)


@_recurrence.register_fake
def _(state, steps, x, B, C, A):
    return state.new_empty(state.shape), steps.new_empty(steps.shape)


@torch.library.custom_op(
    "vision_mamba::scalar_recurrence", mutates_args=(), schema="(Tensor state, Tensor decay, Tensor x) -> Tensor"
)
def _scalar_recurrence(state, decay, x):
    """``h_t = decay_t h_(t-1) + x_t``: all states, (L, ...)."""
    states = []
    for t in range(len(x)):
        state = decay[t] * state + x[t]
        states.append(state)
    return torch.stack(states)


@_scalar_recurrence.register_fake
def _(state, decay, x):
    return x.new_empty(x.shape)


def _scan(u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, save_states, backend):
    batch, length, num_paths, dim = delta.shape
    groups, num_states = B.shape[3:]
    visit = paths.t().long()

    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    steps = _gather(delta, visit)
    x = steps * _gather(u, visit)
    steps, x = (t.unflatten(3, (groups, 1, dim // groups)) for t in (steps, x))
    B, C = _gather(B, visit).unsqueeze(5), _gather(C, visit).unsqueeze(4)
    A = A.reshape(num_paths, 1, groups, dim // groups, num_states).transpose(3, 4)
    if initial_state is None:
        state = A.new_zeros(num_paths, batch, groups, num_states, dim // groups)
    else:
        state = initial_state.reshape(batch, num_paths, groups, dim // groups, num_states).permute(1, 0, 2, 4, 3)
    if num_states == 1:  # states are no larger than the tokens: all but the recurrence is done for all tokens at once
        states = torch.ops.vision_mamba.scalar_recurrence(state, torch.exp(steps * A), B * x)
        last, y = states[-1], C * states
    else:
        last, y = torch.ops.vision_mamba.recurrence(state, steps, x, B, C, A)

    y = _gather(y.reshape(length, num_paths, batch, dim).permute(2, 0, 1, 3), _inverse(visit)).permute(2, 0, 1, 3)
    if D is not None:
        y = y + D * u
    if z is not None and z.shape[2] > 1:
        y, z = y * F.silu(z), None
    if merge:
        y = y.sum(2)
    if z is not None:
        y = y * F.silu(z.squeeze(2) if merge else z)
    last = last.permute(1, 0, 2, 4, 3).reshape(batch, num_paths, dim, num_states)
    return y.contiguous(), last.contiguous(), y.new_empty(0, 0, 0, 0, 0)


def _conv(x, weight, bias, paths, silu, backend):
    length, width = x.shape[1], weight.shape[-1]
    tokens = x.index_select(1, paths.flatten().long()).unflatten(1, paths.shape)
    tokens = F.pad(tokens, (0, 0, width - 1, 0))  # (batch, K, L + width - 1, D)
    y = tokens[:, :, :length] * weight[:, None, :, 0]
    for tap in range(1, width):
        y = y + tokens[:, :, tap : tap + length] * weight[:, None, :, tap]
    if bias is not None:
        y = y + bias[:, None]
    if silu:
        y = F.silu(y)
    return _gather(y.transpose(1, 2), _inverse(paths.t().long())).permute(2, 0, 1, 3).contiguous()


def _add_norm(x, residual, weight, bias, eps, rms, residual_dtype, backend, dtype):
    total = x if residual is None else x + residual
    if rms:
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight
        normed = normed if bias is None else normed + bias
    else:
        normed = F.layer_norm(total, weight.shape, weight, bias, eps)
    alone = residual is None and residual_dtype == x.dtype  # the operator then gives no sum, and its caller takes x
    return normed.to(dtype), x.new_empty(0) if alone else total.to(residual_dtype, copy=True)


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    """(batch, L, K or 1, ...) and a token a path (L, K) -> (L, K, batch, ...).

    Of rows, each of them whole: an index for every element, as ``Tensor.gather`` takes, would be as large as the data.
    """
    rows = tensor.permute(1, 2, 0, *range(3, tensor.ndim))
    if tensor.shape[2] > 1:
        index = index * tensor.shape[2] + torch.arange(tensor.shape[2], device=index.device)
    return rows.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def _inverse(visit: Tensor) -> Tensor:
    """When each path comes to each token: (L, K) -> (L, K)."""
    time = torch.arange(visit.shape[0], device=visit.device).unsqueeze(1).expand_as(visit)
    return torch.zeros_like(visit).scatter(0, visit, time)


def decompositions() -> dict[Any, Callable]:
    """For ``ExportedProgram.run_decompositions``: what is left of our operators are the two recurrences.

    float32 alone: ONNX is exported in float32, and under autocast the operators compute more than these in it.
    """
    own = torch.ops.vision_mamba
    return {
        own.selective_scan.default: _scan,
        own.causal_conv1d.default: _conv,
        own.add_norm.default: _add_norm,
    }
