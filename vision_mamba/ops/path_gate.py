"""Means and weighted sums of paths' results, as gates over paths need them: public functions, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import (
    derivative_needs_operator,
    gradients_by,
    load_backend,
    needs_gradient,
    needs_operator,
    resolve_backend,
)


def path_means(y: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Results of paths that something else reads too, and their means over the tokens.

    A gate sees the means (Chen et al. 2024, RSMamba, section III-C). The gradients of the two uses are added in one
    pass, in place: autograd would write the means' for every token first.

    Args:
        y: (batch, L, K, D); the caller goes on with the first result in its place, in an operator that gives it a
            gradient of its own, as :func:`weighted_path_sum` does.
        backend: ``"triton"``, ``"cpu"`` or ``"reference"``; by device if None.

    Returns:
        ``y``, and the means (batch, K, D) in its dtype.

    Raises:
        RuntimeError: the backend cannot run on the tensors' device.
    """
    if _in_kernels(backend, y) and needs_gradient(y):
        return _Means.apply(y)
    return y, y.mean(1)


def weighted_path_sum(y: Tensor, weights: Tensor, *, backend: str | None = None) -> Tensor:
    """``sum_k weights[b, k] * y[b, l, k, d]``, on a GPU in one pass and in float32.

    Args:
        y: (batch, L, K, D).
        weights: (batch, K).
        backend: as of :func:`path_means`.

    Returns:
        (batch, L, D) in the dtype of ``y``.

    Raises:
        ValueError: shapes that do not fit together.
        RuntimeError: the backend cannot run on the tensors' device.
    """
    if y.ndim != 4 or tuple(weights.shape) != (y.shape[0], y.shape[2]):
        raise ValueError(
            f"y must be (batch, L, K, D) and weights (batch, K), got {tuple(y.shape)}, {tuple(weights.shape)}"
        )
    if not _in_kernels(backend, y, weights):
        return _plain_sum(y, weights)
    if needs_gradient(y, weights):
        return _WeightedSum.apply(y, weights)
    return load_backend("triton").weighted_sum(y, weights)


def _plain_sum(y: Tensor, weights: Tensor) -> Tensor:
    return (y * weights.to(y.dtype)[:, None, :, None]).sum(2)


def _in_kernels(backend: str | None, *tensors: Tensor) -> bool:
    """On a GPU, but not where a compiler sees it, which fuses the plain form by itself."""
    return resolve_backend(backend, tensors[0].device) == "triton" and not needs_operator(*tensors)


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.view_as(y), y.mean(1)

    @staticmethod
    def backward(ctx, dy, dmeans):
        if derivative_needs_operator(dy, dmeans):
            return dy + (dmeans / dy.shape[1])[:, None]
        return load_backend("triton").add_over_tokens(dy, dmeans)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights):
        ctx.save_for_backward(y, weights)
        return load_backend("triton").weighted_sum(y, weights)

    @staticmethod
    def backward(ctx, dout):
        y, weights = ctx.saved_tensors
        if derivative_needs_operator(dout, y, weights):
            return tuple(gradients_by(_plain_sum, (y, weights), dout))
        return load_backend("triton").weighted_sum_backward(dout, y, weights)
