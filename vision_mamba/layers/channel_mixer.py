"""The selective channel mixer: a Mamba block whose sequence is the channels of a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import causal_conv1d, selective_scan
from ..paths import scan_paths
from .mamba import init_scan_parameters, state_matrix


class ChannelMixer(nn.Module):
    """Selective channel mixer (Behrouz et al. 2024, MambaMixer, arXiv 2403.19888, equations 12 to 18).

    A bidirectional scan over the channels: step c of the sequence is channel c, and what stands in parallel, as
    the channels do in a scan over tokens, is the tokens. In the paper's words it works on the transposed map::

        u_k = silu(conv_k(x W_in)^T), along the channels, forwards (k = 1) and backwards (k = 2)
        y   = (scan(u_1) + scan(u_2)) * silu((x W_z)^T),    output y^T W_out

    Read to the letter, the paper's linear layers map the tokens of one channel, so they fit one image size. Here no
    parameter depends on the number of tokens:

    * W_in, W_z (equations 12, 17) and W_out map channels: "CW-Linear" of table 8, which gives them the widths of
      the channels. W_z with its SiLU is the "MLP" of equation 17, as in Mamba, which the paper calls a special case.
    * The convolution's filter, A, D and the step bias are one for all tokens of a direction.
    * B and C (equations 13, 16) are linear in the channel averaged over a grid of ``summary_size`` x ``summary_size``
      cells, so they differ from channel to channel and image to image. Where the map itself has that size, which
      stage 4 has at 224 pixels, this is the paper's equation.
    * The step size is such a term plus a multiple of the token's own value, so that each token selects its channels.
    * B, C and the step size come from the convolved u, as in Mamba; the equations say from x.

    Args:
        dim: channels of the map.
        expand: length of the sequence as a multiple of ``dim``.
        d_state: states N a token.
        d_conv: width of the causal convolution along the channels.
        summary_size: cells of the averaged map in each direction.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        d_state: int = 16,
        d_conv: int = 4,
        summary_size: int = 7,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.inner, self.d_state, self.summary_size = int(expand * dim), d_state, summary_size
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False, **dd)
        # The axis of size 1 is that of the tokens.
        self.conv_weight = nn.Parameter(torch.empty(2, 1, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(2, 1, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(2, 1 + 2 * d_state, summary_size**2, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(2, 1, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(2, 1, **dd))
        self.A_log = nn.Parameter(torch.empty(2, 1, d_state, **dd))
        self.D = nn.Parameter(torch.empty(2, 1, **dd))
        self.out_proj = nn.Linear(self.inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.conv_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        # One number serves a direction: drawn as in Mamba, the bias would be an offset of the whole map, and the step
        # size any of a range that Mamba's channels share out. Hence 0, and the middle of the range.
        nn.init.zeros_(self.conv_bias)
        init_scan_parameters(
            self.x_proj_weight, self.dt_proj_weight.unsqueeze(-1), self.dt_proj_bias, self.A_log, self.D,
            dt_min=0.01, dt_max=0.01,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) -> the same shape."""
        height, width = x.shape[1], x.shape[2]
        tokens = height * width
        x = self.in_proj(x).flatten(1, 2)
        x, z = x.transpose(1, 2).contiguous().chunk(2, dim=1)
        paths = scan_paths(("raster", "reverse"), 1, self.inner, device=x.device)
        u = causal_conv1d(
            x,
            self.conv_weight.expand(-1, tokens, -1),
            self.conv_bias.expand(-1, tokens),
            activation="silu",
            paths=paths,
        )
        projected = torch.einsum("bckp,kop->bcko", self.summary(u, height, width), self.x_proj_weight)
        dt, B, C = projected.split((1, self.d_state, self.d_state), dim=-1)
        y = selective_scan(
            u,
            u * self.dt_proj_weight.to(u.dtype) + dt,
            state_matrix(self.A_log).expand(-1, tokens, -1),
            B,
            C,
            self.D.expand(-1, tokens),
            z,
            self.dt_proj_bias.expand(-1, tokens),
            delta_softplus=True,
            paths=paths,
            merge="sum",
        )
        assert isinstance(y, Tensor)
        return self.out_proj(y.transpose(1, 2)).unflatten(1, (height, width))

    def summary(self, u: Tensor, height: int, width: int) -> Tensor:
        """Means over the cells of a grid: (..., height * width) -> (..., summary_size**2).

        The cells are those of adaptive pooling; written as two products, because the gradient of torch's pooling
        is not deterministic on a GPU.
        """
        rows, columns = (
            F.adaptive_avg_pool1d(torch.eye(size, dtype=u.dtype, device=u.device), self.summary_size)
            for size in (height, width)
        )
        cells = u.unflatten(-1, (height, width)) @ columns
        return (cells.transpose(-1, -2) @ rows).transpose(-1, -2).flatten(-2)
