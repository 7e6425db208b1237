"""2D selective scan: a Mamba mixer over a feature map, along several paths at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import selective_scan
from ..paths import SS2D as SS2D_PATHS
from ..paths import expand_paths, scan_paths
from .depthwise_conv import depthwise_conv
from .mamba import CastLinear, FusedScan, init_scan_parameters, scan_inputs, state_matrix, step_weight
from .norm import add_layer_norm


class SS2D(nn.Module):
    """SS2D block (Liu et al. 2024, VMamba, arXiv 2401.10166, section 4.2 and figure 3) on a channels-last map.

    All paths read the same convolved map, so the projections to step size, B and C are one product over
    the tokens in raster order, and the scan gathers along its paths: no cross-scan or cross-merge copies.

    Args:
        dim: channels of the map.
        d_state: states N a channel.
        expand: inner channels as a multiple of ``dim`` (official ``ssm_ratio``).
        dt_rank: rank of the step-size projection; ``ceil(dim / 16)`` if None.
        d_conv: side of the depth-wise convolution, odd; 1 for none.
        conv_bias: bias of that convolution.
        gate: multiply the normalised scan by ``silu(z)``, as in the first version; the released s1l8, s2l5,
            s1l20 and s2l15 have none (official ``_noz``).
        paths: names of scan paths over the map (:mod:`vision_mamba.paths`), one set of parameters each. One name alone
            stands for four: itself, its transpose and the reverses of both.
        norm_eps: of the norm after the scan.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 1,
        expand: float = 1.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        paths: str | Sequence[str] = SS2D_PATHS,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv={d_conv}: the convolution keeps the map's size only with an odd side")
        dd = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.d_state, self.gate, self.path_names = d_state, gate, expand_paths(paths, 4)
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        K = len(self.path_names)
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False, **dd)
        self.conv2d = (
            nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **dd)
            if d_conv > 1
            else nn.Identity()
        )
        self.x_proj_weight = nn.Parameter(torch.empty(K, self.dt_rank + 2 * d_state, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(K, inner, self.dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(K, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(K, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(K, inner, **dd))
        self.out_norm = nn.LayerNorm(inner, eps=norm_eps, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        init_scan_parameters(self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D)

    def fuse(self) -> nn.Module:
        """Its form for inference on a GPU, as :meth:`MambaMixer.fuse`."""
        return FusedSS2D(self) if self.A_log.is_cuda else self

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) -> the same shape."""
        batch, height, width, _ = x.shape
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = depthwise_conv(x, self.conv2d, "silu")  # what was convolved is out of memory before the scan
        y = self.scan(x.flatten(1, 2), height, width).unflatten(1, (height, width))
        # In the dtype of the scan, with float32 inside; autocast would make three passes of it.
        y, _ = add_layer_norm(y, None, self.out_norm)
        return self.out_proj(y * F.silu(z) if self.gate else y)

    def scan(self, u: Tensor, height: int, width: int) -> Tensor:
        """Sum of the scans along all paths: tokens (batch, L, inner) -> (batch, L, inner)."""
        u, dt, B, C = scan_inputs(u, self.x_proj_weight, self.d_state)
        y = selective_scan(
            u,
            dt,
            state_matrix(self.A_log),
            B,
            C,
            self.D,
            delta_bias=self.dt_proj_bias,
            delta_weight=step_weight(self.dt_proj_weight, dt.shape[-1]),
            delta_softplus=True,
            paths=scan_paths(self.path_names, height, width, device=u.device),
            merge="sum",
        )
        assert isinstance(y, Tensor)
        return y


class FusedSS2D(SS2D):
    """An :class:`SS2D` for inference.

    Args:
        mixer: whose parameters are taken as they are now.
    """

    def __init__(self, mixer: SS2D) -> None:
        nn.Module.__init__(self)
        self.gate, self.path_names = mixer.gate, mixer.path_names
        self.in_proj, self.conv2d = CastLinear.instead_of(mixer.in_proj), mixer.conv2d
        self.fused = FusedScan(
            mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D, own_tokens=False
        )
        self.out_norm, self.out_proj = mixer.out_norm, CastLinear.instead_of(mixer.out_proj)

    def fuse(self) -> nn.Module:
        return self

    def scan(self, u: Tensor, height: int, width: int) -> Tensor:
        return self.fused(u, None, scan_paths(self.path_names, height, width, device=u.device), "sum")
