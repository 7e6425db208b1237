"""A linear layer with bias whose bias has its gradient in one pass: public function, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import (
    autocast_dtype,
    derivative_needs_operator,
    load_backend,
    needs_gradient,
    needs_operator,
    resolve_backend,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``x @ weight.T + bias``, as :func:`torch.nn.functional.linear`.

    On a GPU the gradient of the bias, a sum over all tokens, is by a kernel that reads them at the memory's pace;
    PyTorch's sum takes about twice as long.

    Args:
        x: (..., D).
        weight: (O, D).
        bias: (O,).
        backend: ``"triton"``, ``"cpu"`` or ``"reference"``; by device if None.

    Returns:
        (..., O) in the dtype of ``x``, under autocast in its dtype.

    Raises:
        RuntimeError: the backend cannot run on the tensors' device.
    """
    tensors = x, weight, bias
    own = bias is not None and bias.requires_grad and needs_gradient(*tensors) and not needs_operator(*tensors)
    if not own or resolve_backend(backend, x.device) != "triton":
        return F.linear(x, weight, bias)
    if (dtype := autocast_dtype(x.device)) is not None:  # whose casts would not reach the backward pass
        x, weight = x.to(dtype), weight.to(dtype)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        return F.linear(x, weight, bias.to(weight.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ weight if wants_x else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        if derivative_needs_operator(dy, x, weight):
            dbias = rows.sum(0)
        else:
            dbias = load_backend("triton").column_sums(dy)
        return dx, dweight, dbias.to(ctx.bias_dtype)
