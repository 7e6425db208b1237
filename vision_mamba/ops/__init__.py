"""The shared operators. Knows torch, numba and triton; nothing of images or models."""

from . import flops  # noqa: F401  # registers the operators' formulas
from .add_norm import add_norm, shifted_norm
from .causal_conv1d import causal_conv1d, causal_conv1d_of_half
from .depthwise_conv2d import depthwise_conv2d
from .linear import linear
from .path_gate import path_means, weighted_path_sum
from .selective_scan import selective_scan

__all__ = [
    "add_norm",
    "causal_conv1d",
    "causal_conv1d_of_half",
    "depthwise_conv2d",
    "linear",
    "path_means",
    "selective_scan",
    "shifted_norm",
    "weighted_path_sum",
]
