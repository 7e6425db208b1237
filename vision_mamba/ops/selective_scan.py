"""The selective scan: public function, custom operator, autograd.

``torch.ops.vision_mamba.selective_scan`` takes canonical shapes (K always present); the public
function below brings the user's shapes into that form with views, never with copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .backend import derivative_needs_operator, load_backend, needs_gradient, needs_operator, resolve_backend


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_weight: Tensor | None = None,
    delta_softplus: bool = False,
    paths: Tensor | None = None,
    merge: str = "none",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    overwrite_delta: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan of image tokens along K paths at once.

    For each path and channel, over the tokens in the path's order::

        h_t = exp(delta_t * A) * h_(t-1) + delta_t * B_t * u_t
        y_t = (<C_t, h_t> + D * u_t) * silu(z_t)

    Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.
    All tensors are in raster (token) order; the path only decides the order of the recurrence.
    ``delta`` decides whether the path axis K is written out: with ``delta`` (batch, L, D) the tensors
    ``B`` and ``C`` have no K either and every path reads them.

    Args:
        u: tokens, (batch, L, D), read by every path, or (batch, L, K, D). float32, bfloat16, float16, float64.
        delta: step sizes before bias and softplus, (batch, L, K, D) or (batch, L, D).
        A: state matrix, negative, (K, D, N), or (D, N) for all paths.
        B: input matrix, (batch, L, K, N) or with G groups of channels (batch, L, K, G, N); channel d
            belongs to group d // (D / G).
        C: output matrix, shaped as ``B``.
        D: skip weights, (K, D) or (D,).
        z: gate, (batch, L, D) or (batch, L, K, D).
        delta_bias: added to ``delta``, (K, D) or (D,).
        delta_weight: (K, D, R), or (D, R) for all paths: then ``delta`` is low-rank, (batch, L, K, R) or
            (batch, L, R), and its product with this matrix are the step sizes. A training step keeps only the low-rank
            form and multiplies again in its backward pass (not in compiled code, which sees the plain product).
        delta_softplus: apply softplus to ``delta + delta_bias``.
        paths: (K, L) integer permutations of the tokens, or (L,) for one path; None is raster order.
        merge: ``"none"`` or ``"sum"`` over the paths.
        initial_state: state before the first step, (batch, K, D, N), or (batch, D, N) without K.
        return_last_state: also return the state after the last step of each path.
        overwrite_delta: the caller has no further use for ``delta``, and y may be written over it. It is where no
            gradient is wanted, on a GPU and with ``merge="none"``, which saves as much memory as y takes.
        backend: ``"triton"``, ``"cpu"`` or ``"reference"``; by device if None.

    Returns:
        y in the dtype of ``u``: (batch, L, K, D); (batch, L, D) with ``merge="sum"`` or where neither
        ``delta`` nor ``paths`` has a K axis. With ``return_last_state``, also the last state in float32
        (float64 for float64 inputs), (batch, K, D, N) or (batch, D, N). The backward pass may read y: until then
        it is not to be changed in place, which autograd reports.

    Raises:
        ValueError: shapes that do not fit together, a path that is no permutation, an unknown name.
        RuntimeError: the backend cannot run on the tensors' device.
    """
    if merge not in ("none", "sum"):
        raise ValueError(f"merge={merge!r}: allowed are 'none' and 'sum'")
    name = resolve_backend(backend, u.device)
    if delta_weight is not None:
        _check_steps(u, delta, delta_weight)
        given = (u, delta, A, B, C, D, z, delta_bias, initial_state, delta_weight)
        # Without a path axis the low-rank form would be read once a path, and is multiplied before.
        if name == "reference" or delta.ndim == 3 or needs_operator(*given):
            delta, delta_weight = step_sizes(delta, delta_weight), None
    u4, delta4, A, B, C, D, z, delta_bias, paths4, initial_state, has_paths = _canonical(
        u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_weight
    )
    if name == "reference":
        y, last_state = reference.selective_scan(
            u4, delta4, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus, paths=paths4, merge=merge,
            initial_state=initial_state, return_last_state=True,
        )  # fmt: skip
    else:
        tensors = (u4, delta4, A, B, C, D, z, delta_bias, initial_state, delta_weight)
        save_states = needs_gradient(*tensors)
        options = (delta_softplus, merge == "sum", save_states, name)
        inputs = (u4, delta4, A, B, C, D, z, delta_bias, paths4, initial_state, *options)
        if needs_operator(*tensors):
            y, last_state, _ = torch.ops.vision_mamba.selective_scan(*inputs)
        elif save_states:
            y, last_state, _ = _Scan.apply(delta_weight, *inputs)
        else:
            y, last_state, _ = _forward(*inputs, delta_weight, overwrite_delta)
    if merge == "none" and not has_paths:
        y = y.squeeze(2)
    if not return_last_state:
        return y
    return y, last_state if has_paths else last_state.squeeze(1)


def _check_steps(u: Tensor, delta: Tensor, weight: Tensor) -> None:
    paths = delta.shape[2:-1]  # empty without a path axis
    allowed = [(u.shape[-1], delta.shape[-1])] + ([(*paths, u.shape[-1], delta.shape[-1])] if paths else [])
    if tuple(weight.shape) not in allowed:
        raise ValueError(
            f"delta_weight has shape {tuple(weight.shape)}; with delta {tuple(delta.shape)} and u {tuple(u.shape)} "
            f"expected {' or '.join(str(shape) for shape in allowed)}"
        )
    if weight.device != u.device:
        raise ValueError(f"delta_weight is on {weight.device}, u on {u.device}")


def block_diagonal(weight: Tensor) -> Tensor:
    """(K, O, I) -> (K * O, K * I): the products of all paths in one, for a GPU.

    It multiplies zeros, but K thin products, and above all the gradients of their weights, take far longer there.
    """
    return torch.diag_embed(weight.permute(1, 2, 0), dim1=0, dim2=2).flatten(2).flatten(0, 1)


def path_products(x: Tensor, weight: Tensor) -> Tensor:
    """Each path's vectors (batch, L, K, I) times its own matrix (K, O, I) -> (batch, L, K, O), path by path.

    For a CPU, which takes its time for zeros too; a GPU has :func:`block_diagonal`.
    """
    by_path = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight.transpose(1, 2))
    return by_path.transpose(0, 1).unflatten(0, x.shape[:2])


def step_matrix(delta: Tensor, weight: Tensor | None) -> Tensor | None:
    """The block-diagonal (K D, K R) of ``weight`` (K, D, R) that a GPU multiplies low-rank steps by, in their dtype.

    None where there is one matrix (D, R) for all paths or none at all, and on a CPU, which multiplies path by path.
    """
    if weight is None or weight.ndim == 2 or delta.device.type == "cpu":
        return None
    return block_diagonal(weight.to(delta.dtype))


def step_sizes(delta: Tensor, weight: Tensor | None, matrix: Tensor | None = None) -> Tensor:
    """Low-rank step sizes (batch, L, K, R) or (batch, L, R) times (K, D, R) or (D, R), in the dtype of ``delta``.

    With their :func:`step_matrix`, where it is known.
    """
    if weight is None:
        return delta
    if matrix is None:
        matrix = step_matrix(delta, weight)
    if matrix is not None:
        return F.linear(delta.flatten(2), matrix).unflatten(-1, weight.shape[:2])
    weight = weight.to(delta.dtype)
    return F.linear(delta, weight) if weight.ndim == 2 else path_products(delta, weight)


def _step_gradients(ddelta: Tensor, delta: Tensor, weight: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of what ``step_sizes`` was given, for a ``delta`` with a path axis."""
    if matrix is not None:
        K, D, R = weight.shape
        of_delta = (ddelta.flatten(2) @ matrix).unflatten(-1, (K, R))
        blocks = (ddelta.flatten(2).flatten(0, 1).t() @ delta.flatten(2).flatten(0, 1)).view(K, D, K, R)
        return of_delta, blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).to(weight.dtype)
    own = weight.to(delta.dtype)
    if weight.ndim == 2:
        return ddelta @ own, (ddelta.flatten(0, 2).t() @ delta.flatten(0, 2)).to(weight.dtype)
    of_weight = torch.bmm(ddelta.flatten(0, 1).permute(1, 2, 0), delta.flatten(0, 1).transpose(0, 1))
    return path_products(ddelta, own.transpose(1, 2)), of_weight.to(weight.dtype)


def _canonical(u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_weight=None):
    """Views with K everywhere: u, z (b, L, 1 or K, D); delta (b, L, K, D); B, C (b, L, K, G, N); A (K, D, N).

    With ``delta_weight`` the last axis of ``delta`` is its rank.
    """
    if u.ndim not in (3, 4) or delta.ndim not in (3, 4):
        raise ValueError(f"u and delta must have 3 or 4 axes, got {tuple(u.shape)} and {tuple(delta.shape)}")
    batch, length, dim = u.shape[0], u.shape[1], u.shape[-1]
    delta_has_paths = delta.ndim == 4
    has_paths = delta_has_paths or (paths is not None and paths.ndim == 2)
    paths = canonical_paths(paths, delta.shape[2] if delta_has_paths else None, length, u.device)
    num_paths, num_states = paths.shape[0], A.shape[-1]

    def fit(name: str, tensor: Tensor, *shapes: tuple) -> None:
        if tuple(tensor.shape) not in shapes:
            allowed = " or ".join(str(tuple(s)) for s in shapes)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with u {tuple(u.shape)} expected {allowed}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}")
        if not tensor.is_floating_point():  # a complex A would lose its imaginary part without a word
            raise ValueError(f"{name} is {tensor.dtype}; expected a real floating-point tensor")

    shared, per_path = (batch, length, dim), (batch, length, num_paths, dim)
    fit("u", u, shared, per_path)
    if delta_weight is None:
        fit("delta", delta, per_path if delta_has_paths else shared)
    else:
        fit("delta", delta, (*per_path[:3], delta.shape[-1]))
    fit("A", A, (dim, num_states), (num_paths, dim, num_states))
    for name, tensor in (("B", B), ("C", C)):
        lead = (batch, length, num_paths) if delta_has_paths else (batch, length)
        groups = tensor.shape[-2] if tensor.ndim == len(lead) + 2 else 1
        fit(name, tensor, (*lead, num_states), (*lead, groups, num_states))
        if dim % groups:
            raise ValueError(f"{name} has {groups} groups, which do not divide the {dim} channels")
    if B.shape != C.shape:
        raise ValueError(f"B {tuple(B.shape)} and C {tuple(C.shape)} differ in shape")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            fit(name, tensor, (dim,), (num_paths, dim))
    if z is not None:
        fit("z", z, shared, per_path)
        z = z.unsqueeze(2) if z.ndim == 3 else z
    if initial_state is not None:
        fit("initial_state", initial_state, (batch, num_paths, dim, num_states), *(
            [] if has_paths else [(batch, dim, num_states)]
        ))  # fmt: skip
        initial_state = initial_state.reshape(batch, num_paths, dim, num_states)

    grouped = (lambda t: t) if B.ndim == (5 if delta_has_paths else 4) else (lambda t: t.unsqueeze(-2))
    B, C = grouped(B), grouped(C)
    if not delta_has_paths:
        delta, B, C = (
            t.unsqueeze(2).expand(batch, length, num_paths, *t.shape[2:]) for t in (delta, B, C)
        )  # fmt: skip
    u = u.unsqueeze(2) if u.ndim == 3 else u
    A = A.expand(num_paths, dim, num_states)
    D = D.expand(num_paths, dim) if D is not None else None
    delta_bias = delta_bias.expand(num_paths, dim) if delta_bias is not None else None
    return u, delta, A, B, C, D, z, delta_bias, paths, initial_state, has_paths


def canonical_paths(paths: Tensor | None, num_paths: int | None, length: int, device: torch.device) -> Tensor:
    """(K, L) int32 on ``device``; raster order where there are none."""
    if paths is None:
        return torch.arange(length, dtype=torch.int32, device=device).expand(num_paths or 1, length)
    if paths.ndim not in (1, 2) or paths.shape[-1] != length or paths.is_floating_point():
        raise ValueError(
            f"paths must be integers of shape (K, {length}) or ({length},), got {paths.dtype} {tuple(paths.shape)}"
        )
    if num_paths is not None and paths.ndim == 2 and paths.shape[0] != num_paths:
        raise ValueError(f"paths has {paths.shape[0]} rows for {num_paths} paths")
    if paths.ndim == 1 and num_paths not in (None, 1):
        raise ValueError(f"paths is one path of shape ({length},), but there are {num_paths} paths")
    return paths.reshape(-1, length).to(device=device, dtype=torch.int32)


# Schemas are spelt out: torch 2.6 cannot infer them from annotations such as ``list[Tensor]``.
_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor paths, "
    "Tensor? initial_state"
)


def _forward(
    u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, save_states, backend,
    delta_weight=None, overwrite_delta=False,
):  # fmt: skip
    """Canonical shapes in; y, last state (b, K, D, N) and the backend's saved border states out."""
    return load_backend(backend).selective_scan_forward(
        u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, save_states, delta_weight,
        overwrite_delta,
    )  # fmt: skip


_scan = torch.library.custom_op(
    "vision_mamba::selective_scan",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, bool delta_softplus, bool merge, bool save_states, str backend) -> (Tensor, Tensor, Tensor)",
)


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, save_states, backend):
    batch, length, num_paths, dim = delta.shape
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    y = u.new_empty((batch, length, dim) if merge else (batch, length, num_paths, dim))
    last_state = u.new_empty((batch, num_paths, dim, A.shape[-1]), dtype=dtype)
    return y, last_state, load_backend(backend).new_states(u, delta, B, A.shape[-1], save_states)


def _backward(
    dy, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge, backend,
    y=None, overwrite_delta=False,
):  # fmt: skip
    """Gradients of the tensors that are there, in the order u, delta, A, B, C, D, z, delta_bias, initial_state.

    With ``y``, where the backend wants it (:func:`_output_for`).
    """
    grads = load_backend(backend).selective_scan_backward(
        dy, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, paths, initial_state, delta_softplus, merge,
        y, overwrite_delta,
    )  # fmt: skip
    # Dense, as the fake kernel says: compiled code relies on the strides.
    return [grad.contiguous() for grad in grads if grad is not None]


_scan_backward = torch.library.custom_op(
    "vision_mamba::selective_scan_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? dlast_state, Tensor states, {_TENSORS}, bool delta_softplus, bool merge, str backend, "
    "Tensor? y=None) -> Tensor[]",
)


@_scan_backward.register_fake
def _(dy, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, paths, initial_state, *_):
    present = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in present if t is not None]


def _no_second_order(ctx, *grads):
    raise RuntimeError("selective_scan has no second derivative; use backend='reference' for double backward")


def _setup_context(ctx, inputs, output):
    *tensors, delta_softplus, merge, save_states, backend = inputs
    if not save_states:
        raise RuntimeError("vision_mamba::selective_scan needs save_states=True to be differentiated")
    y, _, states = output
    ctx.save_for_backward(*tensors, states, _output_for(backend, y, tensors, merge))
    ctx.options = (delta_softplus, merge, backend)
    ctx.set_materialize_grads(False)


def _output_for(backend, y, tensors, merge):
    """``y``, if the backward pass wants it."""
    u, _, A, _, _, _, z, *_ = tensors
    return y if load_backend(backend).wants_output(u, A, z, merge) else None


def _scan_autograd(ctx, dy, dlast_state, dstates):
    *tensors, states, y = ctx.saved_tensors
    return _gradients(ctx.options, tensors, states, y, dy, dlast_state)


def _gradients(options, tensors, states, y, dy, dlast_state, overwrite_delta=False):
    u, delta, A, B, C, D, z, delta_bias, paths, initial_state = tensors
    delta_softplus, merge, backend = options
    if dy is None:
        batch, length, num_paths, dim = delta.shape
        dy = u.new_zeros((batch, length, dim) if merge else (batch, length, num_paths, dim))
    run = partial(_backward, overwrite_delta=overwrite_delta)
    if derivative_needs_operator(dy, dlast_state, states, y, *tensors):
        run = torch.ops.vision_mamba.selective_scan_backward
    grads = iter(run(dy, dlast_state, states, *tensors, delta_softplus, merge, backend, y))
    differentiable = (u, delta, A, B, C, D, z, delta_bias)
    of_inputs = [next(grads) if t is not None else None for t in differentiable]
    of_state = next(grads) if initial_state is not None else None
    return (*of_inputs, None, of_state, None, None, None, None)


_scan.register_autograd(_scan_autograd, setup_context=_setup_context)
_scan_backward.register_autograd(_no_second_order)


class _Results(threading.local):
    """Of the scans of a piece of a model: where they are kept, or taken from, in this thread now."""

    now: _KeptScans | None = None


_results = _Results()


class _KeptScans:
    """A context whose scans keep their results in ``kept``, or (``again``) take them from there in the same order."""

    def __init__(self, kept: list[tuple[tuple[Tensor, int], ...]], again: bool) -> None:
        self.kept, self.again = kept, again

    def __enter__(self) -> None:
        self.outer, _results.now = _results.now, self
        self.place = 0

    def __exit__(self, *_) -> None:
        _results.now = self.outer

    def output(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if not self.again:
            output = run()
            self.kept.append(tuple((tensor.detach(), tensor._version) for tensor in output))
            return output
        kept, self.place = self.kept[self.place], self.place + 1
        if any(tensor._version != version for tensor, version in kept):
            raise RuntimeError("selective checkpointing: the output of a scan was changed in place after the scan")
        return tuple(tensor.detach() for tensor, _ in kept)


def keep_scans() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For ``context_fn`` of ``torch.utils.checkpoint.checkpoint``: recomputation without running a scan again.

    What scans give is kept (y, and border states for their backward pass), and all else that the piece computes is
    not. PyTorch's own ``create_selective_checkpoint_contexts`` does the same, and is what a compiler can trace, but
    eagerly it is asked about every operator: half as long again for a training step of Vim-Ti (docs/architecture.md).
    """
    kept: list[Any] = []
    return _KeptScans(kept, again=False), _KeptScans(kept, again=True)


class _Scan(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, and with low-rank step sizes."""

    @staticmethod
    def forward(ctx, delta_weight, u, delta, *inputs):
        *tensors, delta_softplus, merge, _, backend = inputs
        matrix = step_matrix(delta, delta_weight)  # kept: made anew it is several launches

        def run():
            if matrix is None:
                return _forward(u, delta, *inputs, delta_weight)
            return _forward(u, step_sizes(delta, delta_weight, matrix), *inputs)

        output = run() if _results.now is None else _results.now.output(run)
        y, _, states = output
        # As to paths, low-rank step sizes are like any.
        y = _output_for(backend, y, (u, delta, *tensors), merge)
        ctx.save_for_backward(u, delta, *tensors, states, y, delta_weight, matrix)
        ctx.options = (delta_softplus, merge, backend)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, dy, dlast_state, dstates):
        u, delta, *tensors, states, y, weight, matrix = ctx.saved_tensors
        steps = step_sizes(delta, weight, matrix)
        own = steps is not delta
        du, ddelta, *grads = _gradients(ctx.options, (u, steps, *tensors), states, y, dy, dlast_state, own)
        dweight = None
        if weight is not None:
            ddelta, dweight = _step_gradients(ddelta, delta, weight, matrix)
        return dweight, du, ddelta, *grads
