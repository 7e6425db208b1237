"""Residual addition and RMSNorm or LayerNorm in one pass: public function, custom operator, autograd."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import reference
from .backend import (
    derivative_needs_operator,
    form_for,
    gradients_by,
    load_backend,
    needs_gradient,
    needs_operator,
    resolve_backend,
)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x + residual``; ``norm(r) * weight + bias`` over the last axis. Both are returned.

    RMSNorm: Zhang & Sennrich 2019, equation 4. LayerNorm: Ba et al. 2016, equation 4.
    Sum, statistics and norm are computed in float32 (float64 for a float64 ``x``) and rounded once, when
    they are written. Autocast changes nothing: a layer that gets bfloat16 hands on bfloat16, while the
    residual stream keeps its own dtype.

    Args:
        x: output of the last layer, (..., D).
        residual: the residual stream, (..., D), or None at its start, where ``r = x``.
        weight: (D,).
        bias: (D,) or None.
        norm: ``"rms"`` or ``"layer"``.
        eps: added to the mean square, or to the variance.
        dtype: of the normalised sum; by default that of ``x``.
        residual_dtype: of ``r``; by default that of ``residual``, or of ``x`` without one.
            float32 under a bfloat16 ``x`` is Vim's ``residual_in_fp32``.
        backend: ``"triton"``, ``"cpu"`` or ``"reference"``; by device if None.

    Returns:
        The normalised sum in ``dtype``, and ``r`` in ``residual_dtype``, both (..., D) and dense; ``x`` itself
        where nothing is added to it and its dtype stays.
        Without rows both are empty.

    Raises:
        ValueError: shapes or devices that do not fit together, no channels, or an unknown name.
        RuntimeError: the backend cannot run on the tensors' device.
    """
    _check(x, norm, residual, weight=weight, bias=bias)
    chosen = resolve_backend(backend, x.device)
    dtype = dtype or x.dtype
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    if chosen == "reference":
        normed, total = reference.add_norm(
            x, residual, weight, bias, norm=norm, eps=eps, dtype=dtype, residual_dtype=residual_dtype
        )
        return normed, x if _alone(x, residual, residual_dtype) else total
    run = form_for(torch.ops.vision_mamba.add_norm, _AddNorm.apply, _forward, x, residual, weight, bias)
    normed, total = run(x, residual, weight, bias, eps, norm == "rms", residual_dtype, chosen, dtype)
    return normed, x if _alone(x, residual, residual_dtype) else total


def shifted_norm(
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """``norm(x + shift) * weight + bias``: the norm of what a convolution gives before its bias is added.

    On a GPU the shift costs no pass over memory, nor does its gradient, a sum over all rows.

    Args:
        x: (..., D).
        shift: (D,).
        weight, bias, norm, eps, dtype, backend: as of :func:`add_norm`.

    Returns:
        (..., D) in ``dtype``.

    Raises:
        ValueError, RuntimeError: as :func:`add_norm`.
    """
    _check(x, norm, shift=shift, weight=weight, bias=bias)
    tensors = x, shift, weight, bias
    name, options = resolve_backend(backend, x.device), (eps, norm == "rms", dtype or x.dtype)
    if name != "triton" or needs_operator(*tensors):
        return _shift_and_norm(*tensors, *options, name)
    run = _ShiftedNorm.apply if needs_gradient(*tensors) else load_backend(name).shifted_norm_forward
    return run(*tensors, *options)


def _shift_and_norm(x, shift, weight, bias, eps, rms, dtype, backend) -> Tensor:
    x = x + shift.to(x.dtype)
    return add_norm(x, None, weight, bias, norm="rms" if rms else "layer", eps=eps, dtype=dtype, backend=backend)[0]


def _check(x: Tensor, norm: str, residual: Tensor | None = None, **vectors: Tensor | None) -> None:
    if norm not in ("rms", "layer"):
        raise ValueError(f"norm={norm!r}: allowed are 'rms' and 'layer'")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., D) with D > 0, got {tuple(x.shape)}")
    for name, tensor in (("residual", residual), *vectors.items()):
        if tensor is None:
            continue
        shape = x.shape if name == "residual" else x.shape[-1:]
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} expected {tuple(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")


def _alone(x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype) -> bool:
    """Whether the sum is ``x``: the operator then returns an empty one, as its output must not be its input."""
    return residual is None and residual_dtype == x.dtype


def _forward(x, residual, weight, bias, eps, rms, residual_dtype, backend, dtype):
    keep_sum = not _alone(x, residual, residual_dtype)
    normed, total = load_backend(backend).add_norm_forward(
        x, residual, weight, bias, eps, rms, residual_dtype if keep_sum else None, dtype
    )
    return normed, x.new_empty(0) if total is None else total


# Schemas are spelt out: torch 2.6 cannot infer them from annotations such as ``list[Tensor]``.
_add_norm = torch.library.custom_op(
    "vision_mamba::add_norm",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool rms, ScalarType residual_dtype, "
    "str backend, ScalarType dtype) -> (Tensor, Tensor)",
)


@_add_norm.register_fake
def _(x, residual, weight, bias, eps, rms, residual_dtype, backend, dtype):
    sum_shape = (0,) if _alone(x, residual, residual_dtype) else x.shape
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(sum_shape, dtype=residual_dtype)


def _backward(dnormed, dsum, sum, weight, bias, eps, rms, x_dtype, residual_dtype, backend):
    """The gradient of the sum in each of the two dtypes, once where they are equal, then those of weight and bias.

    The statistics are found again from the sum: that costs no memory traffic.
    """
    dtypes = [x_dtype] if x_dtype == residual_dtype else [x_dtype, residual_dtype]
    dsums, dweight, dbias = load_backend(backend).add_norm_backward(dnormed, dsum, sum, weight, bias, eps, rms, dtypes)
    return [*dsums, dweight] if dbias is None else [*dsums, dweight, dbias]


def _backward_apart(*inputs):
    """An operator's outputs may not share memory, as rows of one sum do."""
    return [t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for t in _backward(*inputs)]


_add_norm_backward = torch.library.custom_op(
    "vision_mamba::add_norm_backward",
    _backward_apart,
    mutates_args=(),
    schema="(Tensor dnormed, Tensor? dsum, Tensor sum, Tensor weight, Tensor? bias, float eps, bool rms, "
    "ScalarType x_dtype, ScalarType residual_dtype, str backend) -> Tensor[]",
)


@_add_norm_backward.register_fake
def _(dnormed, dsum, sum, weight, bias, eps, rms, x_dtype, residual_dtype, backend):
    dtypes = [x_dtype] if x_dtype == residual_dtype else [x_dtype, residual_dtype]
    grads = [sum.new_empty(sum.shape, dtype=dtype) for dtype in dtypes]
    return grads + [t.new_empty(t.shape) for t in (weight, bias) if t is not None]


def _no_second_order(ctx, *grads):
    raise RuntimeError("add_norm has no second derivative; use backend='reference' for double backward")


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, eps, rms, residual_dtype, backend, _ = inputs
    ctx.alone = _alone(x, residual, residual_dtype)
    ctx.save_for_backward(x if ctx.alone else output[1], weight, bias)
    ctx.options = (eps, rms, x.dtype, (x if residual is None else residual).dtype, backend)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _add_norm_autograd(ctx, dnormed, dsum):
    total, weight, bias = ctx.saved_tensors  # once: activation checkpointing unpacks only once
    _, _, x_dtype, residual_dtype, _ = ctx.options
    dweight = dbias = None
    if ctx.alone:  # the gradient of an empty tensor, where a compiler gives one
        dsum = None
    if dnormed is not None:
        opaque = derivative_needs_operator(dnormed, dsum, total, weight, bias)
        run = torch.ops.vision_mamba.add_norm_backward if opaque else _backward
        grads = run(dnormed, dsum, total, weight, bias, *ctx.options)
        dx, dresidual = grads[0], grads[0 if x_dtype == residual_dtype else 1]
        dweight, dbias = (grads[-1], None) if bias is None else grads[-2:]
    elif dsum is not None:
        dx, dresidual = dsum.to(x_dtype), dsum.to(residual_dtype)
    else:
        dx = dresidual = None
    return dx, dresidual if ctx.has_residual else None, dweight, dbias, None, None, None, None, None


_add_norm.register_autograd(_add_norm_autograd, setup_context=_setup_context)
_add_norm_backward.register_autograd(_no_second_order)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # PyTorch's own way to call a setup_context looks up the signature every time
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_add_norm_autograd)


class _ShiftedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, weight, bias, eps, rms, dtype):
        ctx.save_for_backward(x, shift, weight, bias)
        ctx.options = eps, rms, dtype
        return load_backend("triton").shifted_norm_forward(x, shift, weight, bias, eps, rms, dtype)

    @staticmethod
    def backward(ctx, dnormed):
        tensors = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        eps, rms, dtype = ctx.options
        if derivative_needs_operator(dnormed, *tensors):
            plain = partial(_shift_and_norm, eps=eps, rms=rms, dtype=dtype, backend="triton")
            grads = gradients_by(plain, tensors, dnormed)
        else:
            grads = load_backend("triton").shifted_norm_backward(dnormed, *tensors, eps, rms)
        return *grads, None, None, None
