"""Triton backend: kernels compiled at first use, for any device that Triton knows."""

from .add_norm import add_norm_backward, add_norm_forward, shifted_norm_backward, shifted_norm_forward
from .causal_conv1d import causal_conv1d_backward, causal_conv1d_forward
from .column_sums import column_sums
from .depthwise_conv2d import depthwise_conv2d_backward, depthwise_conv2d_forward
from .path_sums import add_over_tokens, weighted_sum, weighted_sum_backward
from .scan_inputs import scan_inputs
from .selective_scan import new_states, selective_scan_backward, selective_scan_forward, wants_output

__all__ = [
    "add_norm_backward",
    "add_norm_forward",
    "add_over_tokens",
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "column_sums",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_forward",
    "new_states",
    "scan_inputs",
    "selective_scan_backward",
    "selective_scan_forward",
    "shifted_norm_backward",
    "shifted_norm_forward",
    "wants_output",
    "weighted_sum",
    "weighted_sum_backward",
]
