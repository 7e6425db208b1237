"""The definitions, in plain PyTorch: slow, readable, any float dtype, differentiable.

Nothing fast imports this file; the tests compare every backend with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    paths: Tensor | None = None,
    merge: str = "none",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments and result as :func:`vision_mamba.ops.selective_scan`.

    Per path and channel, with the tokens taken in the order of the path
    (Gu & Dao 2023, "Mamba", section 3.2, zero-order hold for A and Euler for B)::

        h_t = exp(delta_t * A) * h_(t-1) + delta_t * B_t * u_t
        y_t = <C_t, h_t> + D * u_t,    then    y_t * silu(z_t)

    Computes in float64 for float64 inputs and in float32 otherwise. With ``chunk``, pieces of so many steps run side
    by side and are then linked: the same numbers up to rounding, in time for a long sequence.
    """
    batch, length, dim = u.shape[0], u.shape[1], u.shape[-1]
    has_paths_axis = delta.ndim == 4 or (paths is not None and paths.ndim == 2)
    if paths is None:
        num_paths = delta.shape[2] if delta.ndim == 4 else 1
        paths = torch.arange(length, device=u.device).expand(num_paths, length)
    paths = paths.reshape(-1, length).long()
    num_paths, num_states = paths.shape[0], A.shape[-1]

    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    out_dtype = u.dtype

    def per_path(tensor: Tensor, has_paths: bool) -> Tensor:  # (batch, L, ...) -> (batch, L, K, ...)
        tensor = tensor.to(dtype)
        tensor = tensor if has_paths else tensor.unsqueeze(2)
        return tensor.expand(-1, -1, num_paths, *tensor.shape[3:])

    def parameter(tensor: Tensor, ndim: int) -> Tensor:  # (...) or (K, ...) -> (K, ...)
        return tensor.to(dtype).expand(num_paths, *tensor.shape[tensor.ndim - ndim + 1 :])

    delta_has_paths = delta.ndim == 4
    u = per_path(u, u.ndim == 4)
    B = per_path(B, delta_has_paths)
    C = per_path(C, delta_has_paths)
    delta = per_path(delta, delta_has_paths)
    if B.ndim == 4:
        B, C = B.unsqueeze(3), C.unsqueeze(3)
    B = B.repeat_interleave(dim // B.shape[3], dim=3)  # (batch, L, K, D, N)
    C = C.repeat_interleave(dim // C.shape[3], dim=3)
    A = parameter(A, 3)
    if delta_bias is not None:
        delta = delta + parameter(delta_bias, 2)
    if delta_softplus:
        # Not F.softplus: its linear branch above 20 is 2e-9 off, which float64 sees.
        delta = torch.logaddexp(delta, torch.zeros_like(delta))

    def visit(tensor: Tensor) -> Tensor:  # raster order -> each path's own order
        index = paths.t().reshape(1, length, num_paths, *[1] * (tensor.ndim - 3)).expand_as(tensor)
        return tensor.gather(1, index)

    u, delta, B, C = visit(u), visit(delta), visit(B), visit(C)
    state = (
        u.new_zeros(batch, num_paths, dim, num_states)
        if initial_state is None
        else initial_state.to(dtype).reshape(batch, num_paths, dim, num_states)
    )
    step = delta.unsqueeze(-1)
    states = _states(torch.exp(step * A), step * B * u.unsqueeze(-1), state, chunk)
    y = (states * C).sum(-1)
    state = states[:, -1]
    if D is not None:
        y = y + parameter(D, 2) * u
    y = visit_back(y, paths)
    if z is not None:
        y = y * F.silu(per_path(z, z.ndim == 4))

    if merge == "sum":
        y = y.sum(2)
    elif not has_paths_axis:
        y = y.squeeze(2)
    y = y.to(out_dtype)
    if not return_last_state:
        return y
    return y, state if has_paths_axis else state.squeeze(1)


def _states(decay: Tensor, x: Tensor, state: Tensor, chunk: int | None = None) -> Tensor:
    """``h_t = decay_t * h_(t-1) + x_t`` along axis 1 of (batch, L, ...), from ``state`` (batch, ...)."""
    if chunk is None:
        states = []
        for decay_t, x_t in zip(decay.unbind(1), x.unbind(1), strict=True):  # indexing is slow in the backward pass
            state = decay_t * state + x_t
            states.append(state)
        return torch.stack(states, dim=1)
    batch, length = x.shape[:2]
    pad = [0, 0] * (x.ndim - 2) + [0, -length % chunk]
    decay, x = F.pad(decay, pad, value=1.0), F.pad(x, pad)
    decay, x = (t.reshape(-1, chunk, *t.shape[2:]) for t in (decay, x))
    zero = torch.zeros_like(x[:, 0])
    own = _states(decay, x, zero)  # what the steps of the chunk put in
    kept = _states(decay, torch.zeros_like(x), zero + 1)  # what they leave of the state before the chunk
    ends = _states(kept[:, -1].unflatten(0, (batch, -1)), own[:, -1].unflatten(0, (batch, -1)), state)
    before = torch.cat([state.unsqueeze(1), ends[:, :-1]], dim=1).flatten(0, 1)
    return (own + kept * before.unsqueeze(1)).unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]


def visit_back(y: Tensor, paths: Tensor) -> Tensor:
    """(batch, L, K, D) in each path's order -> raster order."""
    order = paths.argsort(dim=1).t().reshape(1, y.shape[1], y.shape[2], 1)
    return y.gather(1, order.expand_as(y))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    paths: Tensor | None = None,
) -> Tensor:
    """Same arguments and result as :func:`vision_mamba.ops.causal_conv1d`."""
    length = x.shape[1]
    has_paths_axis = weight.ndim == 3 or (paths is not None and paths.ndim == 2)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if paths is None:
        num_paths = weight.shape[0] if weight.ndim == 3 else 1
        paths = torch.arange(length, device=x.device).expand(num_paths, length)
    paths = paths.reshape(-1, length).long()
    num_paths, dim, width = paths.shape[0], x.shape[-1], weight.shape[-1]
    weight = weight.to(dtype).expand(num_paths, dim, width)

    tokens = x.to(dtype)[:, paths]  # (batch, K, L, D)
    tokens = F.pad(tokens, (0, 0, width - 1, 0))
    taps = [tokens[:, :, w : w + length] * weight[None, :, None, :, w] for w in range(width)]
    y = torch.stack(taps).sum(0)
    if bias is not None:
        y = y + bias.to(dtype).expand(num_paths, dim)[None, :, None]
    if activation == "silu":
        y = F.silu(y)
    y = visit_back(y.transpose(1, 2), paths).to(x.dtype)
    return y if has_paths_axis else y.squeeze(2)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-5,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Same arguments and result as :func:`vision_mamba.ops.add_norm`."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(inner) if residual is None else x.to(inner) + residual.to(inner)
    centred = total - total.mean(-1, keepdim=True) if norm == "layer" else total
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(inner)
    if bias is not None:
        normed = normed + bias.to(inner)
    return normed.to(dtype), total.to(residual_dtype)
