"""MambaVision's token mixer: a scan of one half of the channels beside a convolution of the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import selective_scan
from .mamba import init_scan_parameters, state_matrix


class MambaVisionMixer(nn.Module):
    """Mixer of MambaVision (Hatamizadeh & Kautz 2024, arXiv 2407.08083, section 3).

    ``out_proj(concat(scan(silu(conv(x))), silu(conv(z))))``, x and z being the halves of ``in_proj``: no gate, and
    the convolution looks at both neighbours of a token. One path, in the order of the tokens.

    Args:
        dim: channels of a token, an even number.
        d_state: states N a channel.
        d_conv: width of the convolution, odd.
    """

    def __init__(self, dim: int, *, d_state: int = 8, d_conv: int = 3, device=None, dtype=None) -> None:
        super().__init__()
        if dim % 2 or d_conv % 2 == 0:
            raise ValueError(f"dim={dim}, d_conv={d_conv}: dim must be even, and d_conv odd")
        dd = {"device": device, "dtype": dtype}
        inner = dim // 2
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        # Over tokens: in 2D, of height 1, torch keeps them channels-last, where its Conv1d would copy them.
        self.conv = nn.Conv2d(dim, dim, (1, d_conv), padding=(0, d_conv // 2), groups=dim, bias=False, **dd)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        init_scan_parameters(self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, L, dim) -> (batch, L, dim)."""
        x = self.in_proj(x).transpose(1, 2).unsqueeze(2)
        x, z = F.silu(self.conv(x)).squeeze(2).transpose(1, 2).chunk(2, dim=-1)
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        y = selective_scan(
            x,
            F.linear(dt, self.dt_proj.weight),
            state_matrix(self.A_log),
            B,
            C,
            self.D,
            delta_bias=2 * self.dt_proj.bias,  # the official code adds it in the projection and in the scan
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        return self.out_proj(torch.cat((y, z), dim=-1))
