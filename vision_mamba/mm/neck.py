"""A feature pyramid from the one map of a plain backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

# detectron2's norm of that kind, under the name that mmpretrain and mmdet's ViTDet project give it.
MODELS.register_module("LN2d", module=LayerNorm2d, force=True)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps of several strides from the last map of a plain backbone (Li et al. 2022, arXiv 2203.16527, section 3).

    Each scale has its own branch on the same map: deconvolutions of stride 2 for 2 and 4, nothing for 1, max pooling
    for 1/2; then a 1x1 and a 3x3 convolution, each with a norm. Further levels are the last one, sub-sampled.

    Args:
        in_channels: channels of the backbone's map.
        out_channels: channels of every level.
        scale_factors: of the levels, finest first: 4, 2, 1 or 0.5 times the map's resolution.
        num_outs: levels in all.
        norm_cfg: norm of the branches; None for convolutions with bias.

    Raises:
        ValueError: another scale factor; fewer ``num_outs`` than scale factors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        *,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        num_outs: int = 5,
        norm_cfg: dict[str, Any] | None = dict(type="LN2d"),  # noqa: B006  mmengine copies configs before it changes them
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if num_outs < len(scale_factors):
            raise ValueError(f"num_outs={num_outs} is less than the {len(scale_factors)} scale_factors")
        self.extra_levels = num_outs - len(scale_factors)
        self.branches = nn.ModuleList()
        for scale in scale_factors:
            layers: list[nn.Module] = []
            channels = in_channels
            if scale == 4:
                layers += [_deconv(channels, channels // 2), _norm(norm_cfg, channels // 2), nn.GELU()]
                layers.append(_deconv(channels // 2, channels // 4))
                channels //= 4
            elif scale == 2:
                layers.append(_deconv(channels, channels // 2))
                channels //= 2
            elif scale == 0.5:
                layers.append(nn.MaxPool2d(2, 2))
            elif scale != 1:
                raise ValueError(f"scale factor {scale}: allowed are 4, 2, 1 and 0.5")
            layers.append(ConvModule(channels, out_channels, 1, norm_cfg=norm_cfg, act_cfg=None))
            layers.append(ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=None))
            self.branches.append(nn.Sequential(*layers))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of the backbone, of which the last is used, (batch, in_channels, rows, columns) -> the levels."""
        levels = [branch(inputs[-1]) for branch in self.branches]
        for _ in range(self.extra_levels):
            levels.append(levels[-1][:, :, ::2, ::2])
        return tuple(levels)


def _deconv(channels: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, out_channels, 2, stride=2)


def _norm(norm_cfg: dict[str, Any] | None, channels: int) -> nn.Module:
    return nn.Identity() if norm_cfg is None else build_norm_layer(norm_cfg, channels)[1]
