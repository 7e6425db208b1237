"""Who looks at modules: asked where a model goes past the call of one to save memory or a pass over its tokens."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def are_observed(*modules: nn.Module) -> bool:
    """Whether somebody would miss a call of one of them: it or all modules have hooks, or it is compiled by itself."""
    return _has_any_global_hook() or any(
        module._compiled_call_impl or any(getattr(module, hooks) for hooks in _HOOKS) for module in modules
    )
