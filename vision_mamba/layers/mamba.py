"""The Mamba token mixer along any number of scan paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import causal_conv1d, causal_conv1d_of_half, selective_scan
from ..ops.backend import load_backend, needs_gradient, needs_operator, resolve_backend
from ..ops.selective_scan import block_diagonal, path_products
from .observed import is_plain


@torch.no_grad()
def init_scan_parameters(
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    dt_min: float = 0.001,
    dt_max: float = 0.1,
) -> None:
    """S4D-real A, and step sizes log-uniform in [dt_min, dt_max] (Gu & Dao 2023, section 3.6), in place.

    Args:
        x_proj_weight: (..., R + 2N, D), projection of a token to the low-rank step size, B and C.
        dt_proj_weight, dt_proj_bias: (..., D, R) and (..., D), from there to the step size.
        A_log: (..., D, N).
        D: (..., D).
    """
    x_bound, dt_bound = x_proj_weight.shape[-1] ** -0.5, dt_proj_weight.shape[-1] ** -0.5
    nn.init.uniform_(x_proj_weight, -x_bound, x_bound)
    nn.init.uniform_(dt_proj_weight, -dt_bound, dt_bound)
    dt = torch.rand_like(dt_proj_bias) * math.log(dt_max / dt_min) + math.log(dt_min)
    dt = dt.exp().clamp_min(1e-4)
    dt_proj_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
    A_log.copy_(torch.arange(1, A_log.shape[-1] + 1, device=A_log.device).log().expand_as(A_log))
    nn.init.ones_(D)


def state_matrix(A_log: Tensor) -> Tensor:
    """``A = -exp(A_log)``, at least in float32.

    A, D, the bias and the states stay float32 under autocast: bf16 steps would lose the slow decays.
    """
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.view_as(x), F.linear(x, weight)

    @staticmethod
    def backward(ctx, dx, dproduct):
        x, weight = ctx.saved_tensors
        rows = dproduct.flatten(0, -2)
        own = dx.is_contiguous() and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        # In place where it may be: what is added to would be copied first, which takes as long as a sum of two.
        add = torch.Tensor.addmm_ if own else torch.addmm
        return add(dx.flatten(0, -2), rows, weight).view_as(x), rows.t() @ x.flatten(0, -2)


def shared_linear(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that something else reads too, and their product with a matrix.

    The gradients of the two uses are added within the product of the second: autograd would add them in a pass of its
    own, over the largest tensors of a block.

    Args:
        x: (..., D), under autocast in its dtype; the caller goes on with the first result in its place, in an
            operator that gives it a gradient of its own (no plain sum, which hands one tensor to both).
        weight: (O, D).

    Returns:
        ``x``, and its product (..., O) in the same dtype.
    """
    weight = weight.to(x.dtype)  # autocast's casts would not reach the backward pass
    return _Shared.apply(x, weight) if torch.is_grad_enabled() and x.requires_grad else (x, F.linear(x, weight))


def scan_inputs(x: Tensor, weight: Tensor, d_state: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Low-rank step sizes, B and C of K paths, in one product over the tokens.

    Args:
        x: tokens that all paths read, (batch, L, D), or (batch, L, K, D).
        weight: (K, R + 2N, D), or (1, R + 2N, D) for all paths.
        d_state: N.

    Returns:
        ``x`` for the scan (:func:`shared_linear`), step sizes (batch, L, K, R), B and C (batch, L, K, N). On a GPU
        their rank may be larger, with zeros at the end: see :func:`step_weight`.
    """
    K, rank = len(weight), weight.shape[1] - 2 * d_state
    if x.ndim == 4 and K == 1:  # what path a token is of does not matter
        tokens, *parts = scan_inputs(x.flatten(1, 2), weight, d_state)
        dt, B, C = (part.unflatten(1, x.shape[1:3]).squeeze(3) for part in parts)
        return tokens.view_as(x), dt, B, C
    if x.ndim == 4 and x.device.type == "cpu":
        dt, B, C = path_products(x, weight).split((rank, d_state, d_state), dim=-1)
        return x, dt, B, C
    rank = aligned_rank(rank, K, x.device)
    shared, product = shared_linear(x.flatten(2), _input_rows(weight, d_state, rank, own_tokens=x.ndim == 4))
    parts = product.split((K * rank, K * d_state, K * d_state), dim=-1)
    dt, B, C = (part.unflatten(-1, (K, -1)) for part in parts)
    return shared.view_as(x), dt, B, C


def aligned_rank(rank: int, num_paths: int, device: torch.device) -> int:
    """On a GPU the rank with which the step sizes of all paths are a multiple of 8 numbers a token.

    Rows that are not start where no wide word does: the products of 12 + 2 * 16 columns took twice as long as of 48.
    """
    if device.type != "cuda":
        return rank
    step = 8 // math.gcd(8, num_paths)
    return -(-rank // step) * step


def step_weight(weight: Tensor, rank: int) -> Tensor:
    """The step-size projection (..., D, R) for low-rank step sizes of a larger rank, with zeros at the end."""
    more = rank - weight.shape[-1]
    return F.pad(weight, (0, more)) if more else weight


def _input_rows(weight: Tensor, d_state: int, rank: int, *, own_tokens: bool) -> Tensor:
    """(K, R + 2N, D) as one matrix (K (rank + 2N), D); with K D columns where each path has tokens of its own.

    All paths' step sizes first, then all B, then all C: each is a slice whose rows start aligned.
    """
    K, own_rank = len(weight), weight.shape[1] - 2 * d_state
    if rank > own_rank:
        zeros = weight.new_zeros(K, rank - own_rank, weight.shape[2])
        weight = torch.cat((weight[:, :own_rank], zeros, weight[:, own_rank:]), 1)
    if own_tokens:
        weight = block_diagonal(weight).unflatten(0, (K, -1))
    # Cut in one call, so that the gradient is one launch too; slices one by one have eight a path.
    pieces = weight.flatten(0, 1).split((rank, d_state, d_state) * K)
    return torch.cat([pieces[3 * k + part] for part in range(3) for k in range(K)])


class CastOnce:
    """Tensors in another dtype, which autocast would make anew in every pass: kept until they change or are replaced.

    For inference: what is kept has no gradient, and a CUDA graph that has read it does not see a tensor change later.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], tuple[Tensor, tuple[int, int], Tensor]] = {}

    def __call__(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype or torch.compiler.is_compiling():
            return tensor.to(dtype)
        state = tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
        kept = self.kept.get((name, dtype))
        if kept is not None and kept[0] is tensor and kept[1] == state:
            return kept[2]
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return tensor.to(dtype)  # in memory that the graph's next run writes over
        # What is made in inference mode could not be used outside of it with gradients.
        with torch.inference_mode(False), torch.no_grad():
            cast = tensor.to(dtype)
        self.kept[name, dtype] = tensor, state, cast
        return cast


class CastLinear(nn.Linear):
    """A linear layer for inference, whose parameters are cast to the dtype of its input once.

    Args:
        linear: whose parameters it has.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._cast = CastOnce()

    @classmethod
    def instead_of(cls, linear: nn.Linear) -> nn.Linear:
        """Of a plain layer; one with hooks, or what an adapter has put in its place, stays what it is."""
        return cls(linear) if is_plain(linear, nn.Linear) else linear

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in this dtype; themselves where they want gradients."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return self.weight, self.bias
        bias = None if self.bias is None else self._cast("bias", self.bias, dtype)
        return self._cast("weight", self.weight, dtype), bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.cast(x.dtype))


def with_cast_linears(module: nn.Module, *names: str) -> nn.Module:
    """A copy with the same parameters, for inference, in which these linear layers are cast once."""
    fused = copy.copy(module)
    fused._modules = module._modules | {name: CastLinear.instead_of(getattr(module, name)) for name in names}
    return fused


class FusedScan(nn.Module):
    """The projections and the scan of a mixer, for inference: what comes of parameters alone is computed once.

    Args:
        x_proj_weight: (K, R + 2N, D); K is 1 where one set of parameters serves all paths.
        dt_proj_weight, dt_proj_bias: (K, D, R) and (K, D).
        A_log: (K, D, N), or of all paths where one set of the other parameters serves them.
        D: (K, D).
        own_tokens: each path has tokens of its own, (batch, L, K, D).
    """

    A: Tensor
    D: Tensor
    dt_bias: Tensor
    rows: Tensor
    steps: Tensor

    def __init__(
        self,
        x_proj_weight: Tensor,
        dt_proj_weight: Tensor,
        dt_proj_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        *,
        own_tokens: bool,
    ) -> None:
        super().__init__()
        A = state_matrix(A_log.detach())
        self.sets, self.d_state = len(x_proj_weight), A.shape[-1]
        self.register_buffer("A", A)
        self.register_buffer("D", D.detach().clone())
        self.register_buffer("dt_bias", dt_proj_bias.detach().clone())
        rank = aligned_rank(dt_proj_weight.shape[-1], self.sets, A.device)
        rows = _input_rows(x_proj_weight.detach(), self.d_state, rank, own_tokens=own_tokens)
        self.register_buffer("rows", rows)
        self.register_buffer("steps", block_diagonal(step_weight(dt_proj_weight.detach(), rank).transpose(1, 2)))
        self._cast = CastOnce()

    def _apply(self, fn, recurse=True):
        self._cast.kept.clear()  # with them the memory of buffers that are about to be others
        return super()._apply(fn, recurse)

    def forward(self, u: Tensor, z: Tensor | None, paths: Tensor, merge: str) -> Tensor:
        """Tokens (batch, L, D) or (batch, L, K, D), gate (batch, L, D) -> as :func:`selective_scan`."""
        rows, steps = self._cast("rows", self.rows, u.dtype), self._cast("steps", self.steps, u.dtype)
        A, D, bias = self.A, self.D, self.dt_bias
        # What path a token is of does not matter to parameters of all paths.
        tokens = u.flatten(1, 2).unsqueeze(2) if u.ndim == 4 and self.sets == 1 else u
        if self._in_one_kernel(tokens):
            delta, B, C = load_backend("triton").scan_inputs(tokens, rows, steps)
        else:
            states = self.sets * self.d_state
            dt, B, C = F.linear(tokens.flatten(2), rows).split((len(steps), states, states), dim=-1)
            delta, B, C = (tensor.unflatten(-1, (self.sets, -1)) for tensor in (dt @ steps, B, C))
        if self.sets == 1:
            A, D, bias = A if len(A) > 1 else A[0], D[0], bias[0]
            delta, B, C = (t.squeeze(2) if u.ndim == 3 else t.reshape(*u.shape[:3], -1) for t in (delta, B, C))
        y = selective_scan(
            u, delta, A, B, C, D, z, bias, delta_softplus=True, paths=paths, merge=merge, overwrite_delta=True
        )
        assert isinstance(y, Tensor)
        return y

    def _in_one_kernel(self, u: Tensor) -> bool:
        """Where paths have their own tokens (for shared ones it is not faster), and nobody has to see the products.

        A program holds rank and states of its tokens. Numbers of 32 bits a GPU's matrix units would round.
        """
        small = max(len(self.steps) // self.sets, 2 * self.d_state) <= 64
        if u.ndim == 3 or not small or u.dtype not in (torch.bfloat16, torch.float16):
            return False
        return not needs_operator(u) and not needs_gradient(u) and resolve_backend(None, u.device) == "triton"


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, paths: Tensor | None, conv: Callable = causal_conv1d) -> Any:
    """Tokens (batch, L, D) convolved along each path, (batch, L, K, D), or in raster order without paths."""
    if paths is None:
        return conv(x, weight[0], bias[0], activation="silu")
    return conv(x, weight, bias, activation="silu", paths=paths)


class MambaMixer(nn.Module):
    """Mamba block (Gu & Dao 2023, figure 3) whose scan walks K paths at once.

    One input projection, gate and output projection serve all paths, token by token in raster order.
    Convolution, projections to delta, B, C, and A, D belong to a path (Zhu et al. 2024, Vim,
    algorithm 1); with ``share_paths`` one set serves all paths after a convolution in raster order,
    and only A is a path's own.

    Args:
        dim: channels of a token.
        d_state: states N a channel.
        d_conv: width of the causal convolution.
        expand: inner channels as a multiple of ``dim``.
        dt_rank: rank of the step-size projection; ``ceil(dim / 16)`` if None.
        num_paths: K.
        share_paths: one convolution, projection and D for all paths.
        average: mean over the paths instead of their sum.
        layer_scale: initial value of a learned scale of the output, or None for none.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        num_paths: int = 2,
        share_paths: bool = False,
        average: bool = False,
        layer_scale: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = expand * dim
        sets = 1 if share_paths else num_paths
        self.d_state, self.num_paths, self.share_paths = d_state, num_paths, share_paths
        self.average = average
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(sets, self.dt_rank + 2 * d_state, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(sets, inner, self.dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(sets, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(num_paths, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(sets, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.gamma = nn.Parameter(torch.empty(dim, **dd)) if layer_scale is not None else None
        self.reset_parameters()
        if self.gamma is not None:
            nn.init.constant_(self.gamma, layer_scale or 0.0)

    def reset_parameters(self) -> None:
        conv_bound = 1 / math.sqrt(self.conv_weight.shape[-1])
        nn.init.uniform_(self.conv_weight, -conv_bound, conv_bound)
        nn.init.uniform_(self.conv_bias, -conv_bound, conv_bound)
        init_scan_parameters(self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D)

    def fuse(self) -> nn.Module:
        """Its form for inference on a GPU; on a CPU itself, where that form takes longer.

        ``timm.utils.reparameterize_model`` calls this: on the device where the model will run.
        """
        return FusedMambaMixer(self) if self.A_log.is_cuda else self

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:
        """(batch, L, dim) and paths (K, L) -> (batch, L, dim)."""
        conv_paths = None if self.share_paths else paths
        x, z = _convolved(self.in_proj(x), self.conv_weight, self.conv_bias, conv_paths, causal_conv1d_of_half)
        x, dt, B, C = scan_inputs(x, self.x_proj_weight, self.d_state)
        if self.share_paths:
            dt, B, C = dt.squeeze(2), B.squeeze(2), C.squeeze(2)
        y = selective_scan(
            x,
            dt,
            state_matrix(self.A_log),
            B,
            C,
            self.D[0] if self.share_paths else self.D,
            z,
            self.dt_proj_bias[0] if self.share_paths else self.dt_proj_bias,
            delta_weight=step_weight(self.dt_proj_weight[0] if self.share_paths else self.dt_proj_weight, dt.shape[-1]),
            delta_softplus=True,
            paths=paths,
            merge="sum",
        )
        assert isinstance(y, Tensor)
        y = self.out_proj(y)
        if self.average:  # after the projection, which is linear: there it costs less
            y = y / self.num_paths
        return y if self.gamma is None else y * self.gamma


def dense_in_channels(weight: Tensor) -> Tensor:
    """A copy of a convolution's weight (..., D, width), channels last in memory: as the Triton kernels read it."""
    return weight.transpose(-2, -1).clone(memory_format=torch.contiguous_format).transpose(-2, -1)


# From so many on, tokens and gate are two products: the first is then out of memory before the scan's large tensors
# come. On an H100 that takes 1 % longer with 48,680 tokens (8 images of 1248 pixels), and 4 % with 25,216.
_MANY_TOKENS = 40_000


class FusedMambaMixer(nn.Module):
    """A :class:`MambaMixer` for inference. The paths are added, averaged and scaled within the output projection.

    Args:
        mixer: whose parameters are taken as they are now.
    """

    conv_weight: Tensor
    conv_bias: Tensor

    def __init__(self, mixer: MambaMixer) -> None:
        super().__init__()
        K = mixer.num_paths
        self.share_paths, self.in_proj = mixer.share_paths, CastLinear.instead_of(mixer.in_proj)
        self.register_buffer("conv_weight", dense_in_channels(mixer.conv_weight.detach()))
        self.register_buffer("conv_bias", mixer.conv_bias.detach().clone())
        self.scan = FusedScan(
            mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D,
            own_tokens=not mixer.share_paths,
        )  # fmt: skip
        weight = mixer.out_proj.weight.detach() / (K if mixer.average else 1)
        if mixer.gamma is not None:
            weight = weight * mixer.gamma.detach()[:, None]
        out_proj = nn.Linear(K * weight.shape[1], weight.shape[0], bias=False, device="meta")
        out_proj.weight = nn.Parameter(weight.repeat(1, K), requires_grad=False)
        self.out_proj = CastLinear(out_proj)

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:
        """(batch, L, dim) and paths (K, L) -> (batch, L, dim)."""
        conv_paths = None if self.share_paths else paths
        proj = self.in_proj
        # What adapters and hooks put on the projection would be passed by.
        if x.shape[0] * x.shape[1] >= _MANY_TOKENS and is_plain(proj, CastLinear):
            of_tokens, of_z = proj.cast(x.dtype)[0].chunk(2)
            tokens = _convolved(F.linear(x, of_tokens), self.conv_weight, self.conv_bias, conv_paths)
            z = F.linear(x, of_z)
        else:
            tokens, z = proj(x).chunk(2, dim=-1)
            tokens = _convolved(tokens, self.conv_weight, self.conv_bias, conv_paths)
        return self.out_proj(self.scan(tokens, z, paths, "none").flatten(2))
