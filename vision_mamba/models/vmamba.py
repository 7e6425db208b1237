"""VMamba: a hierarchical backbone whose token mixer is SS2D, the 2D selective scan.

Liu et al. 2024, "VMamba: Visual State Space Model", arXiv 2401.10166. Official code and weights: github
MzeroMiko/VMamba (MIT). A name such as ``s1l8`` gives the mixer's expansion and the depth of stage 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models._features_fx import register_notrace_module
from timm.models._registry import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import SS2D, LayerNorm, conv_norm
from ..paths import SS2D as SS2D_PATHS
from ..paths import expand_paths
from ._builder import build_model, check_choice, find_backbone
from ._pyramid import PyramidModel, ResidualBlock, ResidualStage, init_linear, make_feature_norms

StemType = Literal["overlap", "patch"]
Downsample = Literal["conv3", "conv2", "merging"]


class Stem(nn.Module):
    """Image -> channels-last map at stride 4: two overlapping 3x3 convolutions, or one of 4x4 patches."""

    def __init__(self, in_chans: int, dim: int, *, overlap: bool, **dd) -> None:
        super().__init__()
        if overlap:
            self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
            self.norm1 = LayerNorm(dim // 2, **dd)
            self.conv2: nn.Module | None = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
            self.norm2 = LayerNorm(dim, stream=True, **dd)
        else:
            self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
            self.norm1 = LayerNorm(dim, stream=True, **dd)
            self.conv2 = None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> (batch, height / 4, width / 4, dim)."""
        # From here on every map is channels-last in memory, and each permute is a view.
        x = conv_norm(x.contiguous(memory_format=torch.channels_last), self.conv1, self.norm1)
        if self.conv2 is None:
            return x
        return conv_norm(F.gelu(x).permute(0, 3, 1, 2), self.conv2, self.norm2)


class ConvDownsample(nn.Module):
    """Strided convolution and norm: (batch, H, W, dim) -> (batch, H / 2, W / 2, out_dim)."""

    def __init__(self, dim: int, out_dim: int, *, kernel_size: int, **dd) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride=2, padding=(kernel_size - 1) // 2, **dd)
        self.norm = LayerNorm(out_dim, stream=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x.permute(0, 3, 1, 2), self.conv, self.norm)


@register_notrace_module  # torch.fx takes it whole, as it does the class that it derives from
class VSSBlock(ResidualBlock):
    """Residual block of :class:`vision_mamba.layers.SS2D`, whose further arguments are ``mixer_args``."""

    def __init__(self, dim: int, *, mlp_ratio: float, drop_path: float, mixer_args: dict[str, Any], **dd) -> None:
        super().__init__(dim, SS2D(dim, **mixer_args, **dd), mlp_ratio=mlp_ratio, drop_path=drop_path, **dd)


class VMamba(PyramidModel):
    """VMamba (Liu et al. 2024, section 4), as an ordinary timm model for images of any size.

    Maps have ``ceil(size / 4)`` rows and columns after the overlapping stem (the patch stem leaves out
    what does not fill a patch, as the official one does), and half of that, rounded up, in each further stage.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: timm's pooling of the last map: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, ``""``.
        embed_dim: channels of the first stage, doubled in each further one.
        depths: blocks a stage.
        d_state, d_conv, conv_bias, expand, dt_rank, gate, paths: of :class:`vision_mamba.layers.SS2D`.
        mlp_ratio: hidden channels of the MLP as a multiple of the block's; 0 for no MLP.
        stem: ``"overlap"`` (official ``patchembed_version`` v2) or ``"patch"`` (v1).
        downsample: ``"conv3"``, a 3x3 convolution (official ``downsample_version`` v3), ``"conv2"``, 2x2 (v2), or
            ``"merging"``, Swin's patch merging (v1).
        feature_norms: stages whose features have a norm of their own (official ``outnorm{i}`` of the
            detection and segmentation backbones).
        drop_rate, drop_path_rate: dropout before the head, and stochastic depth (rising linearly to this rate).

    Raises:
        ValueError: an unknown ``stem``, ``downsample`` or stage.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        d_state: int = 1,
        d_conv: int = 3,
        conv_bias: bool = False,
        expand: float = 1.0,
        dt_rank: int | None = None,
        gate: bool = False,
        paths: str | Sequence[str] = SS2D_PATHS,
        mlp_ratio: float = 4.0,
        stem: StemType = "overlap",
        downsample: Downsample = "conv3",
        feature_norms: Sequence[int] = (),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("stem", stem, ("overlap", "patch"))
        check_choice("downsample", downsample, ("conv3", "conv2", "merging"))
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.embed_dim = embed_dim
        self.num_paths = len(expand_paths(paths, 4))
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = dims[-1]

        self.stem = Stem(in_chans, embed_dim, overlap=stem == "overlap", **dd)
        mixer_args = dict(
            d_state=d_state,
            d_conv=d_conv,
            conv_bias=conv_bias,
            expand=expand,
            dt_rank=dt_rank,
            gate=gate,
            paths=paths,
        )
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        stages = []
        self.feature_info = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            down: nn.Module = nn.Identity()
            if i and downsample == "merging":
                down = PatchMerging(dims[i - 1], dim, **dd)
            elif i:
                down = ConvDownsample(dims[i - 1], dim, kernel_size=3 if downsample == "conv3" else 2, **dd)
            start = sum(depths[:i])
            blocks: list[nn.Module] = [
                VSSBlock(dim, mlp_ratio=mlp_ratio, drop_path=rate, mixer_args=mixer_args, **dd)
                for rate in rates[start : start + depth]
            ]
            stages.append(ResidualStage(down, blocks))
            self.feature_info.append(dict(module=f"stages.{i}", num_chs=dim, reduction=4 * 2**i))
        self.stages = nn.ModuleList(stages)
        self.feature_norms = make_feature_norms(feature_norms, dims, **dd)
        self.norm = nn.LayerNorm(dims[-1], **dd)
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        init_linear(self)

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names -> this model's; see :func:`checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


# The official convolutions and norms stand at numbered places of an nn.Sequential; the second names are those
# of the first releases. A downsampling is the end of its stage there, here the beginning of the next.
_RENAMED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^patch_embed\.(0|proj)\.", "stem.conv1."),
    (r"^patch_embed\.(2|norm)\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^layers\.(\d+)\.downsample\.1\.", r"layers.\1.downsample.conv."),
    (r"^layers\.(\d+)\.downsample\.3\.", r"layers.\1.downsample.norm."),
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.(norm|ln_1)\.", r"stages.\1.blocks.\2.norm1."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.(op|self_attention)\.", r"stages.\1.blocks.\2.mixer."),
    (r"^layers\.", "stages."),
    (r"^outnorm(\d+)\.", r"feature_norms.\1."),
    (r"^classifier\.norm\.", "norm."),
    (r"^(classifier\.)?head\.(weight|bias)$", r"head.fc.\2"),
]
#: Official name of a parameter of all paths -> ours, and its number of axes.
_SCAN_PARAMETERS = {
    "x_proj_weight": ("x_proj_weight", 3),
    "x_proj.weight": ("x_proj_weight", 3),
    "dt_projs_weight": ("dt_proj_weight", 3),
    "dt_projs.weight": ("dt_proj_weight", 3),
    "dt_projs_bias": ("dt_proj_bias", 2),
    "dt_projs.bias": ("dt_proj_bias", 2),
    "A_logs": ("A_log", 3),
    "Ds": ("D", 2),
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VMamba) -> dict[str, Tensor]:
    """Official state dict -> ours.

    Takes the classification files of every release (old and new names, linear layers stored as 1x1
    convolutions) and the backbone in detection and segmentation files; its norms ``outnorm{i}`` are those
    of a model with ``feature_norms``. Our own names pass unchanged.
    """
    state_dict = find_backbone(state_dict.get("model", state_dict))  # type: ignore[arg-type]
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        block, _, name = key.partition(".mixer.")
        if name in _SCAN_PARAMETERS:
            name, axes = _SCAN_PARAMETERS[name]
            key = f"{block}.mixer.{name}"
            if value.ndim != axes or value.shape[0] != model.num_paths:  # the paths' rows stand in one axis
                value = value.reshape(model.num_paths, -1, *value.shape[1 : axes - 1])
        elif value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        out[key] = value
    return out


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"


def _cfg(file: str = "", top1: str = "", flops: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"{_RELEASES}/{file}" if file else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        "paper_name": "VMamba: Visual State Space Model",
        "paper_ids": "arXiv:2401.10166",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        "description": f"ImageNet-1K top-1 {top1}; {flops} GFLOPs (assets/performance.md)" if top1 else None,
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8.mzeromiko_in1k": _cfg("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", "82.6", "4.9"),
        "vmamba_tiny_s2l5.mzeromiko_in1k": _cfg("%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", "82.5", "4.9"),
        "vmamba_small_s1l20.mzeromiko_in1k": _cfg("%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", "83.3", "8.6"),
        "vmamba_small_s2l15.mzeromiko_in1k": _cfg("%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", "83.6", "8.7"),
        "vmamba_base_s1l20.mzeromiko_in1k": _cfg("%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", "83.8", "15.2"),
        "vmamba_base_s2l15.mzeromiko_in1k": _cfg("%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", "83.9", "15.4"),
        "vmamba_tiny_v0.mzeromiko_in1k": _cfg("%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", "82.2", "5.6"),
        "vmamba_small_v0.mzeromiko_in1k": _cfg("%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", "83.5", "11.2"),
        "vmamba_base_v0.mzeromiko_in1k": _cfg("%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", "83.7", "18.0"),
        "vmamba_nano.untrained": _cfg(
            input_size=(3, 64, 64),
            pool_size=(2, 2),
            num_classes=10,
            crop_pct=1.0,
            description="ours, for trials on a CPU",
        ),
        "test_vmamba.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)

#: The first version: one MLP-free block with a gate, 16 states and a convolution with bias.
_V0 = dict(d_state=16, expand=2.0, gate=True, conv_bias=True, mlp_ratio=0.0, stem="patch", downsample="merging")


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_model(VMamba, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=(0, 1, 2, 3), **kwargs)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, 30 M parameters: the paper's."""
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **dict(dict(depths=(2, 2, 8, 2)), **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T with twice the inner channels and fewer blocks, 31 M parameters."""
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **dict(dict(depths=(2, 2, 5, 2), expand=2.0), **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S with more blocks and fewer inner channels, 49 M parameters."""
    return _create_vmamba("vmamba_small_s1l20", pretrained, **dict(dict(depths=(2, 2, 20, 2)), **kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, 50 M parameters: the paper's."""
    return _create_vmamba("vmamba_small_s2l15", pretrained, **dict(dict(depths=(2, 2, 15, 2), expand=2.0), **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B with more blocks and fewer inner channels, 87 M parameters."""
    args = dict(embed_dim=128, depths=(2, 2, 20, 2))
    return _create_vmamba("vmamba_base_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, 89 M parameters: the paper's."""
    args = dict(embed_dim=128, depths=(2, 2, 15, 2), expand=2.0)
    return _create_vmamba("vmamba_base_s2l15", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first version of VMamba-T, 23 M parameters."""
    return _create_vmamba("vmamba_tiny_v0", pretrained, **dict(dict(_V0, depths=(2, 2, 9, 2)), **kwargs))


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first version of VMamba-S, 44 M parameters."""
    return _create_vmamba("vmamba_small_v0", pretrained, **dict(dict(_V0, depths=(2, 2, 27, 2)), **kwargs))


@register_model
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first version of VMamba-B, 76 M parameters."""
    args = dict(_V0, embed_dim=128, depths=(2, 2, 27, 2))
    return _create_vmamba("vmamba_base_v0", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A small VMamba for trials on a CPU. Ours, not the paper's."""
    args = dict(num_classes=10, embed_dim=32, depths=(1, 1, 3, 1))
    return _create_vmamba("vmamba_nano", pretrained, **dict(args, **kwargs))


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Tiny, for tests only."""
    return _create_vmamba("test_vmamba", pretrained, **dict(dict(embed_dim=16, depths=(1, 1, 2, 1)), **kwargs))
