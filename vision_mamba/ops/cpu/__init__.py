"""CPU backend: numba kernels, compiled at first use and cached; no compiler needed."""

from .add_norm import add_norm_backward, add_norm_forward
from .causal_conv1d import causal_conv1d_backward, causal_conv1d_forward
from .selective_scan import new_states, selective_scan_backward, selective_scan_forward, wants_output

__all__ = [
    "add_norm_backward",
    "add_norm_forward",
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "new_states",
    "selective_scan_backward",
    "selective_scan_forward",
    "wants_output",
]
