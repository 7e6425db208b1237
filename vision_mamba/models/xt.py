"""xT: a large image is encoded region by region, and a Mamba context encoder runs over the tokens of all regions.

Gupta et al. 2024, "xT: Nested Tokenization for Larger Context in Large Images", arXiv 2403.01915. Official code and
weights: github bair-climate-initiative/xT (BSD-3-Clause). ``512_256`` in a name: sides of image and region in pixels.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..checkpoint import find_state_dict
from ..errors import nearest
from ..layers import MambaMixer
from ..paths import scan_paths
from ._builder import OFFICIAL_MIXER, build_model, check_choice
from ._recompute import Recompute, checked, recomputed

# torch.fx takes these whole: they look at sizes, which have no values while it traces.
register_notrace_module(MambaMixer)
register_notrace_function(scan_paths)

GlobalPool = Literal["token", "avg", ""]

#: Order of the tokens in blocks 0, 2, ... and in blocks 1, 3, ...
_DIRECTIONS = ("reverse", "raster")


@register_notrace_module
class RegionEncoder(nn.Module):
    """Any timm model with levels, applied to the regions of an image; its maps are stitched to maps of the image.

    Args:
        name: timm model with ``forward_intermediates``; built without head and final norm.
        region_size: side of a region in pixels, a multiple of the model's total stride.
        region_chunk: regions a pass, of all images of the batch; None for all at once.
        in_chans, drop_path_rate: of the model.
        model_args: further arguments of ``timm.create_model``.

    Raises:
        ValueError: no such model, or it gives no maps; its stride does not divide ``region_size``; ``region_chunk``
            below 1.
    """

    model: Any

    def __init__(
        self,
        name: str,
        *,
        region_size: int,
        region_chunk: int | None,
        in_chans: int,
        drop_path_rate: float,
        model_args: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if region_chunk is not None and region_chunk < 1:
            raise ValueError(f"region_chunk={region_chunk}: give the number of regions a pass, or None for all at once")
        if not timm.is_model(name):
            hint = nearest(name, timm.list_models()) or "; timm.list_models() lists all"
            raise ValueError(f"unknown encoder {name!r}{hint}")
        self.region_size, self.region_chunk = region_size, region_chunk
        # The size reaches those models only that are built for one.
        overlay = dict(input_size=(in_chans, region_size, region_size))
        model: Any = timm.create_model(
            name,
            num_classes=0,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            pretrained_cfg_overlay=overlay,
            **model_args,
        )
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"encoder={name!r} has no forward_intermediates, which gives the maps of a region")
        model.prune_intermediate_layers(1, prune_norm=True, prune_head=True)
        stride = max(info["reduction"] for info in model.feature_info)
        if region_size < stride or region_size % stride:
            raise ValueError(f"region_size={region_size}: {name} needs a multiple of its stride {stride}")
        self.model = model
        self.feature_info: list[dict[str, Any]] = [dict(info) for info in model.feature_info]
        self.grad_checkpointing: Recompute = False

    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        """Recompute in backward: whole chunks of regions, or blocks where all regions are one chunk.

        With chunks, what is kept for backward is the chunks' pixels and maps, and one chunk is recomputed at a time.
        ``"selective"`` keeps what scans gave, too: that of all chunks.
        """
        chunked = self.region_chunk is not None
        self.grad_checkpointing = checked(enable) if chunked else False
        self.model.set_grad_checkpointing(False if chunked else enable)

    def forward(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """(batch, in_chans, height, width) -> a channels-last map (batch, rows, columns, channels) for each level.

        Raises:
            ValueError: height or width is no multiple of the region's side.
        """
        batch, channels, height, width = x.shape
        size = self.region_size
        for side, pixels in (("height", height), ("width", width)):
            if pixels < size or pixels % size:
                lower = max(pixels // size, 1) * size
                raise ValueError(
                    f"image {side} {pixels} is not tiled by regions of {size}; nearest sizes are {lower} and "
                    f"{lower + size}"
                )
        grid = (height // size, width // size)
        regions = x.reshape(batch, channels, grid[0], size, grid[1], size).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        # No split by the number of regions: an exporter would tie the program to it.
        pieces = (regions,) if self.region_chunk is None else regions.split(self.region_chunk)
        chunks = [recomputed(self.grad_checkpointing, self._encode, piece, levels) for piece in pieces]
        maps = []
        for of_level in zip(*chunks, strict=True):
            tiles = torch.cat(of_level) if len(of_level) > 1 else of_level[0]
            tiles = tiles.unflatten(0, (batch, *grid)).permute(0, 1, 4, 2, 5, 3)
            maps.append(tiles.flatten(3, 4).flatten(1, 2))
        return maps

    def _encode(self, regions: Tensor, levels: Sequence[int]) -> list[Tensor]:
        return self.model.forward_intermediates(regions, indices=list(levels), stop_early=True, intermediates_only=True)


class ContextBlock(nn.Module):
    """``h + mixer(h)`` where ``h = norm(x)``: the skip starts after the norm."""

    def __init__(self, dim: int, *, mixer_args: dict[str, Any], **dd) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = MambaMixer(dim, num_paths=1, **mixer_args, **dd)

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.mixer(x, paths)


class XT(nn.Module):
    """xT with a Mamba context encoder (Gupta et al. 2024, section 4), as an ordinary timm model.

    Images of any size that whole regions tile, square or not. Tokens of the region encoder's last map get positions
    (a fixed table of sines), a class token stands behind them, and ``depth`` Mamba blocks walk over all of them, by
    turns from the last token to the first and from the first to the last.

    The levels of ``features_only`` are the region encoder's maps, stitched to maps of the whole image, and one more,
    the context encoder's tokens as a map, with the stride of the last. The official code has a classifier only; this
    level is ours. By default ``features_only`` gives the first three levels and this one.

    Args:
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``"token"`` class token, ``"avg"`` mean over the other tokens, ``""`` no pooling.
        encoder: timm name of the region encoder: a model with levels, for example a Swin, or one of ours.
        encoder_args: further arguments of ``timm.create_model`` for it.
        region_size: side of a region in pixels.
        region_chunk: regions that the region encoder is given at once, of all images of the batch; None for all. It
            bounds the memory of inference, and with ``set_grad_checkpointing`` that of training. The results are the
            same, unless the encoder has batch norms, in training.
        embed_dim: channels of a token in the context encoder, a multiple of 4.
        depth: Mamba blocks of the context encoder.
        d_state, d_conv, expand: of the Mamba mixer.
        drop_rate, drop_path_rate: dropout before the head, and stochastic depth of the region encoder, which the
            context encoder does not have.

    Raises:
        ValueError: a ``depth`` below 2, an ``embed_dim`` that 4 does not divide, an encoder or sizes that
            :class:`RegionEncoder` refuses.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "token",
        encoder: str = "swinv2_tiny_window16_256",
        encoder_args: Mapping[str, Any] | None = None,
        region_size: int = 256,
        region_chunk: int | None = None,
        embed_dim: int = 768,
        depth: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"depth={depth}: the first block runs backwards from the class token; give 2 or more")
        if embed_dim % 4:
            raise ValueError(f"embed_dim={embed_dim}: the position table needs a multiple of 4")
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing: Recompute = False

        self.encoder = RegionEncoder(
            encoder,
            region_size=region_size,
            region_chunk=region_chunk,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            model_args={**(encoder_args or {}), **{k: v for k, v in dd.items() if v is not None}},
        )
        levels = self.encoder.feature_info
        self.input_proj: nn.Module = nn.Linear(levels[-1]["num_chs"], embed_dim, **dd)
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self._set_global_pool(global_pool)
        mixer_args = dict(d_state=d_state, d_conv=d_conv, expand=expand)
        self.blocks = nn.ModuleList(ContextBlock(embed_dim, mixer_args=mixer_args, **dd) for _ in range(depth))
        self.norm: nn.Module = nn.LayerNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        # Linear layers keep torch's own initialisation, as officially.
        nn.init.normal_(self.cls_token, std=1e-6)
        self.feature_info = [dict(info, module=f"encoder.model.{info['module']}") for info in levels]
        self.feature_info.append(
            dict(module=f"blocks.{depth - 1}", num_chs=embed_dim, reduction=levels[-1]["reduction"])
        )

    def _set_global_pool(self, global_pool: str) -> None:
        allowed = ("token", "avg", "")
        check_choice("global_pool", global_pool, allowed if self.cls_token is not None else allowed[1:])
        self.global_pool = global_pool

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        """Recompute context blocks and region encoder in backward; see :meth:`RegionEncoder.set_grad_checkpointing`."""
        self.grad_checkpointing = checked(enable)
        self.encoder.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no matrices, though some have two axes, and the region encoder's own choice."""
        special = ("A_log", "D", "dt_proj_bias", "conv_bias", "cls_token")
        names = {n for n, _ in self.named_parameters() if n.rsplit(".", 1)[-1] in special}
        own = getattr(self.encoder.model, "no_weight_decay", set)
        return names | {f"encoder.model.{n}" for n in own()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The region encoder's groups, then those of the context encoder."""

        def inside(pattern: str) -> str:
            return r"^encoder\.model\.(?:" + re.sub(r"(?<!\[)\^", "", pattern) + ")"

        groups: dict[str, Any] = {}
        for name, patterns in self.encoder.model.group_matcher(coarse).items():
            of_one = isinstance(patterns, str)
            groups[name] = inside(patterns) if of_one else [(inside(pattern), place) for pattern, place in patterns]
        groups["context_stem"] = r"^cls_token|^input_proj"
        groups["context_blocks"] = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return groups

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New head for ``num_classes`` (0 for none), and a new pooling if given."""
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.head = (
            nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes > 0
            else nn.Identity()
        ).train(self.training)

    def _context(self, x: Tensor) -> Tensor:
        """The region encoder's last map -> tokens (batch, L + 1, embed_dim), row by row, class token last; no norm."""
        assert self.cls_token is not None
        table = position_table(x.shape[1], x.shape[2], self.embed_dim, like=self.cls_token)
        # The sum is float32 under autocast, and so is the residual stream after it.
        x = self.input_proj(x.flatten(1, 2)) + table
        x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], dim=1)
        paths = [scan_paths((name,), 1, x.shape[1], device=x.device) for name in _DIRECTIONS]
        for i, block in enumerate(self.blocks):
            args = (x, paths[i % 2])
            x = recomputed(self.grad_checkpointing, block, *args)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> normalised tokens (batch, L + 1, embed_dim), class token last.

        Without the context encoder, which pruning may take away: the last map (batch, rows, columns, channels).
        """
        (last,) = self.encoder(x, (len(self.encoder.feature_info) - 1,))
        return last if self.cls_token is None else self.norm(self._context(last))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> (batch, num_classes), or what enters the classifier with ``pre_logits``."""
        if self.global_pool:
            if self.cls_token is None:
                x = x.mean((1, 2))
            else:
                x = x[:, -1] if self.global_pool == "token" else x[:, :-1].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Final tokens and chosen levels: the region encoder's, then the context encoder's.

        Args:
            x: (batch, in_chans, height, width).
            indices: levels, or how many of the last; None for all.
            norm: apply the final norm to the context encoder's level.
            stop_early: leave out the context encoder if its level is not asked for; then the last of the levels
                stands in place of the final tokens.
            output_fmt: ``"NCHW"`` (batch, channels, rows, columns) or ``"NHWC"``.
            intermediates_only: return the list of maps alone.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        context = len(self.encoder.feature_info)
        take, _ = feature_take_indices(context + (self.cls_token is not None), indices)
        wanted = {i for i in take if i < context}
        to_the_end = context in take or not (stop_early or intermediates_only)
        if to_the_end:
            wanted.add(context - 1)
        levels = sorted(wanted)
        maps = dict(zip(levels, self.encoder(x, levels), strict=True))
        final = maps[levels[-1]]
        if to_the_end and self.cls_token is not None:
            rows, columns = final.shape[1], final.shape[2]
            tokens = self._context(final)
            final = self.norm(tokens)
            maps[context] = (final if norm else tokens)[:, :-1].unflatten(1, (rows, columns))
        intermediates = [maps[i] for i in sorted(take)]
        if output_fmt == "NCHW":
            intermediates = [level.permute(0, 3, 1, 2).contiguous() for level in intermediates]
        return intermediates if intermediates_only else (final, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen levels do not need: stages of the region encoder, context encoder, norm, head."""
        context = len(self.encoder.feature_info)
        take, last = feature_take_indices(context + (self.cls_token is not None), indices)
        if last < context:
            self.encoder.model.prune_intermediate_layers([last], prune_norm=True, prune_head=True)
            self.encoder.feature_info = self.encoder.feature_info[: last + 1]
            self.input_proj, self.cls_token, self.blocks = nn.Identity(), None, nn.ModuleList()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            prune_norm = prune_head = True
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names -> this model's; see :func:`checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


@register_notrace_function
def position_table(rows: int, columns: int, dim: int, *, like: Tensor) -> Tensor:
    """Fixed table (rows * columns, dim), row by row, of the device and type of ``like``.

    The first half of the channels holds the column, the second the row; in each half sines, then cosines of the
    position divided by ``10000 ** (4 k / dim)``, k from 0. (timm's table has the row first and float32 angles.)
    """
    channel = torch.arange(dim // 4, device=like.device, dtype=torch.float64)
    frequency = 10000 ** (-4 * channel / dim)

    def encode(count: int) -> Tensor:  # -> (count, dim / 2)
        angle = torch.arange(count, device=like.device, dtype=torch.float64).unsqueeze(1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)

    column = encode(columns).expand(rows, -1, -1)
    row = encode(rows).unsqueeze(1).expand(-1, columns, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)


_RENAMED = [
    (r"^encoder\.model\.layers_(\d+)\.", r"encoder.model.layers.\1."),  # of timm's FeatureListNet
    (r"^decoder\.(input_proj\.|cls_token$)", r"\1"),
    (r"^decoder\.layers\.", "blocks."),
    (r"^decoder\.cls\.0\.", "norm."),
    (r"^decoder\.cls\.1\.", "head."),
]
#: Constants that older releases of timm stored.
_CONSTANTS = ("attn_mask", "relative_position_index", "relative_coords_table")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: XT) -> dict[str, Tensor]:
    """Official state dict -> ours.

    Our own names pass unchanged. A file of the region encoder alone (ImageNet weights, timm's or of a family here; head
    and final norm are left out) fills the region encoder; the rest keeps the model's values, and a warning says so.
    """
    state_dict = find_state_dict(state_dict)
    if not any(key.startswith("encoder.model.") for key in state_dict):
        return _fill_encoder(state_dict, model)
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key.endswith(_CONSTANTS):
            continue
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        block, _, name = key.partition(".mixer.")
        if block.startswith("blocks.") and name in OFFICIAL_MIXER and not _is_ours(name, value):
            value = value.squeeze(1) if name == "conv1d.weight" else value
            key, value = f"{block}.mixer.{OFFICIAL_MIXER[name]}", value.unsqueeze(0)
        out[key] = value
    if model.cls_token is None:  # pruned with the context encoder
        out.pop("cls_token", None)
    return out


def _is_ours(name: str, value: Tensor) -> bool:
    """Whether A_log or D, whose names are the same, has our path axis."""
    return value.ndim == {"A_log": 3, "D": 2}.get(name, 0)


def _fill_encoder(state_dict: dict[str, Tensor], model: XT) -> dict[str, Tensor]:
    encoder = model.encoder.model
    if hasattr(encoder, "filter_checkpoint"):
        state_dict = encoder.filter_checkpoint(state_dict)
    else:
        convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
        state_dict = convert(state_dict, encoder) if convert is not None else state_dict
    inside = {f"encoder.model.{key}": value for key, value in state_dict.items()}
    own = model.state_dict()
    if not any(key in own for key in inside):
        return state_dict  # of another model altogether: whoever loads it names what does not fit
    warnings.warn(
        "these weights are of the region encoder only: context encoder and head keep the model's own values",
        stacklevel=3,
    )
    out = {key: value for key, value in own.items() if not key.startswith("encoder.model.")}
    return out | {key: value for key, value in inside.items() if key in own}


def _cfg(encoder: str = "", first_conv: str = "patch_embed.proj", size: int = 512, **kwargs: Any) -> dict[str, Any]:
    """``encoder``: repository of ImageNet weights of the region encoder."""
    return {
        "url": "",
        **(dict(hf_hub_id=encoder, hf_hub_filename="model.safetensors") if encoder else {}),
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": f"encoder.model.{first_conv}",
        "classifier": "head",
        "license": "mit" if encoder else "bsd-3-clause",
        "paper_name": "xT: Nested Tokenization for Larger Context in Large Images",
        "paper_ids": "arXiv:2403.01915",
        "origin_url": "https://github.com/bair-climate-initiative/xT",
        "description": None if size == 64 else "weights of the region encoder alone, from ImageNet",
        **kwargs,
    }


def _official(file: str, top1: float) -> dict[str, Any]:
    return _cfg(
        num_classes=284,
        hf_hub_id="bair-climate-initiative/xt",
        hf_hub_filename=file,
        description=f"iNaturalist-Reptilia top-1 {top1} (README)",
    )


_SWIN_TINY = "timm/swinv2_tiny_window16_256.ms_in1k"
_SWIN_BASE = "timm/swinv2_base_window16_256.ms_in1k"
_SWIN_LARGE = "timm/swinv2_large_window12to16_192to256.ms_in22k_ft_in1k"
_VMAMBA_TINY = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"

default_cfgs = generate_default_cfgs(
    {
        # Reptilia of iNaturalist 2018.
        "xt_swinv2_tiny_512_256.bair_inat_reptilia": _official("swin-t/weights/swin-t-mamba-512-256-top1.ckpt", 61.97),
        "xt_swinv2_base_512_256.bair_inat_reptilia": _official("swin-b/weights/swin-b-mamba-512-256-top1.ckpt", 63.73),
        "xt_swinv2_large_512_256.bair_inat_reptilia": _official("swin-l/weights/swin-l-mamba-512-256-top1.ckpt", 73.36),
        # What the official training starts from: a region encoder from ImageNet.
        "xt_swinv2_tiny_512_256.encoder_in1k": _cfg(_SWIN_TINY),
        "xt_swinv2_base_512_256.encoder_in1k": _cfg(_SWIN_BASE),
        "xt_swinv2_large_512_256.encoder_in1k": _cfg(_SWIN_LARGE),
        "xt_swinv2_tiny_4096_512.encoder_in1k": _cfg(_SWIN_TINY, size=4096),
        "xt_vmamba_tiny_512_256.encoder_in1k": _cfg(first_conv="stem.conv1", url=_VMAMBA_TINY, license="mit"),
        "test_xt.untrained": _cfg(first_conv="stem.conv1", size=64),
    }
)


def _create_xt(variant: str, pretrained: bool = False, **kwargs: Any) -> XT:
    return build_model(XT, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=(0, 1, 2, -1), **kwargs)


@register_model
def xt_swinv2_tiny_512_256(pretrained: bool = False, **kwargs: Any) -> XT:
    """Swin V2-T on four regions of 256 pixels."""
    args = dict(encoder="swinv2_tiny_window16_256")
    return _create_xt("xt_swinv2_tiny_512_256", pretrained, **dict(args, **kwargs))


@register_model
def xt_swinv2_base_512_256(pretrained: bool = False, **kwargs: Any) -> XT:
    """Swin V2-B on four regions of 256 pixels."""
    args = dict(encoder="swinv2_base_window16_256")
    return _create_xt("xt_swinv2_base_512_256", pretrained, **dict(args, **kwargs))


@register_model
def xt_swinv2_large_512_256(pretrained: bool = False, **kwargs: Any) -> XT:
    """Swin V2-L on four regions of 256 pixels."""
    args = dict(encoder="swinv2_large_window12to16_192to256")
    return _create_xt("xt_swinv2_large_512_256", pretrained, **dict(args, **kwargs))


@register_model
def xt_swinv2_tiny_4096_512(pretrained: bool = False, **kwargs: Any) -> XT:
    """Swin V2-T on 64 regions of 512 pixels, eight at a time: 16384 tokens. The official code has no such entry."""
    args = dict(encoder="swinv2_tiny_window16_256", region_size=512, region_chunk=8)
    return _create_xt("xt_swinv2_tiny_4096_512", pretrained, **dict(args, **kwargs))


@register_model
def xt_vmamba_tiny_512_256(pretrained: bool = False, **kwargs: Any) -> XT:
    """VMamba-T on four regions of 256 pixels: state spaces inside the regions and over them. Ours, not the paper's."""
    args = dict(encoder="vmamba_tiny_s1l8")
    return _create_xt("xt_vmamba_tiny_512_256", pretrained, **dict(args, **kwargs))


@register_model
def test_xt(pretrained: bool = False, **kwargs: Any) -> XT:
    """Tiny, for tests only."""
    args = dict(encoder="test_vmamba", encoder_args=dict(depths=(1, 1, 2)), region_size=32, embed_dim=32, depth=2)
    return _create_xt("test_xt", pretrained, **dict(args, **kwargs))
