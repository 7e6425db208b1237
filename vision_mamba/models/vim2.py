"""ViM2: a hierarchical backbone that selects tokens and channels in turn, each mixer reading all earlier ones.

Behrouz, Santacatterina, Zabih 2024, "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel
Selection", arXiv 2403.19888, version 1 (later versions describe other models). The authors released neither code nor
weights, so nothing here could be compared with theirs. What the paper leaves open, and what was decided:

* Blocks (section 3.2, table 8). The equations have one token mixer to one channel mixer, the table two to one. A block
  here is two token mixers in a row and a channel mixer, and the equations count blocks.
* Token mixer (equations 6 to 11, section 4.1). VMamba's first block, which is the VMamba of the paper's tables: the
  paper says that ViM2 becomes VMamba without its channel mixers. So the gate (the "MLP" of equation 7) is a linear
  layer with a SiLU, B, C and the step size come from the convolved tokens (equations 8 to 10 say x), there are 16
  states and a norm after the scan, and stem and downsampling are VMamba's too. The four directions are also
  VMamba's, as its code has them.
* Channel mixer (equations 12 to 18): see :class:`vision_mamba.layers.ChannelMixer`, whose parameters do not depend on
  the image's size. Forwards and backwards, as the equations say; section 4.1 says "the same scans as the token mixer"
  instead, but channels have no columns: over one row of D channels the four directions are these two, twice.
* Residuals and norms. None is in the equations. With equation 19's weights of VMamba (alpha of the last output 1, all
  others 0) the model is VMamba only if a mixer's output is ``x + mixer(norm(x))``; so it is, in the channel mixers too.
* Weights of the average (equations 19, 20). Plain scalars, not normalised, since the paper sets them to 0 and 1. They
  start as a chain, each mixer reading the one before (beta and theta of the last output 1, all others 0), as in
  DenseFormer (Pagliardini et al. 2024), which the paper follows. Started as VMamba, no channel mixer but the last of
  a stage would learn in the first step.
* A stage's output is that of its last channel mixer; the averages have no weights for another (the paper counts
  L (2 L + 3) of them for L blocks, and there are as many here), and stages do not read each other (section 4.1).
* Stochastic depth, clipping, averaged weights and augmentation, which the paper does not name, are VMamba's.

Parameters: 24.0, 43.7 and 75.6 M; table 2 says 20, 43 and 74. Table 8's channel widths read as the lengths of the
channel sequences give the last two within 2 percent, which is what speaks for that reading. No model of one table can
have all three: small has 12 token mixers and 6 channel mixers in stage 3 more than tiny, and 23 M parameters more,
so 1.5 M a channel mixer; tiny's token mixers and the rest are 19.3 M, which leaves 0.7 M for its six.

The variant "ViM2-MLP" of table 2 is not offered: its MLPs are not described.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models._features_fx import register_notrace_module
from timm.models._registry import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..layers import SS2D, ChannelMixer
from ..paths import SS2D as SS2D_PATHS
from ._builder import build_model, find_backbone
from ._pyramid import PyramidModel, ResidualBlock, Stage, init_linear
from .vmamba import Stem


def weighted_sum(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Sum of ``weights[i] * outputs[i]`` over maps of one shape."""
    total = weights[0] * outputs[0]
    for weight, output in zip(weights[1:].unbind(), outputs[1:], strict=True):
        total = torch.addcmul(total, output, weight)
    return total


@register_notrace_module  # torch.fx takes it whole: it looks at sizes, which have no values while it traces
class ViM2Block(nn.Module):
    """Token mixers in a row, then a channel mixer; each of the two parts reads a weighted sum of all earlier outputs.

    Args:
        dim: channels of the map.
        num_earlier: blocks of the stage before this one.
        drop_path: rates of stochastic depth, one a token mixer and the last for the channel mixer.
        mixer_args, channel_args: of :class:`SS2D` and :class:`ChannelMixer`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_earlier: int,
        drop_path: Sequence[float],
        mixer_args: dict[str, Any],
        channel_args: dict[str, Any],
        **dd,
    ) -> None:
        super().__init__()
        # The names of equations 19 and 20; the stage's input is output 0 of both kinds.
        outputs = num_earlier + 1
        self.alpha = nn.Parameter(torch.zeros(outputs, **dd))
        self.beta = nn.Parameter(torch.zeros(outputs, **dd))
        self.theta = nn.Parameter(torch.zeros(outputs + 1, **dd))
        self.gamma = nn.Parameter(torch.zeros(outputs, **dd))
        with torch.no_grad():
            self.beta[-1] = 1
            self.theta[-1] = 1
        self.token_mixers = nn.ModuleList(
            ResidualBlock(dim, SS2D(dim, **mixer_args, **dd), mlp_ratio=0.0, drop_path=rate, **dd)
            for rate in drop_path[:-1]
        )
        self.channel_mixer = ResidualBlock(
            dim, ChannelMixer(dim, **channel_args, **dd), mlp_ratio=0.0, drop_path=drop_path[-1], **dd
        )

    def forward(self, tokens: tuple[Tensor, ...], channels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Outputs of all earlier token mixers and channel mixers, maps (batch, H, W, dim) -> this block's two."""
        x = weighted_sum(self.alpha, tokens) + weighted_sum(self.beta, channels)
        first, *others = self.token_mixers
        x, pending = first(x)
        for mixer in others:
            x, pending = mixer(x, pending)
        token = x + pending
        x = weighted_sum(self.theta, (*tokens, token)) + weighted_sum(self.gamma, channels)
        x, pending = self.channel_mixer(x)
        return token, x + pending


class ViM2Stage(Stage):
    """Blocks that each read the outputs of all earlier ones of the stage."""

    def run_blocks(self, x: Tensor) -> Tensor:
        tokens: tuple[Tensor, ...] = (x,)
        channels = tokens
        for block in self.blocks:
            # New tuples: a checkpointed block must find in the backward pass what it was given.
            token, channel = self.run_block(block, tokens, channels)
            tokens, channels = (*tokens, token), (*channels, channel)
        return channels[-1]


class ViM2(PyramidModel):
    """ViM2 (Behrouz et al. 2024, sections 3.2 and 4.1, table 8), as an ordinary timm model for images of any size.

    Maps have ``floor(size / 4)`` rows and columns, and half of that, rounded up, in each further stage.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: timm's pooling of the last map: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, ``""``.
        embed_dim: channels of the first stage, doubled in each further one.
        depths: blocks a stage.
        token_mixers: token mixers a block.
        d_state: states N of the scans in token and channel mixers.
        d_conv, expand, dt_rank, paths: of the token mixers, :class:`vision_mamba.layers.SS2D`.
        channel_expand: ``expand`` of the channel mixers a stage (:class:`vision_mamba.layers.ChannelMixer`).
        channel_conv, summary_size: their ``d_conv`` and ``summary_size``.
        drop_rate, drop_path_rate: dropout before the head, and stochastic depth (rising linearly to this rate).

    Raises:
        ValueError: ``depths`` and ``channel_expand`` of different lengths; no token mixer.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 1, 3, 1),
        token_mixers: int = 2,
        d_state: int = 16,
        d_conv: int = 3,
        expand: float = 2.0,
        dt_rank: int | None = None,
        paths: Sequence[str] = SS2D_PATHS,
        channel_expand: Sequence[float] = (2.0, 2.0, 2.0, 1.0),
        channel_conv: int = 4,
        summary_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if len(depths) != len(channel_expand):
            raise ValueError(f"depths={depths}, channel_expand={channel_expand}: give one number a stage in each")
        if token_mixers < 1:
            raise ValueError(f"token_mixers={token_mixers}: a block has one or more")
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = dims[-1]

        self.stem = Stem(in_chans, embed_dim, overlap=False, **dd)
        mixer_args = dict(
            d_state=d_state, d_conv=d_conv, conv_bias=True, expand=expand, dt_rank=dt_rank, gate=True, paths=paths
        )
        mixers = sum(depths) * (token_mixers + 1)
        rates = iter([drop_path_rate * i / max(mixers - 1, 1) for i in range(mixers)])
        stages = []
        self.feature_info = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            channel_args = dict(
                expand=channel_expand[i], d_state=d_state, d_conv=channel_conv, summary_size=summary_size
            )
            blocks: list[nn.Module] = [
                ViM2Block(
                    dim,
                    num_earlier=j,
                    drop_path=[next(rates) for _ in range(token_mixers + 1)],
                    mixer_args=mixer_args,
                    channel_args=channel_args,
                    **dd,
                )
                for j in range(depth)
            ]
            down = PatchMerging(dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(ViM2Stage(down, blocks))
            self.feature_info.append(dict(module=f"stages.{i}", num_chs=dim, reduction=4 * 2**i))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dims[-1], **dd)
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        init_linear(self)

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The backbone of a detector or segmentor, or our own names; see :func:`checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: ViM2) -> dict[str, Tensor]:
    """There are no official files: our own names, alone or as ``backbone.*`` in a file of the mm-series."""
    return find_backbone(state_dict)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "paper_name": "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
        "paper_ids": "arXiv:2403.19888",
        "notes": ("After version 1 of the paper. Neither code nor weights are published.",),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim2_tiny.untrained": _cfg(description="ImageNet-1K top-1 82.7, 20 M parameters (paper, v1)"),
        "vim2_small.untrained": _cfg(description="ImageNet-1K top-1 83.7, 43 M parameters (paper, v1)"),
        "vim2_base.untrained": _cfg(description="ImageNet-1K top-1 83.9, 74 M parameters (paper, v1)"),
        "vim2_nano.untrained": _cfg(
            input_size=(3, 64, 64),
            pool_size=(2, 2),
            num_classes=10,
            crop_pct=1.0,
            description="ours, for trials on a CPU",
        ),
        "test_vim2.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


def _create_vim2(variant: str, pretrained: bool = False, **kwargs: Any) -> ViM2:
    return build_model(ViM2, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=(0, 1, 2, 3), **kwargs)


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-T of table 8; 24 M parameters (the paper says 20)."""
    return _create_vim2("vim2_tiny", pretrained, **kwargs)


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-S of table 8; 44 M parameters (the paper says 43)."""
    return _create_vim2("vim2_small", pretrained, **dict(dict(depths=(1, 1, 9, 1)), **kwargs))


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-B of table 8; 76 M parameters (the paper says 74)."""
    return _create_vim2("vim2_base", pretrained, **dict(dict(embed_dim=128, depths=(1, 1, 9, 1)), **kwargs))


@register_model
def vim2_nano(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """A small ViM2 for trials on a CPU. Ours, not the paper's."""
    args = dict(num_classes=10, embed_dim=32, depths=(1, 1, 2, 1), token_mixers=1, summary_size=4)
    return _create_vim2("vim2_nano", pretrained, **dict(args, **kwargs))


@register_model
def test_vim2(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """Tiny, for tests only."""
    args = dict(embed_dim=16, depths=(1, 1, 2, 1), token_mixers=1, d_state=4, summary_size=3)
    return _create_vim2("test_vim2", pretrained, **dict(args, **kwargs))
