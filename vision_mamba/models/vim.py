"""Vim: Vision Mamba with bidirectional selective state spaces.

Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State
Space Model", arXiv 2401.09417. Official code and weights: github hustvl/Vim (Apache-2.0).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from timm.models._manipulate import checkpoint
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import MambaMixer, OverlapPatchEmbed
from ..paths import scan_paths
from ._builder import build_model, check_choice

# torch.fx takes these whole: they look at sizes, which have no values while it traces.
register_notrace_module(OverlapPatchEmbed)
register_notrace_module(MambaMixer)
register_notrace_function(scan_paths)

ClsPosition = Literal["middle", "head", "double", "none"]
GlobalPool = Literal["token", "avg", "max", "last", ""]


class VimBlock(nn.Module):
    """``x + mixer(norm(x))``."""

    def __init__(self, dim: int, *, norm_layer, drop_path: float, mixer_args: dict[str, Any], **dd) -> None:
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.mixer = MambaMixer(dim, **mixer_args, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x), paths))


class VimPairBlock(nn.Module):
    """Official ``if_bidirectional``: two layers a block, one on the flipped sequence; both residuals are kept."""

    def __init__(self, dim: int, *, norm_layer, drop_path: float, mixer_args: dict[str, Any], **dd) -> None:
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.norm_reverse = norm_layer(dim, **dd)
        self.mixer = MambaMixer(dim, **mixer_args, **dd)
        self.mixer_reverse = MambaMixer(dim, **mixer_args, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:
        # The second layer sees the flipped sequence: its first path is the reverse one.
        forward = self.mixer(self.norm(x), paths[: self.mixer.num_paths])
        backward = self.mixer_reverse(self.norm_reverse(x), paths.flip(0)[: self.mixer.num_paths])
        return 2 * x + self.drop_path(forward + backward)


class VisionMamba(nn.Module):
    """Vim (Zhu et al. 2024, section 3), as an ordinary timm model.

    Args:
        img_size: side, or (height, width), in pixels.
        patch_size: side of a patch in pixels.
        stride: pixels between patches; ``patch_size`` if None.
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``"token"`` class token(s), ``"avg"`` mean over the patch tokens, ``"max"`` maximum of
            the class scores over the tokens, ``"last"`` last token, ``""`` no pooling.
        embed_dim: channels of a token.
        depth: number of mixers.
        d_state, d_conv, expand, dt_rank: of the Mamba mixer.
        cls_position: class token ``"middle"`` (of the sequence), ``"head"``, ``"double"`` (one at either
            end, averaged) or ``"none"``.
        bimamba_type: the official names. ``"v2"``: each direction has its own convolution, projections, A and
            D (the paper's block); ``"v1"``: only its own A; ``"none"``: forward direction only.
        if_divide_out: halve the sum of the two directions (v2 only).
        if_bidirectional: layers in pairs, the second of which sees the flipped sequence (needs an even depth).
        rms_norm: RMSNorm, else LayerNorm.
        norm_eps: of the norms.
        layer_scale: initial value of a learned scale of each mixer's output; None for none.
        pos_embed: learned absolute position embedding.
        drop_rate, pos_drop_rate, drop_path_rate: dropout before the head, after the position embedding,
            and stochastic depth (rising linearly to this rate).
        dynamic_img_size: accept any image size in ``forward``; the position embedding is resampled.

    Raises:
        ValueError: options that exclude one another; an image size that the patches do not tile.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        *,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        cls_position: ClsPosition = "middle",
        bimamba_type: Literal["v2", "v1", "none"] = "v2",
        if_divide_out: bool = True,
        if_bidirectional: bool = False,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
        pos_embed: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("cls_position", cls_position, ("middle", "head", "double", "none"))
        check_choice("bimamba_type", bimamba_type, ("v2", "v1", "none"))
        if if_bidirectional and depth % 2:
            raise ValueError(f"if_bidirectional pairs layers: it needs an even depth, not {depth}")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.cls_position = cls_position
        self.num_cls_tokens = len(self._cls_names())
        self._set_global_pool(global_pool)
        self.grad_checkpointing = False
        # Two rows only where something scans backwards.
        self.path_names = ("raster", "reverse") if bimamba_type != "none" or if_bidirectional else ("raster",)

        self.patch_embed = OverlapPatchEmbed(
            to_2tuple(img_size),
            patch_size,
            stride or patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            dynamic_img_size=dynamic_img_size,
            **dd,
        )
        for name in self._cls_names():
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, embed_dim, **dd)))
        tokens = self.patch_embed.num_patches + self.num_cls_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd)) if pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        norm_layer = partial(nn.RMSNorm if rms_norm else nn.LayerNorm, eps=norm_eps)
        mixer_args = dict(
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            num_paths=1 if bimamba_type == "none" else 2,
            share_paths=bimamba_type == "v1",
            average=if_divide_out and bimamba_type == "v2",
            layer_scale=layer_scale,
        )
        num_blocks = depth // 2 if if_bidirectional else depth
        rates = [drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        block = VimPairBlock if if_bidirectional else VimBlock
        self.blocks = nn.ModuleList(
            block(embed_dim, norm_layer=norm_layer, drop_path=rate, mixer_args=mixer_args, **dd) for rate in rates
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(num_blocks)
        ]
        self.norm: nn.Module = norm_layer(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(depth)

    def _cls_names(self) -> tuple[str, ...]:
        names = {"none": (), "double": ("cls_token_head", "cls_token_tail")}
        return names.get(self.cls_position, ("cls_token",))

    def _set_global_pool(self, global_pool: str) -> None:
        check_choice("global_pool", global_pool, ("token", "avg", "max", "last", ""))
        if global_pool == "token" and not self.num_cls_tokens:
            raise ValueError("global_pool='token' needs a class token; choose 'avg', 'max' or 'last'")
        self.global_pool = global_pool

    def init_weights(self, depth: int) -> None:
        """The official initialisation: output projections shrink with the depth, as in GPT-2."""
        lecun_normal_(self.patch_embed.proj.weight)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        for embedding in (self.pos_embed, *(getattr(self, name) for name in self._cls_names())):
            if embedding is not None:
                trunc_normal_(embedding, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("out_proj.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(depth))
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no matrices, though some have two axes (one row a path)."""
        special = ("A_log", "D", "dt_proj_bias", "conv_bias", "pos_embed", "cls_token")
        return {n for n, _ in self.named_parameters() if n.rsplit(".", 1)[-1].startswith(special)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New head for ``num_classes`` (0 for none), and a new pooling if given."""
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes > 0
            else nn.Identity()
        )
        self._init_head()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Build for another image size; the position embedding is resampled."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(to_2tuple(img_size))
        if self.pos_embed is not None:
            resampled = resample_pos_embed(self.pos_embed, old_grid, self.patch_embed.grid_size, self.cls_position)
            self.pos_embed = nn.Parameter(resampled.detach().clone())

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image -> tokens with class tokens and positions, (batch, L, embed_dim), and the grid of patches."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        cls_tokens = [getattr(self, name).expand(x.shape[0], -1, -1) for name in self._cls_names()]
        x = insert_tokens(x, cls_tokens, cls_positions(self.cls_position, grid[0] * grid[1]))
        if self.pos_embed is not None:
            # The sum is float32 under autocast, and so is the residual stream after it.
            x = x + resample_pos_embed(self.pos_embed, self.patch_embed.grid_size, grid, self.cls_position)
        return self.pos_drop(x), grid

    def _paths(self, x: Tensor) -> Tensor:
        return scan_paths(self.path_names, 1, x.shape[1], device=x.device)

    def _block(self, block: nn.Module, x: Tensor, paths: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, x, paths)
        return block(x, paths)

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> normalised tokens (batch, L, embed_dim), class tokens in place."""
        x, _ = self._embed(x)
        paths = self._paths(x)
        for block in self.blocks:
            x = self._block(block, x, paths)
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        positions = cls_positions(self.cls_position, x.shape[1] - self.num_cls_tokens)
        if self.global_pool == "token":
            return torch.stack([x[:, i] for i in positions]).mean(0) if len(positions) > 1 else x[:, positions[0]]
        if self.global_pool == "last":
            return x[:, -1]
        patches = remove_tokens(x, positions)
        return patches.mean(1) if self.global_pool == "avg" else patches

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> (batch, num_classes), or what enters the classifier with ``pre_logits``."""
        x = self.head_drop(self.pool(x))
        if self.global_pool == "max":  # over the scores of the tokens, as in the official code
            return x.amax(1) if pre_logits else self.head(x).amax(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Final tokens and the residual stream after chosen blocks.

        Args:
            x: (batch, in_chans, height, width).
            indices: blocks, or how many of the last; None for all.
            return_prefix_tokens: pair each map with its class tokens, (batch, class tokens, embed_dim).
            norm: apply the final norm to the maps.
            stop_early: leave out the blocks after the last one asked for.
            output_fmt: ``"NCHW"`` (batch, embed_dim, rows, columns) or ``"NLC"``.
            intermediates_only: return the list of maps alone.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        paths = self._paths(x)
        positions = cls_positions(self.cls_position, grid[0] * grid[1])
        intermediates: list[Any] = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._block(block, x, paths)
            if i in take:
                taken = self.norm(x) if norm else x
                patches = remove_tokens(taken, positions)
                if output_fmt == "NCHW":
                    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
                if return_prefix_tokens:
                    intermediates.append((patches, taken[:, list(positions)]))
                else:
                    intermediates.append(patches)
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop blocks, norm and head that the chosen intermediates do not need."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names and sizes -> this model's; see :func:`checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


def cls_positions(cls_position: str, num_patches: int) -> tuple[int, ...]:
    """Places of the class tokens in a sequence of ``num_patches`` patches."""
    return {
        "middle": (num_patches // 2,),
        "head": (0,),
        "tail": (num_patches,),
        "double": (0, num_patches + 1),
        "none": (),
    }[cls_position]


@register_notrace_function
def insert_tokens(x: Tensor, tokens: list[Tensor], positions: tuple[int, ...]) -> Tensor:
    """Put ``tokens`` (each (batch, 1, C)) into ``x`` (batch, L, C) so that they stand at ``positions``."""
    if not tokens:
        return x
    parts, start = [], 0
    for inserted, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        parts += [x[:, start : position - inserted], token]
        start = position - inserted
    return torch.cat([*parts, x[:, start:]], dim=1)


@register_notrace_function
def remove_tokens(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """``x`` (batch, L, C) without the tokens at ``positions``."""
    if not positions:
        return x
    edges = [-1, *positions, x.shape[1]]
    parts = [x[:, a + 1 : b] for a, b in zip(edges, edges[1:]) if b > a + 1]  # noqa: B905
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@register_notrace_function
def resample_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    cls_position: str,
) -> Tensor:
    """Position table (1, L, C) for another grid of patches; the class tokens keep their own rows.

    Unlike the official interpolation, which takes the first rows for class tokens, this knows where they are.

    Raises:
        ValueError: the table does not have one row for each patch of ``old_grid`` and each class token.
    """
    if old_grid == new_grid:
        return pos_embed
    old_positions = cls_positions(cls_position, old_grid[0] * old_grid[1])
    if pos_embed.shape[1] != old_grid[0] * old_grid[1] + len(old_positions):
        raise ValueError(f"position embedding of {pos_embed.shape[1]} rows does not fit a grid of {old_grid}")
    patches = resample_abs_pos_embed(
        remove_tokens(pos_embed, old_positions),
        new_size=list(new_grid),
        old_size=list(old_grid),
        num_prefix_tokens=0,
        antialias=False,
    )
    cls_rows = [pos_embed[:, i : i + 1] for i in old_positions]
    return insert_tokens(patches, cls_rows, cls_positions(cls_position, new_grid[0] * new_grid[1]))


_OFFICIAL_MIXER = {
    "A_log": "A_log",
    "D": "D",
    "conv1d.weight": "conv_weight",
    "conv1d.bias": "conv_bias",
    "x_proj.weight": "x_proj_weight",
    "dt_proj.weight": "dt_proj_weight",
    "dt_proj.bias": "dt_proj_bias",
}
_OFFICIAL_REVERSE = {
    "A_b_log": "A_log",
    "D_b": "D",
    **{name.replace(".", "_b.", 1): ours for name, ours in _OFFICIAL_MIXER.items() if "." in name},
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VisionMamba) -> dict[str, Tensor]:
    """Official state dict -> ours: one tensor with a path axis in place of two per direction.

    Our own names pass unchanged. The position table is resampled to the model's grid (a table that is not
    of the model's length is taken to be of a square grid).
    """
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    paired = bool(model.blocks) and isinstance(model.blocks[0], VimPairBlock)
    out: dict[str, Tensor] = {}
    by_path: dict[str, dict[int, Tensor]] = {}
    for key, value in state_dict.items():
        if key.startswith("norm_f."):
            out[key.replace("norm_f.", "norm.")] = value
            continue
        if not key.startswith("layers."):
            out[key] = value
            continue
        _, layer, name = key.split(".", 2)
        prefix, suffix = f"blocks.{layer}", ""
        if paired:
            prefix, suffix = f"blocks.{int(layer) // 2}", "_reverse" if int(layer) % 2 else ""
        module, _, name = name.partition(".")
        for official, path in ((_OFFICIAL_MIXER, 0), (_OFFICIAL_REVERSE, 1)):
            if module == "mixer" and name in official:
                value = value.squeeze(1) if name.startswith("conv1d") and value.ndim == 3 else value
                by_path.setdefault(f"{prefix}.{module}{suffix}.{official[name]}", {})[path] = value
                break
        else:
            out[f"{prefix}.{module}{suffix}.{name}"] = value
    for key, values in by_path.items():
        out[key] = torch.stack([values[path] for path in sorted(values)])

    table = out.get("pos_embed")
    if table is not None and model.pos_embed is not None and table.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(table.shape[1] - model.num_cls_tokens)
        if side * side + model.num_cls_tokens == table.shape[1]:
            out["pos_embed"] = resample_pos_embed(table, (side, side), model.patch_embed.grid_size, model.cls_position)
    return out


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
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
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny-midclstok", hf_hub_filename="vim_t_midclstok_76p1acc.pth"
        ),
        "vim_tiny_patch16_stride8_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny-midclstok", hf_hub_filename="vim_t_midclstok_ft_78p3acc.pth"
        ),
        "vim_small_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-small-midclstok", hf_hub_filename="vim_s_midclstok_80p5acc.pth"
        ),
        "vim_small_patch16_stride8_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-small-midclstok", hf_hub_filename="vim_s_midclstok_ft_81p6acc.pth"
        ),
        "vim_base_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-base-midclstok", hf_hub_filename="vim_b_midclstok_81p9acc.pth"
        ),
        "vim_nano.untrained": _cfg(input_size=(3, 64, 64), num_classes=10, crop_pct=1.0),
        "test_vim.untrained": _cfg(input_size=(3, 64, 64), crop_pct=1.0),
    }
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    return build_model(VisionMamba, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=3, **kwargs)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti, 7 M parameters."""
    return _create_vim("vim_tiny_patch16_224", pretrained, **dict(dict(embed_dim=192, depth=24), **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti+: patches every 8 pixels, 729 of them."""
    args = dict(embed_dim=192, depth=24, stride=8)
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **dict(args, **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S, 26 M parameters."""
    return _create_vim("vim_small_patch16_224", pretrained, **dict(dict(embed_dim=384, depth=24), **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S+: patches every 8 pixels, 729 of them."""
    args = dict(embed_dim=384, depth=24, stride=8)
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **dict(args, **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B, 98 M parameters."""
    return _create_vim("vim_base_patch16_224", pretrained, **dict(dict(embed_dim=768, depth=24), **kwargs))


@register_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """A small Vim for quick starts on a CPU: 64-pixel images, patches of 8. Ours, not the paper's."""
    args = dict(img_size=64, patch_size=8, num_classes=10, embed_dim=96, depth=8)
    return _create_vim("vim_nano", pretrained, **dict(args, **kwargs))


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Tiny, for tests only."""
    args = dict(img_size=64, embed_dim=32, depth=4)
    return _create_vim("test_vim", pretrained, **dict(args, **kwargs))
