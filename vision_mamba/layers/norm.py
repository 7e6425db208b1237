"""Norms in one pass over memory, and the fused residual addition and norm, on a norm's own parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import add_norm, shifted_norm
from ..ops.backend import autocast_dtype, needs_operator, resolve_backend
from .observed import is_plain


def _written(x: Tensor, weight: Tensor, stream: bool) -> torch.dtype:
    """The dtype in which a norm's result is wanted."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x.dtype
    return weight.dtype if stream else dtype


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, by :func:`vision_mamba.ops.add_norm`: many short rows at once.

    Under autocast PyTorch's writes float32, whatever comes next. This one computes in float32 too, but writes the
    autocast dtype, for a projection or convolution that reads nothing else; with ``stream`` the dtype of its
    parameters, for a residual stream.
    """

    def __init__(self, *args: Any, stream: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x, None)[0]

    def after(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """``r = x + residual`` and its norm in one pass: the norm, and r."""
        dtype = _written(x, self.weight, self.stream)
        return add_norm(x, residual, self.weight, self.bias, norm="layer", eps=self.eps, dtype=dtype)


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    """``norm(conv(x))``; on a GPU the bias of a plain convolution is added within the norm, not in a pass of its own.

    Args:
        x: (batch, channels, H, W), channels last in memory.
        conv: a convolution.
        norm: over its output channels, which come last.

    Returns:
        (batch, H, W, channels).
    """
    if is_plain(conv, nn.Conv2d) and conv.bias is not None and is_plain(norm, LayerNorm):
        if not needs_operator(x, conv.bias) and resolve_backend(None, x.device) == "triton":
            y = conv._conv_forward(x, conv.weight, None).permute(0, 2, 3, 1)
            dtype = _written(y, norm.weight, norm.stream)
            return shifted_norm(y, conv.bias, norm.weight, norm.bias, norm="layer", eps=norm.eps, dtype=dtype)
    return norm(conv(x).permute(0, 2, 3, 1))


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis; see :class:`LayerNorm`."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x, None)[0]

    def after(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As :meth:`LayerNorm.after`."""
        return add_norm(x, residual, self.weight, norm="rms", eps=self.eps, dtype=_written(x, self.weight, False))


def add_layer_norm(x: Tensor, residual: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """``r = x + residual``: ``norm(r)`` in the dtype of ``x``, and ``r``; see :func:`vision_mamba.ops.add_norm`."""
    return add_norm(x, residual, norm.weight, norm.bias, norm="layer", eps=norm.eps)
