"""VideoMamba: bidirectional Mamba over the tokens of an image or of a clip.

Li et al. 2024, "VideoMamba: State Space Model for Efficient Video Understanding", arXiv 2403.06977. Official code
and weights: github OpenGVLab/VideoMamba (Apache-2.0).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple, trunc_normal_
from timm.models._features_fx import register_notrace_module
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import OverlapPatchEmbed
from ..paths import scan_paths
from ._builder import build_model, check_choice
from ._plain import resample_pos_embed
from .vim import VisionMamba

Scan = Literal["spatial", "temporal", "spatiotemporal_v1", "spatiotemporal_v2"]

#: Scan orders (section 3.2 and figure 4) as paths over a grid with one row a frame. No code of the last two was
#: published: "v1" takes half of the four paths, one of each order; "v2" all four, each with its own parameters.
SCANS: dict[str, tuple[str, ...]] = {
    "spatial": ("raster", "reverse"),
    "temporal": ("column", "column_reverse"),
    "spatiotemporal_v1": ("raster", "column_reverse"),
    "spatiotemporal_v2": ("raster", "reverse", "column", "column_reverse"),
}


@register_notrace_module
class TubeletEmbed(OverlapPatchEmbed):
    """One convolution from a clip to tokens; a token sees ``tubelet_size`` frames of a patch, none overlap.

    Args:
        img_size, patch_size, in_chans, embed_dim, dynamic_img_size: as for :class:`OverlapPatchEmbed`.
        num_frames: frames of a clip.
        tubelet_size: frames of a token.

    Raises:
        ValueError: ``num_frames`` is no multiple of ``tubelet_size``.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        *,
        num_frames: int,
        tubelet_size: int,
        in_chans: int,
        embed_dim: int,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            img_size, patch_size, patch_size, in_chans=in_chans, embed_dim=embed_dim,
            dynamic_img_size=dynamic_img_size, **dd,
        )  # fmt: skip
        if num_frames < 1 or num_frames % tubelet_size:
            raise ValueError(f"num_frames={num_frames} is no multiple of tubelet_size={tubelet_size}")
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel, **dd)  # type: ignore[assignment]

    @property
    def num_steps(self) -> int:
        """Tokens along the time axis."""
        return self.num_frames // self.tubelet_size

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, frames, height, width) -> (batch, steps, rows, columns, embed_dim).

        Raises:
            ValueError: no clip, another number of frames than ``num_frames``, or as for images.
        """
        if x.ndim != 5 or x.shape[2] != self.num_frames:
            raise ValueError(
                f"input is {tuple(x.shape)}, the model takes clips (batch, channels, {self.num_frames} frames, height, "
                "width); sample that many frames, or create the model with num_frames=..."
            )
        self.check_size((x.shape[-2], x.shape[-1]))
        return self.proj(x).permute(0, 2, 3, 4, 1)


class VideoMambaImage(VisionMamba):
    """VideoMamba for images: Vim with the class token in front and the sum of both directions.

    Args:
        img_size, patch_size, cls_position, if_divide_out, **kwargs: of :class:`VisionMamba`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        *,
        cls_position: Literal["middle", "head", "double", "none"] = "head",
        if_divide_out: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, patch_size, cls_position=cls_position, if_divide_out=if_divide_out, **kwargs)

    def init_weights(self, depth: int) -> None:
        """The official initialisation: every linear layer is drawn anew, and the step biases become zero with them."""
        super().init_weights(depth)
        self.patch_embed.proj.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj_weight", "dt_proj_weight")):
                trunc_normal_(parameter, std=0.02)
            elif name.endswith("dt_proj_bias") or name.startswith("cls_token"):
                nn.init.zeros_(parameter)

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names and sizes -> this model's: Vim's, less the heads that a teacher looked at."""
        state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
        teachers = ("distill_head.", "clip_decoder.")
        return super().filter_checkpoint({k: v for k, v in state_dict.items() if not k.startswith(teachers)})


class VideoMamba(VideoMambaImage):
    """VideoMamba (section 3.2): clips (batch, channels, frames, height, width) -> (batch, num_classes).

    A class token, then the tokens of the first time step row by row, then the second's. Every time step has the same
    position embedding of an image, and one of its own for all its tokens. ``forward_intermediates`` gives maps
    (batch, embed_dim, steps, rows, columns).

    Args:
        img_size: side, or (height, width), of a frame in pixels.
        patch_size: side of a patch in pixels.
        num_frames: frames of a clip.
        tubelet_size: frames of a token.
        scan: the order of the tokens, see :data:`SCANS`: ``"spatial"`` frame by frame (the released models),
            ``"temporal"`` patch by patch, each through all time steps, ``"spatiotemporal_v1"`` forward by frames and
            backward by patches, ``"spatiotemporal_v2"`` both ways by both.
        in_chans: channels of a frame.
        embed_dim: channels of a token.
        depth: number of blocks.
        dynamic_img_size: accept frames of any size in ``forward``; the position embedding is resampled.
        **kwargs: of :class:`VisionMamba`: ``num_classes``, ``global_pool``, ``d_state``, ``d_conv``, ``expand``,
            ``dt_rank``, ``layer_scale``, ``attn_every``, ``rms_norm``, ``norm_eps``, ``drop_rate``, ``pos_drop_rate``,
            ``drop_path_rate``.

    Raises:
        ValueError: an unknown scan, frames or a size that the tubelets do not tile.
    """

    patch_embed: TubeletEmbed

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        *,
        num_frames: int = 8,
        tubelet_size: int = 1,
        scan: Scan = "spatial",
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 24,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        check_choice("scan", scan, tuple(SCANS))
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            img_size, patch_size, stride=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth,
            cls_position="head", bimamba_type="v2", if_divide_out=False, if_bidirectional=False, paths=SCANS[scan],
            pos_embed=True, **dd, **kwargs,
        )  # fmt: skip
        self.patch_embed = TubeletEmbed(
            to_2tuple(img_size), patch_size, num_frames=num_frames, tubelet_size=tubelet_size, in_chans=in_chans,
            embed_dim=embed_dim, dynamic_img_size=dynamic_img_size, **dd,
        )  # fmt: skip
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, self.patch_embed.num_steps, embed_dim, **dd))
        self.init_weights(depth)

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self.patch_embed.num_frames

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"temporal_pos_embedding"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        matcher = super().group_matcher(coarse)
        return {**matcher, "stem": rf"{matcher['stem']}|temporal_pos_embedding"}

    def _embed(self, x: Tensor) -> tuple[Tensor, Any]:
        """Clip -> tokens with class token and positions, (batch, L, embed_dim), and the grid (steps, rows, columns)."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2], x.shape[3])
        positions = resample_pos_embed(self.pos_embed, self.patch_embed.grid_size, grid[1:], self.cls_position)
        x = x.flatten(2, 3) + positions[:, None, 1:] + self.temporal_pos_embedding.unsqueeze(2)
        cls_token = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        return self.pos_drop(torch.cat([cls_token, x.flatten(1, 2)], dim=1)), grid

    def _paths(self, x: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
        steps, rows, columns = grid
        table = scan_paths(self.path_names, steps, rows * columns, inserted=(0,), device=x.device)
        return [table] * len(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names and sizes -> this model's.

        Weights of an image model become those of the middle frame of a tubelet, and the time steps start alike; a
        table of other time steps is resampled linearly.
        """
        state_dict = super().filter_checkpoint(state_dict)
        kernel, table = state_dict.get("patch_embed.proj.weight"), state_dict.get("temporal_pos_embedding")
        steps = self.patch_embed.num_steps
        if kernel is not None and kernel.ndim == 4:
            size = self.patch_embed.tubelet_size
            inflated = kernel.new_zeros(*kernel.shape[:2], size, *kernel.shape[2:])
            inflated[:, :, size // 2] = kernel
            state_dict["patch_embed.proj.weight"] = inflated
            if table is None:
                state_dict["temporal_pos_embedding"] = kernel.new_zeros(1, steps, self.embed_dim)
        elif table is not None and table.shape[1] != steps:
            resampled = F.interpolate(table.transpose(1, 2), size=steps, mode="linear", align_corners=False)
            state_dict["temporal_pos_embedding"] = resampled.transpose(1, 2)
        return state_dict


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VideoMambaImage) -> dict[str, Tensor]:
    """Official state dict -> ours; see the models' ``filter_checkpoint``."""
    return model.filter_checkpoint(state_dict)


def _cfg(file: str = "", top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    hub = dict(hf_hub_id="OpenGVLab/VideoMamba", hf_hub_filename=file) if file else {}
    figure = dict(description=f"ImageNet-1K top-1 {top1} (model zoo)") if top1 else {}
    return {
        **hub,
        **figure,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "VideoMamba: State Space Model for Efficient Video Understanding",
        "paper_ids": "arXiv:2403.06977",
        "origin_url": "https://github.com/OpenGVLab/VideoMamba",
        **kwargs,
    }


# Data set -> its name, classes, views a video in the published test, (frames, side) of the released models and their
# top-1; "masked" is the middle size after masked pre-training. For None the model zoo links another model's file.
_CLIPS: dict[str, tuple[str, int, int, tuple[tuple[int, int], ...], dict[str, tuple[float | None, ...]]]] = {
    "k400": (
        "Kinetics-400", 400, 12, ((8, 224), (16, 224), (32, 224), (64, 224), (64, 384)),
        dict(
            tiny=(76.9, 78.1, 78.8, 79.6, 80.3),
            small=(79.3, 80.8, 81.5, 81.8, 82.7),
            middle=(80.6, 81.9, 82.4, 82.8, 83.3),
            masked=(82.0, None, 83.9, 84.3, 85.0),
        ),
    ),
    "ssv2": (
        "Something-Something V2", 174, 12, ((8, 224), (16, 224), (16, 288)),
        dict(
            tiny=(65.1, 66.0, 66.2), small=(66.6, 67.7, 68.1), middle=(67.3, 68.3, 68.4), masked=(70.2, None, 71.4),
        ),
    ),
    "breakfast": (
        "Breakfast", 10, 12, ((32, 224), (64, 224)),
        dict(tiny=(94.3, 94.3), small=(95.3, 97.4), middle=(94.8, 95.8), masked=(97.9, 96.9)),
    ),
    "coin": (
        "COIN", 180, 30, ((32, 224), (64, 224)),
        dict(tiny=(86.2, 87.0), small=(88.4, 88.7), middle=(88.3, 89.5), masked=(89.6, 90.4)),
    ),
}  # fmt: skip


def _clip_cfgs() -> dict[str, dict[str, Any]]:
    """``input_size`` is that of one frame, as timm's tools expect; the number of frames is in the model's name."""
    cfgs = {}
    for data, (name, num_classes, views, shapes, figures) in _CLIPS.items():
        for size, row in figures.items():
            mask, size = ("mask", "middle") if size == "masked" else ("", size)
            for (frames, side), top1 in zip(shapes, row, strict=True):
                if top1 is None:
                    continue
                file = "_".join(filter(None, (f"videomamba_{size[0]}16", data, mask and "mask_ft", f"f{frames}")))
                tag = "_".join(filter(None, ("opengvlab", mask, data, "" if side == 224 else str(side))))
                cfgs[f"videomamba_{size}_f{frames}.{tag}"] = _cfg(
                    f"{file}_res224{'' if side == 224 else f'to{side}'}.pth",
                    description=f"{name} top-1 {top1}, {views} views (model zoo)",
                    num_classes=num_classes,
                    input_size=(3, side, side),
                    crop_pct=1.0,
                    interpolation="bilinear",
                )
    return cfgs


default_cfgs = generate_default_cfgs(
    {
        "videomamba_tiny.opengvlab_in1k": _cfg("videomamba_t16_in1k_res224.pth", 76.9),
        # Of this file the model zoo has no link to the hub.
        "videomamba_tiny.opengvlab_in1k_448": _cfg(
            top1=79.3,
            url="https://pjlab-gvm-data.oss-cn-shanghai.aliyuncs.com/videomamba/videomamba_t16_in1k_res224to448.pth",
            input_size=(3, 448, 448),
        ),
        "videomamba_tiny.opengvlab_in1k_576": _cfg(
            "videomamba_t16_in1k_res224to448to576.pth", 79.6, input_size=(3, 576, 576)
        ),
        "videomamba_small.opengvlab_in1k": _cfg("videomamba_s16_in1k_res224.pth", 81.2),
        "videomamba_small.opengvlab_in1k_448": _cfg(
            "videomamba_s16_in1k_res224to448.pth", 83.2, input_size=(3, 448, 448)
        ),
        "videomamba_small.opengvlab_in1k_576": _cfg(
            "videomamba_s16_in1k_res224to448to576.pth", 83.5, input_size=(3, 576, 576)
        ),
        "videomamba_middle.opengvlab_in1k": _cfg("videomamba_m16_in1k_res224.pth", 82.8),
        "videomamba_middle.opengvlab_in1k_448": _cfg(
            "videomamba_m16_in1k_res224to448.pth", 83.8, input_size=(3, 448, 448)
        ),
        "videomamba_middle.opengvlab_in1k_576": _cfg(
            "videomamba_m16_in1k_res224to448to576.pth", 84.0, input_size=(3, 576, 576)
        ),
        "videomamba_base.opengvlab_in1k": _cfg("videomamba_b16_in1k_res224.pth", 82.7),
        "test_videomamba.untrained": _cfg(input_size=(3, 64, 64), crop_pct=1.0),
        "test_videomamba_f4.untrained": _cfg(input_size=(3, 64, 64), crop_pct=1.0, num_classes=10),
        **_clip_cfgs(),
    }
)

_TINY = dict(embed_dim=192, depth=24)
_SMALL = dict(embed_dim=384, depth=24)
_MIDDLE = dict(embed_dim=576, depth=32)
_BASE = dict(embed_dim=768, depth=24)


def _create_image(variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any) -> VideoMambaImage:
    return build_model(
        VideoMambaImage, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=3, **{**args, **kwargs}
    )


def _create_clip(variant: str, pretrained: bool, args: dict[str, Any], **kwargs: Any) -> VideoMamba:
    return build_model(VideoMamba, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=3, **{**args, **kwargs})


@register_model
def videomamba_tiny(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """VideoMamba-Ti for images, 7 M parameters."""
    return _create_image("videomamba_tiny", pretrained, _TINY, **kwargs)


@register_model
def videomamba_small(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """VideoMamba-S for images, 26 M parameters."""
    return _create_image("videomamba_small", pretrained, _SMALL, **kwargs)


@register_model
def videomamba_middle(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """VideoMamba-M for images, 74 M parameters."""
    return _create_image("videomamba_middle", pretrained, _MIDDLE, **kwargs)


@register_model
def videomamba_base(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """VideoMamba-B for images, 98 M parameters."""
    return _create_image("videomamba_base", pretrained, _BASE, **kwargs)


@register_model
def test_videomamba(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """Tiny, for tests only."""
    return _create_image("test_videomamba", pretrained, dict(img_size=64, embed_dim=32, depth=4), **kwargs)


@register_model
def videomamba_tiny_f8(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti for clips of 8 frames."""
    return _create_clip("videomamba_tiny_f8", pretrained, dict(_TINY, num_frames=8), **kwargs)


@register_model
def videomamba_tiny_f16(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti for clips of 16 frames."""
    return _create_clip("videomamba_tiny_f16", pretrained, dict(_TINY, num_frames=16), **kwargs)


@register_model
def videomamba_tiny_f32(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti for clips of 32 frames."""
    return _create_clip("videomamba_tiny_f32", pretrained, dict(_TINY, num_frames=32), **kwargs)


@register_model
def videomamba_tiny_f64(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti for clips of 64 frames."""
    return _create_clip("videomamba_tiny_f64", pretrained, dict(_TINY, num_frames=64), **kwargs)


@register_model
def videomamba_small_f8(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S for clips of 8 frames."""
    return _create_clip("videomamba_small_f8", pretrained, dict(_SMALL, num_frames=8), **kwargs)


@register_model
def videomamba_small_f16(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S for clips of 16 frames."""
    return _create_clip("videomamba_small_f16", pretrained, dict(_SMALL, num_frames=16), **kwargs)


@register_model
def videomamba_small_f32(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S for clips of 32 frames."""
    return _create_clip("videomamba_small_f32", pretrained, dict(_SMALL, num_frames=32), **kwargs)


@register_model
def videomamba_small_f64(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S for clips of 64 frames."""
    return _create_clip("videomamba_small_f64", pretrained, dict(_SMALL, num_frames=64), **kwargs)


@register_model
def videomamba_middle_f8(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M for clips of 8 frames."""
    return _create_clip("videomamba_middle_f8", pretrained, dict(_MIDDLE, num_frames=8), **kwargs)


@register_model
def videomamba_middle_f16(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M for clips of 16 frames."""
    return _create_clip("videomamba_middle_f16", pretrained, dict(_MIDDLE, num_frames=16), **kwargs)


@register_model
def videomamba_middle_f32(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M for clips of 32 frames."""
    return _create_clip("videomamba_middle_f32", pretrained, dict(_MIDDLE, num_frames=32), **kwargs)


@register_model
def videomamba_middle_f64(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M for clips of 64 frames."""
    return _create_clip("videomamba_middle_f64", pretrained, dict(_MIDDLE, num_frames=64), **kwargs)


@register_model
def test_videomamba_f4(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """Tiny, clips of 4 frames, for tests only."""
    args = dict(img_size=64, num_frames=4, embed_dim=32, depth=4)
    return _create_clip("test_videomamba_f4", pretrained, args, **kwargs)
