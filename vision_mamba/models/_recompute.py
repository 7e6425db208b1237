"""Activation checkpointing: what the backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import DropPath
from timm.models._manipulate import checkpoint
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ..ops.selective_scan import keep_scans

Recompute = bool | Literal["selective"]


def checked(enable: Recompute) -> Recompute:
    """What ``set_grad_checkpointing`` was given.

    Raises:
        ValueError: neither a bool nor ``"selective"``.
    """
    if enable not in (True, False, "selective"):
        raise ValueError(f"grad checkpointing {enable!r}: allowed are True, False and 'selective'")
    return enable


def recomputed(enable: Recompute, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, of which the backward pass computes again what it needs.

    Args:
        enable: False keeps everything. True keeps the arguments alone (Chen et al. 2016, arXiv 1604.06174).
            ``"selective"`` keeps besides what the scans gave, their outputs and border states, so that no scan is run
            a second time (selective activation checkpointing; Korthikanti et al. 2022, arXiv 2205.05198, section 5).
        function: a block, or a method of a module.
        args: what it is called with.

    Raises:
        RuntimeError: a CUDA graph is captured, and the function draws random numbers: a graph cannot draw the same
            ones again.
    """
    if not enable:
        return function(*args)
    compiling = torch.compiler.is_compiling()
    options: dict[str, Any] = {}
    if enable == "selective":
        scan = torch.ops.vision_mamba.selective_scan.default
        theirs = partial(create_selective_checkpoint_contexts, [scan])
        options = {"use_reentrant": False, "context_fn": theirs if compiling else keep_scans}
    if not compiling and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _draws_nothing(function if isinstance(function, nn.Module) else function.__self__)  # type: ignore[attr-defined]
        options["preserve_rng_state"] = False  # the state cannot be asked for in a capture
    return checkpoint(function, *args, **options)


def _draws_nothing(module: nn.Module) -> None:
    for name, part in module.named_modules():
        rate = part.drop_prob if isinstance(part, DropPath) else part.p if isinstance(part, _DropoutNd) else 0
        if part.training and rate:
            raise RuntimeError(
                f"gradient checkpointing in a CUDA graph: {name or type(module).__name__} drops at a rate of {rate}, "
                "and would drop others when it is run again; set its rate (drop_path_rate, drop_rate) to 0"
            )
