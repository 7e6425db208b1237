"""The official RSMamba, from a checkout of github.com/KyanChen/RSMamba, to measure and to compare with.

Nothing of it is copied here: its module is imported from the checkout as it is, with transformers' MambaMixer
(``use_mambapy=True``, as it sets; needs transformers and mambapy). What it imports of mmpretrain, mmengine and mmcv is
replaced by the few lines that it uses of them. Without mamba_ssm's kernels the mixer runs in PyTorch.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vision_mamba.paths import fixed_random_paths

_FILE = Path("mmpretrain", "rsmamba", "models", "models.py")


class _PatchEmbed(nn.Module):
    """mmcv's: a convolution whose last patches are completed with zeros at the bottom and right."""

    def __init__(self, in_channels, input_size, embed_dims, conv_type, kernel_size, stride, bias):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size, stride, bias=bias)
        self.kernel, self.stride = kernel_size, stride
        self.init_out_size = tuple(math.ceil(side / stride) for side in to_2tuple(input_size))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        sides = x.shape[-2:]
        missing = [max((math.ceil(s / self.stride) - 1) * self.stride + self.kernel - s, 0) for s in sides]
        x = self.projection(F.pad(x, (0, missing[1], 0, missing[0])))
        return x.flatten(2).transpose(1, 2), tuple(x.shape[-2:])


class _Backbone(nn.Module):
    def __init__(self, init_cfg=None):
        super().__init__()


class _Registry:
    def register_module(self):
        return lambda cls: cls


def load(checkout: Path) -> type[nn.Module]:
    """The official backbone class."""
    if not (checkout / _FILE).is_file():
        raise SystemExit(f"{checkout} is no checkout of KyanChen/RSMamba: it has no {_FILE}")
    try:
        import mambapy  # noqa: F401
        from transformers import MambaConfig
    except ImportError as error:
        raise SystemExit(f"the official RSMamba needs transformers and mambapy: {error}") from None

    contents = {
        "mmengine": {"Config": lambda arguments: MambaConfig(**arguments)},
        "mmengine.model": {"ModuleList": nn.ModuleList},
        "mmengine.model.weight_init": {"trunc_normal_": trunc_normal_},
        "mmcv": {},
        "mmcv.cnn": {},
        "mmcv.cnn.bricks": {},
        "mmcv.cnn.bricks.transformer": {"PatchEmbed": _PatchEmbed},
        "mmpretrain": {},
        "mmpretrain.models": {"build_2d_sincos_position_embedding": None},
        "mmpretrain.models.backbones": {},
        "mmpretrain.models.backbones.base_backbone": {"BaseBackbone": _Backbone},
        "mmpretrain.models.utils": {
            "build_norm_layer": lambda norm, channels: nn.LayerNorm(channels, eps=norm["eps"]),
            "resize_pos_embed": None,
            "to_2tuple": to_2tuple,
        },
        "mmpretrain.registry": {"MODELS": _Registry()},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name], __path__=[])
    spec = importlib.util.spec_from_file_location("official_rsmamba_models", checkout / _FILE)
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules):
        spec.loader.exec_module(official)
    return official.RSMamba


class Official(nn.Module):
    """The official backbone and a linear head, images to logits, with the names of its checkpoints.

    It draws its random paths in evaluation too; there it gets those that our model has, so that scores compare.
    """

    def __init__(self, backbone: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleDict({"fc": nn.Linear(channels, num_classes)})

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            (features,) = self.backbone(x)
            return self.head["fc"](features)
        depth, length = len(self.backbone.layers), self.backbone.pos_embed.shape[1]
        tables = iter(fixed_random_paths(depth, length, seed=0, device="cpu").long())
        with mock.patch.object(torch, "randperm", lambda _: next(tables)):
            (features,) = self.backbone(x)
        return self.head["fc"](features)


def rsmamba(checkout: Path, arch: str | dict, size: int, num_classes: int) -> Official:
    """As released, patches of 16 every 8 pixels; ``arch`` is a name or sizes, as the official class takes them."""
    backbone = load(checkout)(arch=arch, img_size=size, patch_cfg={"stride": 8})
    return Official(backbone, backbone.embed_dims, num_classes)


def rsmamba_base(checkout: Path, size: int) -> Official:
    """RSMamba-B with the head of 1,000 classes that timm models have by default."""
    return rsmamba(checkout, "b", size, 1000)
