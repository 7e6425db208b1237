"""Which implementation runs an op: by device, by argument, or by ``VISION_MAMBA_BACKEND``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

BACKENDS = ("triton", "cpu", "reference")
_FROM_ENVIRONMENT = os.environ.get("VISION_MAMBA_BACKEND")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: torch.compile does not trace the question


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The name of the backend to run on ``device``.

    ``backend`` wins over the environment variable ``VISION_MAMBA_BACKEND`` (read at import), which
    wins over the device's default: ``cpu`` on the CPU, ``triton`` elsewhere.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run on this device; there is no silent fallback.
    """
    name = backend or _FROM_ENVIRONMENT or ("cpu" if device.type in ("cpu", "meta") else "triton")
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "cpu" and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"backend 'cpu' got tensors on {device}; use 'triton' or 'reference', or move them")
    if name == "triton":
        if device.type == "cpu" and not _INTERPRETED:
            raise RuntimeError(
                "backend 'triton' got tensors on the CPU; use backend 'cpu', or set TRITON_INTERPRET=1 to debug kernels"
            )
        if not _HAS_TRITON:
            raise RuntimeError(f"no triton installed for {device}; install triton or choose backend='reference'")
    return name


@functools.cache  # every operator asks for it, and an import takes its time even where there is nothing to do
def load_backend(name: str) -> ModuleType:
    """The package of a backend, imported at first use: numba and triton are slow to import."""
    return importlib.import_module(f".{name}", __package__)


def needs_operator(*tensors: Tensor | None) -> bool:
    """Whether somebody has to see a call as one operator of PyTorch's dispatcher.

    That is a compiler, an exporter, a dispatch mode (such as the one that counts FLOPs), a tensor subclass or a
    tensor without memory (device meta). For all others an operator written in Python is a detour: it costs more than
    the launch of the kernel, and small models wait for Python as it is. They get the same functions as a
    ``torch.autograd.Function``, or as they are where no gradient is wanted (:func:`form_for`).
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return any(t is not None and (type(t) not in (Tensor, Parameter) or t.is_meta) for t in tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward pass of what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes on a device; None where it is off, or has nothing to say."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def form_for(operator: Callable, function: Callable, plain: Callable, *tensors: Tensor | None) -> Callable:
    """``operator`` where somebody has to see it, else ``function`` of autograd, or without gradients ``plain``."""
    if needs_operator(*tensors):
        return operator
    return function if needs_gradient(*tensors) else plain


def derivative_needs_operator(*tensors: Tensor | None) -> bool:
    """The same for the operator of a backward pass.

    With ``create_graph`` gradients are enabled there: the operator's own derivative then says that there is none.
    """
    return torch.is_grad_enabled() or needs_operator(*tensors)


def gradients_by(function: Callable, inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients of those inputs that want one, by a ``function`` whose operators somebody may see or differentiate."""
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    with torch.enable_grad():
        y = function(*inputs)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
