"""Depthwise convolution of channels-last maps with bias and activation: public function, autograd."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import (
    autocast_dtype,
    derivative_needs_operator,
    gradients_by,
    load_backend,
    needs_gradient,
    needs_operator,
    resolve_backend,
)

ACTIVATIONS = {None: lambda x: x, "silu": F.silu, "gelu": F.gelu}


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``act(conv(x) + bias)`` of a map with its channels last, which keeps its size; zeros around it.

    Liu et al. 2024, VMamba, figure 3 (with SiLU); Wang et al. 2022, PVT v2, section 3.2 (with GELU). On a GPU 3x3
    convolutions are one pass over memory, in float32 inside; other sides, other devices, and compilers, which fuse
    the activation themselves, get PyTorch's convolution.

    Args:
        x: (batch, H, W, D).
        weight: (D, 1, k, k), k odd.
        bias: (D,).
        activation: None, ``"silu"`` or ``"gelu"`` (exact: no hyperbolic tangent).
        backend: ``"triton"``, ``"cpu"`` or ``"reference"``; by device if None.

    Returns:
        (batch, H, W, D) in the dtype of ``x``, under autocast in its dtype.

    Raises:
        ValueError: shapes that do not fit together or an unknown name.
        RuntimeError: the backend cannot run on the tensors' device.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: allowed are None, 'silu' and 'gelu'")
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[:2] != (x.shape[3], 1):
        raise ValueError(
            f"x must be (batch, H, W, D) and weight (D, 1, k, k), got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    side = weight.shape[2]
    if side % 2 == 0 or weight.shape[3] != side:
        raise ValueError(f"weight is {side} x {weight.shape[3]}; a map keeps its size with k x k, k odd")
    if bias is not None and bias.shape != x.shape[3:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({x.shape[3]},)")
    name = resolve_backend(backend, x.device)
    if name != "triton" or side != 3 or needs_operator(x, weight, bias):
        return _plain(x, weight, bias, activation)
    x = x.to(autocast_dtype(x.device) or x.dtype)
    if needs_gradient(x, weight, bias):
        return _DepthwiseConv2d.apply(x, weight, bias, activation)
    return load_backend(name).depthwise_conv2d_forward(x, weight, bias, activation)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    # A channels-last map seen as (batch, channels, height, width) is torch's channels_last: no copy.
    padding = weight.shape[2] // 2
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=len(weight)).permute(0, 2, 3, 1)
    return ACTIVATIONS[activation](y)


def _without_autocast(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """As in a backward pass."""
    return _plain(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), activation)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        ctx.save_for_backward(x, weight, bias)
        ctx.activation = activation
        return load_backend("triton").depthwise_conv2d_forward(x, weight, bias, activation)

    @staticmethod
    def backward(ctx, dy):
        tensors = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        if derivative_needs_operator(dy, *tensors):
            return *gradients_by(partial(_without_autocast, activation=ctx.activation), tensors, dy), None
        return *load_backend("triton").depthwise_conv2d_backward(dy, *tensors, ctx.activation), None
