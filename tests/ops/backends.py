"""Where each backend's tests run.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported:
``test_triton.py`` runs all tests of this folder with "triton" in their name again in such a process. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/ops -k triton``.
"""

import importlib.util
import os

import numpy as np
import pytest
import torch

from vision_mamba.ops.backend import load_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"  # of the Triton backend
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def _round_as_a_device() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, twice the error and always towards zero: to nearest instead."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(value, given, wanted, mode):
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(value, given, wanted, mode)
        number = torch.from_numpy(np.ascontiguousarray(value))
        return number.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = rounded


def _patch_the_language_once() -> None:
    """Not again for every function that a kernel calls, which is a third of the interpreter's time."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # an older one, which keeps no account of it
        return
    patch, scopes, known = interpreter._patch_lang, [], set()

    def patch_once(function):
        module = id(function.__globals__)  # whose names for the language are replaced
        if scopes and module in known:
            return interpreter._LangPatchScope()
        known.add(module)
        scopes.append(patch(function))
        if len(scopes) > 1:
            return interpreter._LangPatchScope()
        of_kernel = interpreter._LangPatchScope()

        def restore() -> None:
            while scopes:
                scopes.pop().restore()
            known.clear()

        of_kernel.restore = restore
        return of_kernel

    interpreter._patch_lang = patch_once


if INTERPRETED:
    _round_as_a_device()
    _patch_the_language_once()

_marks = [
    pytest.mark.skipif(
        not (CUDA or INTERPRETED) or importlib.util.find_spec("triton") is None,
        reason="needs Triton, and a GPU or TRITON_INTERPRET=1 in the environment",
    ),
    *([pytest.mark.gpu] if CUDA else []),
]


def kernels(test):
    """For a test of the Triton kernels; where they run on a GPU, it is one of those that ``-m gpu`` chooses."""
    for mark in _marks:
        test = mark(test)
    return test


needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
TRITON = pytest.param("triton", marks=_marks)


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def output_and_gradients(tensors: dict[str, torch.Tensor], run) -> dict[str, torch.Tensor]:
    """Of ``run(**tensors)``, the gradients by the tensors' names; for one that is the same in all precisions."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = run(**leaves)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output))
    return {"output": output.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def second_derivatives(tensors: list[torch.Tensor], run) -> dict[str, torch.Tensor]:
    """Gradients of a number that is made of the gradients of ``run(*tensors)``."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    first = torch.autograd.grad(run(*leaves).pow(3).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), leaves)
    return {f"of tensor {i}": grad for i, grad in enumerate(second)}


def record_scans(backend: str, monkeypatch) -> list[None]:
    """An entry for each forward pass of the scan from now on."""
    module, runs = load_backend(backend), []
    run = module.selective_scan_forward
    monkeypatch.setattr(module, "selective_scan_forward", lambda *given: runs.append(None) or run(*given))
    return runs
