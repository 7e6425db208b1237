"""Depthwise causal convolution along scan paths: public function, custom operator, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import (
    derivative_needs_operator,
    form_for,
    load_backend,
    needs_gradient,
    needs_operator,
    resolve_backend,
)
from .selective_scan import canonical_paths


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    paths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each path convolves the tokens in its own visit order; the result is in raster order.

    ``y_t = act(bias + sum_w weight[w] * x_(t - width + 1 + w))`` with zeros before the first token
    (Gu & Dao 2023, section 3.4; the token mixer's local convolution).

    Args:
        x: tokens, (batch, L, D), read by every path.
        weight: (K, D, width), or (D, width) for all paths.
        bias: (K, D) or (D,).
        activation: None or ``"silu"``.
        paths: (K, L) integer permutations of the tokens, or (L,) for one path; None is raster order.
        backend: ``"triton"``, ``"cpu"`` or ``"reference"``; by device if None.

    Returns:
        (batch, L, K, D) in the dtype of ``x``; (batch, L, D) where neither ``weight`` nor ``paths`` has a K axis.

    Raises:
        ValueError: shapes that do not fit together or an unknown name.
        RuntimeError: the backend cannot run on the tensors' device.
    """
    weight, bias, paths, has_paths, name = _checked(x, weight, bias, activation, paths, backend)
    if name == "reference":
        y = reference.causal_conv1d(x, weight, bias, activation=activation, paths=paths)
    else:
        run = form_for(torch.ops.vision_mamba.causal_conv1d, _Conv.apply, _forward, x, weight, bias)
        y = run(x, weight, bias, paths, activation == "silu", name)
    return y if has_paths else y.squeeze(2)


def causal_conv1d_of_half(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    paths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of ``projected`` (batch, L, 2 D) by :func:`causal_conv1d`, and the second half as it is.

    As tokens and gate come out of a mixer's input projection. A ``chunk`` would do, but its backward pass copies the
    gradients of both halves to where the projection's reads them; here they are written there.

    Args:
        projected: tokens and what is handed through, (batch, L, 2 D).
        weight, bias, activation, paths, backend: as of :func:`causal_conv1d`.

    Returns:
        What :func:`causal_conv1d` gives for the first half, and the second half (batch, L, D), a view.

    Raises:
        ValueError, RuntimeError: as :func:`causal_conv1d`.
    """
    x, rest = projected.chunk(2, dim=-1)
    tensors = projected, weight, bias
    if resolve_backend(backend, x.device) != "triton" or needs_operator(*tensors) or not needs_gradient(*tensors):
        return causal_conv1d(x, weight, bias, activation=activation, paths=paths, backend=backend), rest
    weight, bias, paths, has_paths, name = _checked(x, weight, bias, activation, paths, backend)
    y, rest = _ConvOfHalf.apply(projected, weight, bias, paths, activation == "silu", name)
    return y if has_paths else y.squeeze(2), rest


def _checked(x, weight, bias, activation, paths, backend):
    """Weight, bias and paths with an axis of paths, whether one of them had one, and the backend."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r}: allowed are None and 'silu'")
    if x.ndim != 3 or weight.ndim not in (2, 3) or weight.shape[-2] != x.shape[-1]:
        raise ValueError(
            "x must be (batch, L, D) and weight (K, D, width) or (D, width), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    name = resolve_backend(backend, x.device)
    has_paths = weight.ndim == 3 or (paths is not None and paths.ndim == 2)
    paths = canonical_paths(paths, weight.shape[0] if weight.ndim == 3 else None, x.shape[1], x.device)
    weight = weight.expand(paths.shape[0], *weight.shape[-2:])
    if bias is not None:
        if tuple(bias.shape) not in ((x.shape[-1],), tuple(weight.shape[:2])):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; expected ({x.shape[-1]},) or {tuple(weight.shape[:2])}"
            )
        bias = bias.expand(weight.shape[:2])
    return weight, bias, paths, has_paths, name


# Schemas are spelt out: torch 2.6 cannot infer them from annotations such as ``list[Tensor]``.
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor paths, bool silu, str backend"


def _forward(x, weight, bias, paths, silu, backend):
    return load_backend(backend).causal_conv1d_forward(x, weight, bias, paths, silu)


_conv = torch.library.custom_op(
    "vision_mamba::causal_conv1d", _forward, mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)


@_conv.register_fake
def _(x, weight, bias, paths, silu, backend):
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[0], x.shape[2]))


def _backward(dy, x, weight, bias, paths, silu, backend):
    grads = load_backend(backend).causal_conv1d_backward(dy, x, weight, bias, paths, silu)
    # Dense, as the fake kernel says: compiled code relies on the strides.
    return [grad.contiguous() for grad in grads if grad is not None]


_conv_backward = torch.library.custom_op(
    "vision_mamba::causal_conv1d_backward", _backward, mutates_args=(), schema=f"(Tensor dy, {_INPUTS}) -> Tensor[]"
)


@_conv_backward.register_fake
def _(dy, x, weight, bias, paths, silu, backend):
    present = (x, weight, bias)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in present if t is not None]


def _no_second_order(ctx, *grads):
    raise RuntimeError("causal_conv1d has no second derivative; use backend='reference' for double backward")


def _setup_context(ctx, inputs, output):
    x, weight, bias, paths, silu, backend = inputs
    ctx.save_for_backward(x, weight, bias, paths)
    ctx.options = (silu, backend)


def _conv_autograd(ctx, dy):
    tensors = ctx.saved_tensors  # once: activation checkpointing unpacks only once
    opaque = derivative_needs_operator(dy, *tensors)
    run = torch.ops.vision_mamba.causal_conv1d_backward if opaque else _backward
    grads = run(dy, *tensors, *ctx.options)
    dbias = grads[2] if tensors[2] is not None else None
    return grads[0], grads[1], dbias, None, None, None


_conv.register_autograd(_conv_autograd, setup_context=_setup_context)
_conv_backward.register_autograd(_no_second_order)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # PyTorch's own way to call a setup_context looks up the signature every time
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_conv_autograd)


class _ConvOfHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, *inputs):
        x, rest = projected.chunk(2, dim=-1)
        y = _forward(x, *inputs)
        _setup_context(ctx, (x, *inputs), y)
        return y, rest

    @staticmethod
    def backward(ctx, dy, drest):
        if derivative_needs_operator(dy, drest):
            dx, *grads = _conv_autograd(ctx, dy)
            return torch.cat((dx, drest), dim=-1), *grads
        silu, backend = ctx.options
        grads = load_backend(backend).causal_conv1d_backward(dy, *ctx.saved_tensors, silu, drest)
        return *grads, None, None, None
