"""MambaVision: convolutions in two stages, then Mamba mixers and window attention in two.

Hatamizadeh & Kautz 2024, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", arXiv 2407.08083. Official code
and weights: github NVlabs/MambaVision. Neither may be used commercially: the code is under the NVIDIA Source Code
License-NC, the weights under the same (their pages on the hub) or CC-BY-NC-SA-4.0 (the repository's README).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath
from timm.models._features_fx import register_notrace_function
from timm.models._registry import generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import MambaVisionMixer
from ..layers.observed import are_observed
from ._builder import build_model, find_backbone, with_batch_counters
from ._pyramid import PyramidModel, ResidualBlock, ResidualStage, Stage, init_linear, make_feature_norms


class Stem(nn.Module):
    """Image -> channels-last map at stride 4, by two convolutions."""

    def __init__(self, in_chans: int, hidden: int, dim: int, **dd) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden, 3, stride=2, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(hidden, eps=1e-4, **dd)
        self.conv2 = nn.Conv2d(hidden, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-4, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> (batch, ceil(height / 4), ceil(width / 4), dim)."""
        # From here on every map is channels-last in memory, and each permute is a view.
        x = F.relu(self.norm1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        return F.relu(self.norm2(self.conv2(x))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """(batch, H, W, dim) -> (batch, ceil(H / 2), ceil(W / 2), out_dim)."""

    def __init__(self, dim: int, out_dim: int, **dd) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """``x + norm2(conv2(gelu(norm1(conv1(x)))))`` on a channels-last map."""

    def __init__(self, dim: int, *, drop_path: float, **dd) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm1(self.conv1(x.permute(0, 3, 1, 2)))
        inside = self.norm2(self.conv2(F.gelu(inside, approximate="tanh")))
        return x + self.drop_path(inside.permute(0, 2, 3, 1))

    def fuse(self) -> nn.Module:
        """For inference: the norms, of fixed mean and variance then, are within the convolutions before them.

        :func:`timm.utils.reparameterize_model` calls this.
        """
        pairs = {"conv1": "norm1", "conv2": "norm2"}
        norms = [getattr(self, norm) for norm in pairs.values()]
        if not all(type(norm) is nn.BatchNorm2d for norm in norms) or are_observed(self.conv1, self.conv2, *norms):
            return self
        fused = copy.deepcopy(self).eval()
        for conv, norm in pairs.items():
            setattr(fused, conv, fuse_conv_bn_eval(getattr(fused, conv), getattr(fused, norm)))
            setattr(fused, norm, nn.Identity())
        return fused.train(self.training)


class BatchNormMap(nn.Module):
    """BatchNorm of a channels-last map."""

    def __init__(self, dim: int, **dd) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_function
def split_windows(x: Tensor, size: int) -> Tensor:
    """(batch, H, W, dim) -> (batch * windows, size * size, dim), zeros at the right and bottom completing windows."""
    height, width = x.shape[1], x.shape[2]
    if height % size or width % size:
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    rows, columns = x.shape[1] // size, x.shape[2] // size
    return x.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3).flatten(0, 2).flatten(1, 2)


@register_notrace_function
def join_windows(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse: (batch * windows, size * size, dim) -> (batch, height, width, dim)."""
    rows, columns = -(-height // size), -(-width // size)
    x = x.unflatten(1, (size, size)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]


class WindowStage(ResidualStage):
    """Blocks that see the tokens of one window each; the windows are cut once, before the first of them."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], window_size: int) -> None:
        super().__init__(downsample, blocks)
        self.window_size = window_size

    def run_blocks(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = super().run_blocks(split_windows(x, self.window_size))
        return join_windows(x, self.window_size, height, width)


class MambaVision(PyramidModel):
    """MambaVision (Hatamizadeh & Kautz 2024, section 3), as an ordinary timm model for images of any size.

    Stages 1 and 2 are convolutions. Stages 3 and 4 have Mamba mixers in their first half (the larger, where the
    depth is odd) and attention in the rest, both inside windows; the released classifiers' windows are the whole map.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: timm's pooling of the last map: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, ``""``.
        stem_dim: channels inside the stem (official ``in_dim``).
        embed_dim: channels of the first stage (official ``dim``), doubled in each further one.
        depths: blocks of the four stages.
        num_heads: attention heads in stages 3 and 4.
        window_size: side of the windows in stages 3 and 4, in tokens. No weight depends on it. Maps are filled up to
            whole windows with zeros, which take part as tokens: for images far from the model's own size give
            sides that fit, such as 1/16 and 1/32 of the image's.
        mlp_ratio: hidden channels of the MLP as a multiple of the block's.
        layer_scale: initial value of learned scales of what blocks of stages 3 and 4 add, or None for none.
        feature_norms: stages whose features have a norm of their own (official ``outnorm{i}`` of the
            detection and segmentation backbones).
        drop_rate, drop_path_rate: dropout before the head, and stochastic depth (rising linearly to this rate).

    Raises:
        ValueError: not four stages, or an unknown one; heads that do not divide the channels.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 64,
        embed_dim: int = 80,
        depths: Sequence[int] = (1, 3, 8, 4),
        num_heads: Sequence[int] = (8, 16),
        window_size: Sequence[int] = (14, 7),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        feature_norms: Sequence[int] = (),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not (len(depths) == 4 and len(num_heads) == len(window_size) == 2 and min(window_size) > 0):
            raise ValueError(
                f"depths={tuple(depths)}, num_heads={tuple(num_heads)}, window_size={tuple(window_size)}: give four "
                "depths, and for stages 3 and 4 two numbers of heads and two positive sides of windows"
            )
        dims = [embed_dim * 2**i for i in range(4)]
        for dim, heads in zip(dims[2:], num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"num_heads={tuple(num_heads)}: {heads} heads do not divide {dim} channels")
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.embed_dim = embed_dim
        self.num_features = dims[-1]

        self.stem = Stem(in_chans, stem_dim, embed_dim, **dd)
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        stages: list[nn.Module] = []
        self.feature_info = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            start = sum(depths[:i])
            down = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            blocks: list[nn.Module] = []
            for number, rate in enumerate(rates[start : start + depth]):
                if i < 2:
                    blocks.append(ConvBlock(dim, drop_path=rate, **dd))
                    continue
                mixer = (
                    MambaVisionMixer(dim, **dd)
                    if number < (depth + 1) // 2
                    else Attention(dim, num_heads[i - 2], qkv_bias=True, **dd)
                )
                blocks.append(
                    ResidualBlock(dim, mixer, mlp_ratio=mlp_ratio, drop_path=rate, layer_scale=layer_scale, **dd)
                )
            stages.append(Stage(down, blocks) if i < 2 else WindowStage(down, blocks, window_size[i - 2]))
            self.feature_info.append(dict(module=f"stages.{i}", num_chs=dim, reduction=4 * 2**i))
        self.stages = nn.ModuleList(stages)
        self.feature_norms = make_feature_norms(feature_norms, dims, **dd)
        self.norm = BatchNormMap(dims[-1], **dd)
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        # As the official code, the mixers' projections to the step sizes included: those begin at softplus(0).
        init_linear(self)

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names -> this model's; see :func:`checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


# The official stem's layers stand at numbered places of an nn.Sequential. A downsampling is the end of its stage
# there, here the beginning of the next.
_RENAMED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^patch_embed\.conv_down\.0\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.1\.", "stem.norm1."),
    (r"^patch_embed\.conv_down\.3\.", "stem.conv2."),
    (r"^patch_embed\.conv_down\.4\.", "stem.norm2."),
    (r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.conv."),
    (r"^levels\.(\d+)\.blocks\.(\d+)\.gamma_([12])$", r"stages.\1.blocks.\2.scale\3.gamma"),
    (r"^levels\.", "stages."),
    (r"^outnorm(\d+)\.", r"feature_norms.\1."),
    (r"^norm\.(?!bn\.)", "norm.bn."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MambaVision) -> dict[str, Tensor]:
    """Official state dict -> ours.

    Takes the classification files (``.pth.tar``, and the hub's ``model.safetensors``, whose names begin with
    ``model.``) and the backbone in detection and segmentation files; its norms ``outnorm{i}`` are those of a model
    with ``feature_norms``. Our own names pass unchanged.
    """
    state_dict = find_backbone(state_dict.get("state_dict", state_dict))  # type: ignore[arg-type]
    out: dict[str, Tensor] = {}
    for key in sorted(state_dict):
        value = state_dict[key]
        key = key.removeprefix("model.")
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        block, half, name = key.partition(".mixer.conv1d_")
        if half:  # conv1d_x, then conv1d_z: the convolutions of the two halves are one
            key, value = f"{block}.mixer.conv.{name.partition('.')[2]}", value.unsqueeze(2)
            value = torch.cat((out[key], value)) if key in out else value
        out[key] = value
    return with_batch_counters(out, model)


def _cfg(hub: str = "", published: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        **(dict(hf_hub_id=f"nvidia/MambaVision-{hub}", hf_hub_filename="model.safetensors") if hub else {}),
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "nvclv1",
        "paper_name": "MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
        "paper_ids": "arXiv:2407.08083",
        "origin_url": "https://github.com/NVlabs/MambaVision",
        "description": f"ImageNet-1K top-1 / top-5 / GFLOPs {published} (README)" if published else None,
        **kwargs,
    }


_512 = dict(input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=0.93, crop_mode="squash")

default_cfgs = generate_default_cfgs(
    {
        "mambavision_tiny.nvidia_in1k": _cfg("T-1K", "82.3 / 96.2 / 4.4"),
        "mambavision_tiny2.nvidia_in1k": _cfg("T2-1K", "82.7 / 96.3 / 5.1", crop_pct=0.98),
        "mambavision_small.nvidia_in1k": _cfg("S-1K", "83.3 / 96.5 / 7.5", crop_pct=0.93),
        "mambavision_base.nvidia_in1k": _cfg("B-1K", "84.2 / 96.9 / 15.0"),
        "mambavision_base.nvidia_in21k_ft_in1k": _cfg("B-21K", "84.9 / 97.5 / 15.0"),
        "mambavision_large.nvidia_in1k": _cfg("L-1K", "85.0 / 97.1 / 34.9"),
        "mambavision_large.nvidia_in21k_ft_in1k": _cfg("L-21K", "86.1 / 97.9 / 34.9"),
        "mambavision_large2.nvidia_in1k": _cfg("L2-1K", "85.3 / 97.2 / 37.5"),
        "mambavision_large2_512.nvidia_in21k_ft_in1k": _cfg("L2-512-21K", "87.3 / 98.4 / 196.3", **_512),
        "mambavision_large3_256.nvidia_in21k_ft_in1k": _cfg(
            "L3-256-21K", "87.3 / 98.3 / 122.3", input_size=(3, 256, 256), pool_size=(8, 8)
        ),
        "mambavision_large3_512.nvidia_in21k_ft_in1k": _cfg("L3-512-21K", "88.1 / 98.6 / 489.1", **_512),
        "mambavision_nano.untrained": _cfg(
            input_size=(3, 64, 64), pool_size=(2, 2), num_classes=10, description="ours, for trials on a CPU"
        ),
        "test_mambavision.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)

_TINY = dict(stem_dim=32)
_BASE = dict(embed_dim=128, depths=(3, 3, 10, 5), layer_scale=1e-5)
_LARGE = dict(embed_dim=196, depths=(3, 3, 10, 5), num_heads=(16, 32), layer_scale=1e-5)
_LARGE2 = dict(_LARGE, depths=(3, 3, 12, 5))
_LARGE3 = dict(_LARGE, embed_dim=256, depths=(3, 3, 20, 10))


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaVision:
    return build_model(MambaVision, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=(0, 1, 2, 3), **kwargs)


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T, 32 M parameters."""
    return _create_mambavision("mambavision_tiny", pretrained, **dict(_TINY, **kwargs))


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2, 35 M parameters."""
    return _create_mambavision("mambavision_tiny2", pretrained, **dict(dict(_TINY, depths=(1, 3, 11, 4)), **kwargs))


@register_model
def mambavision_small(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S, 50 M parameters."""
    args = dict(embed_dim=96, depths=(3, 3, 7, 5))
    return _create_mambavision("mambavision_small", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_base(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B, 98 M parameters."""
    return _create_mambavision("mambavision_base", pretrained, **dict(_BASE, **kwargs))


@register_model
def mambavision_large(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L, 228 M parameters."""
    return _create_mambavision("mambavision_large", pretrained, **dict(_LARGE, **kwargs))


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2, 242 M parameters."""
    return _create_mambavision("mambavision_large2", pretrained, **dict(_LARGE2, **kwargs))


@register_model
def mambavision_large2_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2 for images of 512 pixels."""
    args = dict(_LARGE2, window_size=(32, 16))
    return _create_mambavision("mambavision_large2_512", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_large3_256(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 for images of 256 pixels, 740 M parameters."""
    args = dict(_LARGE3, window_size=(16, 8))
    return _create_mambavision("mambavision_large3_256", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_large3_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 for images of 512 pixels, 740 M parameters."""
    args = dict(_LARGE3, window_size=(32, 16))
    return _create_mambavision("mambavision_large3_512", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_nano(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """A small MambaVision for trials on a CPU. Ours, not the paper's."""
    args = dict(num_classes=10, stem_dim=16, embed_dim=24, depths=(1, 1, 3, 2), num_heads=(4, 8), window_size=(4, 2))
    return _create_mambavision("mambavision_nano", pretrained, **dict(args, **kwargs))


@register_model
def test_mambavision(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Tiny, for tests only."""
    args = dict(stem_dim=8, embed_dim=16, depths=(1, 1, 3, 2), num_heads=(2, 4), window_size=(4, 2))
    return _create_mambavision("test_mambavision", pretrained, **dict(args, **kwargs))
