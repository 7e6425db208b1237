"""The Mamba token mixer whose one set of parameters serves every scan path."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..ops import causal_conv1d_of_half, path_means, selective_scan, weighted_path_sum
from .mamba import (
    CastLinear,
    FusedScan,
    dense_in_channels,
    init_scan_parameters,
    scan_inputs,
    state_matrix,
    step_weight,
)


class MultiPathMixer(nn.Module):
    """Dynamic multi-path activation (Chen et al. 2024, RSMamba, arXiv 2403.19654, section III-C).

    The same Mamba block (Gu & Dao 2023, figure 3) reads the tokens along K paths. What works token by token
    (input projection, gate z, output projection) is done once, in raster order; each path has its own
    convolved tokens, and so its own step sizes, B and C, but all parameters are shared.

    The paper gates the K outputs of the block, ``softmax(W [mean_1 ... mean_K])`` with ``mean_k`` the mean over the
    tokens of path k. The output projection is linear and has no bias, so it is applied to the K means and to
    the gated sum, not to K sequences.

    Args:
        dim: channels of a token.
        num_paths: K.
        d_state: states N a channel.
        d_conv: width of the causal convolution.
        expand: inner channels as a multiple of ``dim``.
        dt_rank: rank of the step-size projection; ``ceil(dim / 16)`` if None.
        merge: ``"gate"`` or ``"mean"`` over the paths; one path has no gate.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_paths: int = 3,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        merge: Literal["gate", "mean"] = "gate",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if merge not in ("gate", "mean"):
            raise ValueError(f"merge={merge!r}: allowed are 'gate', 'mean'")
        dd = {"device": device, "dtype": dtype}
        inner = expand * dim
        self.num_paths, self.d_state = num_paths, d_state
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(inner, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(inner, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(self.dt_rank + 2 * d_state, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(inner, self.dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(inner, **dd))
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        gated = merge == "gate" and num_paths > 1
        self.gate = nn.Linear(num_paths * dim, num_paths, bias=False, **dd) if gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        conv_bound = 1 / math.sqrt(self.conv_weight.shape[-1])
        nn.init.uniform_(self.conv_weight, -conv_bound, conv_bound)
        nn.init.uniform_(self.conv_bias, -conv_bound, conv_bound)
        init_scan_parameters(self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D)

    def fuse(self) -> nn.Module:
        """Its form for inference on a GPU, as :meth:`MambaMixer.fuse`."""
        return FusedMultiPathMixer(self) if self.A_log.is_cuda else self

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:
        """(batch, L, dim) and paths (K, L) -> (batch, L, dim)."""
        projected = self.in_proj(x)
        u, z = causal_conv1d_of_half(projected, self.conv_weight, self.conv_bias, activation="silu", paths=paths)
        return self._together(self._scan(u, z, paths, "sum" if self.gate is None else "none"))

    def _scan(self, u: Tensor, z: Tensor, paths: Tensor, merge: str) -> Tensor:
        u, dt, B, C = scan_inputs(u, self.x_proj_weight[None], self.d_state)
        y = selective_scan(
            u,
            dt,
            state_matrix(self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj_bias,
            delta_weight=step_weight(self.dt_proj_weight, dt.shape[-1]),
            delta_softplus=True,
            paths=paths,
            merge=merge,
        )
        assert isinstance(y, Tensor)
        return y

    def _together(self, y: Tensor) -> Tensor:
        """The block's output from the scan's, (batch, L, inner) without a gate, else (batch, L, K, inner)."""
        if self.gate is None:
            return self.out_proj(y) / self.num_paths
        y, means = path_means(y)
        scores = self.gate(self.out_proj(means).flatten(1))
        return self.out_proj(weighted_path_sum(y, scores.softmax(-1)))


class FusedMultiPathMixer(MultiPathMixer):
    """A :class:`MultiPathMixer` for inference.

    Args:
        mixer: whose parameters are taken as they are now.
    """

    def __init__(self, mixer: MultiPathMixer) -> None:
        nn.Module.__init__(self)
        self.num_paths, self.gate = mixer.num_paths, mixer.gate
        self.in_proj, self.out_proj = CastLinear.instead_of(mixer.in_proj), CastLinear.instead_of(mixer.out_proj)
        self.register_buffer("conv_weight", dense_in_channels(mixer.conv_weight.detach()))
        self.register_buffer("conv_bias", mixer.conv_bias.detach().clone())
        one = (mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D)
        self.scan = FusedScan(*(parameter[None] for parameter in one), own_tokens=True)

    def fuse(self) -> nn.Module:
        return self

    def _scan(self, u: Tensor, z: Tensor, paths: Tensor, merge: str) -> Tensor:
        return self.scan(u, z, paths, merge)
