"""FLOPs of the operators for ``torch.utils.flop_counter.FlopCounterMode``; imported for its side effect.

The counter's conventions hold: two FLOPs for each multiply-accumulate (MACs are half its count), backward passes
twice the forward pass, and nothing for norms, activations and gates outside of a scan, so ``add_norm`` has no formula,
as torch's norms have none.

The scan counts ``9 B L K D N``, plus ``B L K D`` each for the skip weights and the gate: the count that the authors of
Mamba give (github state-spaces/mamba, issue 110) and that VMamba's published FLOPs use. Those add it to the MACs of all
products; to compare with them, take half of everything else and the whole of the scan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import causal_conv1d, selective_scan  # noqa: F401  # define the operators that have formulas

Shape = tuple[int, ...]

_OPS = torch.ops.vision_mamba


@register_flop_formula(_OPS.selective_scan)
def selective_scan_flops(
    u: Shape,
    delta: Shape,
    A: Shape,
    B: Shape,
    C: Shape,
    D: Shape | None = None,
    z: Shape | None = None,
    *_: Any,
    **__: Any,
) -> int:
    """FLOPs of the operator's canonical shapes: delta (batch, L, K, channels), A (K, channels, N)."""
    batch, length, num_paths, dim = delta
    return batch * length * num_paths * dim * (9 * A[-1] + (D is not None) + (z is not None))


@register_flop_formula(_OPS.selective_scan_backward)
def selective_scan_backward_flops(
    dy: Shape, dlast_state: Shape | None, states: Shape, *tensors: Any, **options: Any
) -> int:
    """Twice the forward pass; that the states are computed again is not counted."""
    return 2 * selective_scan_flops(*tensors)


@register_flop_formula(_OPS.causal_conv1d)
def causal_conv1d_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """x (batch, L, channels), weight (K, channels, width)."""
    return 2 * x[0] * x[1] * weight[0] * weight[1] * weight[2]


@register_flop_formula(_OPS.causal_conv1d_backward)
def causal_conv1d_backward_flops(dy: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * causal_conv1d_flops(x, weight)
