"""Muon with the matrices of one shape orthogonalised together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.adamw import adamw

NAME = "grouped_muon"
# Of the iteration x <- a x + b (x x') x + c (x x')^2 x, step by step, as timm has them (Cesista et al. 2025, "Squeezing
# 1-2% efficiency gains out of Muon by optimizing the Newton-Schulz coefficients").
_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_SMALLEST_SIDE = 8


class GroupedMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices, AdamW for all else.

    The step of a matrix is its momentum with all singular values brought near 1 by a Newton-Schulz iteration, scaled to
    the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one rate and one weight decay serve both. timm's
    Muon works matrix by matrix: five thousand small kernels a step for RSMamba-B. Here all matrices of one shape are
    one batch. Tensors with three axes are stacks of matrices (our models keep the parameters of several scan paths so),
    those with more are convolutions, (out, in * kernel).

    Args:
        params: groups; those with `muon=False` go to AdamW whole. See `parameter_groups`.
        lr: learning rate.
        weight_decay: decoupled, times the rate.
        momentum: of matrices.
        betas: of AdamW.
        eps: of AdamW, and the least norm that a momentum is divided by.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-7,
    ) -> None:
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, betas=betas, eps=eps, muon=True)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in params if group["muon"] and is_matrix(p)]
            chosen = set(map(id, matrices))
            self._step_matrices(matrices, group)
            self._step_others([p for p in params if id(p) not in chosen], group)

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, [p.grad for p in params], 1 - group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        alike: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            alike.setdefault((*_matrix_shape(p), p.device), []).append(i)
        for (rows, columns, _), indices in alike.items():
            stacks = [buffers[i].reshape(-1, rows, columns) for i in indices]
            steps = orthogonalise(torch.cat(stacks), eps=group["eps"]).split([len(stack) for stack in stacks])
            shaped = [step.reshape(params[i].shape).to(params[i].dtype) for i, step in zip(indices, steps, strict=True)]
            scale = 0.2 * max(rows, columns) ** 0.5  # the root mean square of AdamW's steps is about 0.2
            torch._foreach_add_([params[i] for i in indices], shaped, alpha=-group["lr"] * scale)

    def _step_others(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrices: Tensor, *, eps: float) -> Tensor:
    """(batch, rows, columns) -> the same in bfloat16, every singular value brought near 1."""
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon takes it: two axes and more, no side so short that it is a few rows, no depth-wise filter."""
    depthwise = parameter.ndim > 3 and parameter.shape[1] == 1
    return parameter.ndim >= 2 and not depthwise and min(_matrix_shape(parameter)) >= _SMALLEST_SIDE


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    shape = parameter.shape
    return (shape[0], parameter.numel() // shape[0]) if parameter.ndim > 3 else (shape[-2], shape[-1])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """timm's groups: what has weight decay is for Muon; biases, norms and `no_weight_decay()` names are for AdamW."""
    names = getattr(model, "no_weight_decay", set)()
    plain, decayed = param_groups_weight_decay(model, weight_decay=weight_decay, no_weight_decay_list=names)
    return [{**plain, "muon": False}, {**decayed, "muon": True}]
