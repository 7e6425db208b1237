"""Who looks at modules: asked where a model goes past the call of one to save memory or a pass over its tokens."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

M = TypeVar("M", bound=nn.Module)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def are_observed(*modules: nn.Module) -> bool:
    """Whether somebody would miss a call of one of them: it or all modules have hooks, or it is compiled by itself."""
    return _has_any_global_hook() or any(
        module._compiled_call_impl or any(getattr(module, hooks) for hooks in _HOOKS) for module in modules
    )


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a module may be replaced by what it computes: of just this kind (no adapter), and not observed."""
    return type(module) is kind and not are_observed(module)
