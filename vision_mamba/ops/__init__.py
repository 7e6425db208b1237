"""The shared operators. Knows torch, numba and triton; nothing of images or models."""

from .causal_conv1d import causal_conv1d
from .selective_scan import selective_scan

__all__ = ["causal_conv1d", "selective_scan"]
