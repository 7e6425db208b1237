"""The Mamba token mixer whose one set of parameters serves every scan path."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..ops import causal_conv1d_of_half, selective_scan
from .mamba import init_scan_parameters, shared_linear, state_matrix


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

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:
        """(batch, L, dim) and paths (K, L) -> (batch, L, dim)."""
        projected = self.in_proj(x)
        x, z = causal_conv1d_of_half(projected, self.conv_weight, self.conv_bias, activation="silu", paths=paths)
        x, product = shared_linear(x, self.x_proj_weight)
        dt, B, C = product.split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        y = selective_scan(
            x,
            dt,
            state_matrix(self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj_bias,
            delta_weight=self.dt_proj_weight,
            delta_softplus=True,
            paths=paths,
            merge="sum" if self.gate is None else "none",
        )
        assert isinstance(y, Tensor)
        if self.gate is None:
            return self.out_proj(y) / self.num_paths
        scores = self.gate(self.out_proj(y.mean(1)).flatten(1))
        weights = scores.softmax(-1).to(y.dtype)
        return self.out_proj((y * weights[:, None, :, None]).sum(2))
