"""The fused residual addition and norm, on a norm's own parameters."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import add_norm


def add_layer_norm(x: Tensor, residual: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """``r = x + residual``: ``norm(r)`` in the dtype of ``x``, and ``r``; see :func:`vision_mamba.ops.add_norm`."""
    return add_norm(x, residual, norm.weight, norm.bias, norm="layer", eps=norm.eps)
