"""A depthwise convolution module on a channels-last map, with the activation that follows it."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.depthwise_conv2d import ACTIVATIONS, depthwise_conv2d
from .observed import is_plain


def _is_usual(conv: nn.Conv2d) -> bool:
    """Whether it is what the operator computes: people set circular padding, or dilation, in models that are made."""
    side = conv.kernel_size[0]
    return (
        conv.padding == (side // 2, side // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == conv.in_channels
        and conv.padding_mode == "zeros"
    )


def depthwise_conv(x: Tensor, conv: nn.Module, activation: str) -> Tensor:
    """``act(conv(x))``, by :func:`vision_mamba.ops.depthwise_conv2d` where nobody would miss a call of ``conv``.

    Args:
        x: (batch, H, W, D).
        conv: a convolution of D groups, or what an adapter has put in its place.
        activation: ``"silu"`` or ``"gelu"``.

    Returns:
        (batch, H, W, D).
    """
    if is_plain(conv, nn.Conv2d) and _is_usual(conv):
        return depthwise_conv2d(x, conv.weight, conv.bias, activation=activation)
    # A channels-last map seen as (batch, channels, height, width) is torch's channels_last: no copy.
    y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return ACTIVATIONS[activation](y)
