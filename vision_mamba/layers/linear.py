"""A linear layer, by our operator where nobody would miss a call of the module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import linear
from .observed import is_plain


def apply_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """``layer(x)``, by :func:`vision_mamba.ops.linear` if it is a plain linear layer without hooks."""
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)
    return layer(x)
