"""Samba: a Mamba backbone with four levels for the segmentation of remote-sensing images.

Zhu et al. 2024, "Samba: Semantic Segmentation of Remotely Sensed Images with State Space Model", arXiv
2404.01705. Official code: github zhuqinfeng1999/Samba (Apache-2.0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, trunc_normal_
from timm.models._features_fx import register_notrace_module
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import LayerNorm, MambaMixer, apply_linear, conv_norm, depthwise_conv
from ..layers.mamba import with_cast_linears
from ..paths import scan_paths
from ._builder import OFFICIAL_MIXER, build_model, find_backbone, with_batch_counters
from ._pyramid import PyramidModel, ResidualBlock, ResidualStage


class Stem(nn.Module):
    """Image -> normalised channels-last map at stride 4."""

    def __init__(self, in_chans: int, hidden: int, dim: int, **dd) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden, 7, stride=2, padding=3, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(hidden, **dd)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(hidden, **dd)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False, **dd)
        self.norm3 = nn.BatchNorm2d(hidden, **dd)
        self.proj = nn.Conv2d(hidden, dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm(dim, stream=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> (batch, ceil(height / 4), ceil(width / 4), dim)."""
        # From here on every map is channels-last in memory, and each permute is a view.
        x = F.relu(self.norm1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        return conv_norm(x, self.proj, self.norm)


class Downsample(nn.Module):
    """(batch, H, W, dim) -> normalised (batch, ceil(H / 2), ceil(W / 2), out_dim)."""

    def __init__(self, dim: int, out_dim: int, **dd) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm(out_dim, stream=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x.permute(0, 3, 1, 2), self.proj, self.norm)


class ConvMlp(nn.Module):
    """MLP with a depth-wise 3x3 convolution before its GELU (Wang et al. 2022, PVT v2, section 3.2)."""

    def __init__(self, dim: int, hidden: int, **dd) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(depthwise_conv(apply_linear(x, self.fc1), self.dwconv, "gelu"), self.fc2)

    def fuse(self) -> nn.Module:
        """For inference: :func:`timm.utils.reparameterize_model` has its weights cast once."""
        return with_cast_linears(self, "fc1", "fc2")


@register_notrace_module  # torch.fx takes it whole, as it does the class that it derives from
class SambaBlock(ResidualBlock):
    """``x + mixer(norm1(x))``, then ``x + mlp(norm2(x))``, on a channels-last map; the scan runs row by row."""

    def __init__(self, dim: int, *, d_state: int, mlp_ratio: float, drop_path: float, **dd) -> None:
        mixer = MambaMixer(dim, d_state=d_state, num_paths=1, **dd)
        super().__init__(dim, mixer, mlp_ratio=mlp_ratio, drop_path=drop_path, mlp_layer=ConvMlp, **dd)

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        paths = scan_paths(("raster",), height, width, device=x.device)
        return self.mixer(x.flatten(1, 2), paths).unflatten(1, (height, width))


class Samba(PyramidModel):
    """Samba backbone (Zhu et al. 2024, section III), as an ordinary timm model for images of any size.

    The four levels, ``features_only``, are normalised, and each is what the next stage starts from. The official
    code has no use for a classifier; ours is a linear layer on the mean of the last level.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: timm's pooling of the last map: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, ``""``.
        stem_dim: channels inside the stem (official ``stem_hidden_dim``).
        dims: channels a stage (official ``embed_dims``).
        depths: blocks a stage.
        mlp_ratios: hidden channels of the MLP as a multiple of the block's, a stage.
        d_state: states N a channel.
        drop_rate, drop_path_rate: dropout before the head, and stochastic depth (rising linearly to this rate).

    Raises:
        ValueError: ``dims``, ``depths`` and ``mlp_ratios`` of different lengths.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 32,
        dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        d_state: int = 64,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(mlp_ratios):
            raise ValueError(f"dims={dims}, depths={depths}, mlp_ratios={mlp_ratios}: give one number a stage in each")
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dims[-1]

        self.stem = Stem(in_chans, stem_dim, dims[0], **dd)
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        stages = []
        self.feature_info = []
        for i, (dim, depth, ratio) in enumerate(zip(dims, depths, mlp_ratios, strict=True)):
            start = sum(depths[:i])
            blocks: list[nn.Module] = [
                SambaBlock(dim, d_state=d_state, mlp_ratio=ratio, drop_path=rate, **dd)
                for rate in rates[start : start + depth]
            ]
            down = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(ResidualStage(down, blocks, LayerNorm(dim, stream=True, **dd)))
            self.feature_info.append(dict(module=f"stages.{i}", num_chs=dim, reduction=4 * 2**i))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.Identity()  # each level has its own
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        self.init_weights()

    def init_weights(self) -> None:
        """As the official code, but the mixers keep Mamba's own step sizes, which it overwrites."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names -> this model's; see :func:`checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


_OFFICIAL = re.compile(r"^(patch_embed|block|norm)(\d)\.(.*)")
#: Places in the stem's nn.Sequential, among its ReLUs.
_OFFICIAL_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3", "7": "norm3"}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Samba) -> dict[str, Tensor]:
    """Official state dict, or the backbone in a segmentor's (mmsegmentation), -> ours.

    Such files have no classifier: load them with ``features_only=True`` or ``num_classes=0``. Our own names pass
    unchanged.
    """
    state_dict = find_backbone(state_dict.get("state_dict", state_dict))  # type: ignore[arg-type]
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        match = _OFFICIAL.match(key)
        if match is None:
            out[key] = value
            continue
        kind, stage, name = match[1], int(match[2]) - 1, match[3]
        if kind == "patch_embed":
            if name.startswith("conv."):
                _, place, name = name.split(".", 2)
                name = f"{_OFFICIAL_STEM[place]}.{name}"
            out[f"stages.{stage}.downsample.{name}" if stage else f"stem.{name}"] = value
        elif kind == "norm":
            out[f"stages.{stage}.norm.{name}"] = value
        else:
            name = name.replace(".attn.norm.", ".norm1.").replace(".dwconv.dwconv.", ".dwconv.")
            block, is_mixer, parameter = name.partition(".attn.mamba.")
            if is_mixer:
                name = f"{block}.mixer.{OFFICIAL_MIXER.get(parameter, parameter)}"
                if parameter in OFFICIAL_MIXER:  # one path
                    value = (value.squeeze(1) if parameter == "conv1d.weight" else value).unsqueeze(0)
            out[f"stages.{stage}.blocks.{name}"] = value
    return with_batch_counters(out, model)


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
        "license": "apache-2.0",
        "paper_name": "Samba: Semantic Segmentation of Remotely Sensed Images with State Space Model",
        "paper_ids": "arXiv:2404.01705",
        "origin_url": "https://github.com/zhuqinfeng1999/Samba",
        "notes": (
            "For segmentation. No weights are published, and the repository shows its results as a picture. Without "
            "the classifier the model has 22.7 M parameters.",
        ),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "samba.untrained": _cfg(),
        "test_samba.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


def _create_samba(variant: str, pretrained: bool = False, **kwargs: Any) -> Samba:
    return build_model(Samba, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=(0, 1, 2, 3), **kwargs)


@register_model
def samba(pretrained: bool = False, **kwargs: Any) -> Samba:
    """Samba, the paper's backbone; 22.7 M parameters without the classifier."""
    return _create_samba("samba", pretrained, **kwargs)


@register_model
def test_samba(pretrained: bool = False, **kwargs: Any) -> Samba:
    """Tiny, for tests only."""
    args = dict(stem_dim=8, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), mlp_ratios=(4, 4, 2, 2))
    return _create_samba("test_samba", pretrained, **dict(args, **kwargs))
