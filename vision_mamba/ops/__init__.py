"""The shared operators. Knows torch, numba and triton; nothing of images or models."""

from . import flops  # noqa: F401  # registers the operators' formulas
from .add_norm import add_norm
from .causal_conv1d import causal_conv1d, causal_conv1d_of_half
from .path_gate import path_means, weighted_path_sum
from .selective_scan import selective_scan

__all__ = [
    "add_norm",
    "causal_conv1d",
    "causal_conv1d_of_half",
    "path_means",
    "selective_scan",
    "weighted_path_sum",
]
