"""Vim: Vision Mamba with bidirectional selective state spaces.

Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State
Space Model", arXiv 2401.09417. Official code and weights: github hustvl/Vim (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, DropPath, to_2tuple, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from timm.models._features_fx import register_notrace_module
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import LayerNorm, MambaMixer, OverlapPatchEmbed, RMSNorm
from ..paths import expand_paths, scan_paths
from ._builder import OFFICIAL_MIXER, build_model, check_choice
from ._plain import PlainModel, cls_positions, fit_pos_embed, insert_tokens, remove_tokens, resample_pos_embed

# torch.fx takes it whole: it looks at sizes, which have no values while it traces.
register_notrace_module(MambaMixer)

ClsPosition = Literal["middle", "head", "double", "none"]
GlobalPool = Literal["token", "avg", "max", "last", ""]


class AttentionMixer(Attention):
    """timm's attention in the place of a Mamba mixer: every token sees all others, so paths are nothing to it."""

    def __init__(self, dim: int, **dd) -> None:
        num_heads = max(dim // 64, 1)
        if dim % num_heads:
            raise ValueError(f"attention in heads of about 64 channels: embed_dim={dim} is no multiple of {num_heads}")
        super().__init__(dim, num_heads=num_heads, qkv_bias=True, **dd)

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class VimBlock(nn.Module):
    """``x + mixer(norm(x))``, with a Mamba mixer, or with attention where ``mixer_args`` is None."""

    def __init__(self, dim: int, *, norm_layer, drop_path: float, mixer_args: dict[str, Any] | None, **dd) -> None:
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.mixer = AttentionMixer(dim, **dd) if mixer_args is None else MambaMixer(dim, **mixer_args, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def branch(self, x: Tensor, paths: Tensor) -> Tensor:
        """What is added to the tokens, from the normalised tokens."""
        return self.drop_path(self.mixer(x, paths))

    def forward(self, x: Tensor, paths: Tensor) -> Tensor:
        return x + self.branch(self.norm(x), paths)


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


class VisionMamba(PlainModel):
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
        paths: scan paths over the grid of patches (:mod:`vision_mamba.paths`): one name for this path and its
            reverse (itself alone where nothing scans backwards), or a name for each path of a mixer, one set of
            parameters each. The class token keeps its place along every path.
        num_registers: so many registers in the place of the class token (``cls_position="none"``), which part the
            patches evenly; with ``global_pool="token"`` the classifier reads all of them, one after the other (Wang et
            al. 2024, Mamba-R, arXiv 2405.14858).
        register_reduction: the classifier's registers have so many times fewer channels, by a linear layer, and a
            norm; 1 for neither.
        attn_every: one mixer in so many is attention, at half of each such group as in Jamba (Lieber et al. 2024,
            arXiv 2403.19887, which has 8); 0 for none.
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
        paths: str | Sequence[str] = "raster",
        num_registers: int = 0,
        register_reduction: int = 1,
        attn_every: int = 0,
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
        if num_registers and cls_position != "none":
            raise ValueError(f"num_registers={num_registers} replace the class token: set cls_position='none'")
        if register_reduction != 1 and (not num_registers or embed_dim % register_reduction):
            raise ValueError(f"register_reduction={register_reduction} needs registers, and to divide {embed_dim=}")
        if attn_every and if_bidirectional:
            raise ValueError("attn_every and if_bidirectional exclude one another: attention has no direction")
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.cls_position = num_registers or cls_position
        self.num_cls_tokens = len(cls_positions(self.cls_position, 1))
        self.num_registers, self.register_reduction = num_registers, register_reduction
        self.grad_checkpointing = False
        # Two rows only where something scans backwards.
        rows = 2 if bimamba_type != "none" or if_bidirectional else 1
        self.path_names = expand_paths(paths, rows)
        if len(self.path_names) != rows and (bimamba_type == "none" or if_bidirectional):
            raise ValueError(f"paths={paths}: {bimamba_type=} with {if_bidirectional=} takes {rows} of them")

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
            self.register_parameter(name, nn.Parameter(torch.empty(1, num_registers or 1, embed_dim, **dd)))
        tokens = self.patch_embed.num_patches + self.num_cls_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd)) if pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        self.norm_layer = norm_layer = partial(RMSNorm if rms_norm else LayerNorm, eps=norm_eps)
        mixer_args = dict(
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            num_paths=1 if bimamba_type == "none" else len(self.path_names),
            share_paths=bimamba_type == "v1",
            average=if_divide_out and bimamba_type == "v2",
            layer_scale=layer_scale,
        )
        num_blocks = depth // 2 if if_bidirectional else depth
        rates = [drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        block = VimPairBlock if if_bidirectional else VimBlock
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(rates):
            attends = attn_every > 0 and i % attn_every == attn_every // 2
            args: Any = None if attends else mixer_args
            self.blocks.append(block(embed_dim, norm_layer=norm_layer, drop_path=rate, mixer_args=args, **dd))
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(num_blocks)
        ]
        self.norm: nn.Module = norm_layer(embed_dim, **dd)
        self.neck: nn.Module = nn.Identity()
        self.norm_neck: nn.Module = nn.Identity()
        self._set_global_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(depth)

    def _cls_names(self) -> tuple[str, ...]:
        if self.cls_position == "none":
            return ()
        return ("cls_token_head", "cls_token_tail") if self.cls_position == "double" else ("cls_token",)

    def _set_global_pool(self, global_pool: str) -> None:
        check_choice("global_pool", global_pool, ("token", "avg", "max", "last", ""))
        if global_pool == "token" and not self.num_cls_tokens:
            raise ValueError("global_pool='token' needs a class token; choose 'avg', 'max' or 'last'")
        self.global_pool = global_pool
        self.head_hidden_size = self.embed_dim
        if global_pool != "token" or not self.num_registers:
            self.neck, self.norm_neck = nn.Identity(), nn.Identity()
            return
        self.head_hidden_size = self.num_registers * self.embed_dim // self.register_reduction
        if self.register_reduction > 1 and isinstance(self.neck, nn.Identity):
            weight = self.patch_embed.proj.weight
            dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
            self.neck = nn.Linear(self.embed_dim, self.embed_dim // self.register_reduction, bias=False, **dd)
            self.norm_neck = self.norm_layer(self.head_hidden_size, **dd)
            trunc_normal_(self.neck.weight, std=0.02)

    def init_weights(self, depth: int) -> None:
        """The official initialisation: output projections shrink with the depth, as in GPT-2."""
        lecun_normal_(self.patch_embed.proj.weight)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        for embedding in (self.pos_embed, *(getattr(self, name) for name in self._cls_names())):
            if embedding is not None:
                trunc_normal_(embedding, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("out_proj.weight", "mixer.proj.weight")):  # of Mamba and of attention
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(depth))
        self._init_head()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no matrices, though some have two axes (one row a path)."""
        special = ("A_log", "D", "dt_proj_bias", "conv_bias", "pos_embed", "cls_token")
        return {n for n, _ in self.named_parameters() if n.rsplit(".", 1)[-1].startswith(special)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm|^neck", (99999,))]
        )

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

    def _paths(self, x: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
        positions = cls_positions(self.cls_position, grid[0] * grid[1])
        return [scan_paths(self.path_names, *grid, inserted=positions, device=x.device)] * len(self.blocks)

    def pool(self, x: Tensor) -> Tensor:
        positions = cls_positions(self.cls_position, x.shape[1] - self.num_cls_tokens)
        if self.global_pool == "token" and self.num_registers:
            registers = torch.stack([x[:, i] for i in positions], dim=1)
            return self.norm_neck(self.neck(registers).flatten(1))
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

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names and sizes -> this model's; see :func:`checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


_OFFICIAL_REVERSE = {
    "A_b_log": "A_log",
    "D_b": "D",
    **{name.replace(".", "_b.", 1): ours for name, ours in OFFICIAL_MIXER.items() if "." in name},
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
        for official, path in ((OFFICIAL_MIXER, 0), (_OFFICIAL_REVERSE, 1)):
            if module == "mixer" and name in official:
                value = value.squeeze(1) if name.startswith("conv1d") and value.ndim == 3 else value
                by_path.setdefault(f"{prefix}.{module}{suffix}.{official[name]}", {})[path] = value
                break
        else:
            out[f"{prefix}.{module}{suffix}.{name}"] = value
    for key, values in by_path.items():
        out[key] = torch.stack([values[path] for path in sorted(values)])
    if "pos_embed_cls" in out and "pos_embed" in out:  # Mamba-R's registers have a table of their own
        positions = cls_positions(model.cls_position, out["pos_embed"].shape[1])
        out["pos_embed"] = insert_tokens(out["pos_embed"], [out.pop("pos_embed_cls")], positions)

    return fit_pos_embed(out, model)


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
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "paper_ids": "arXiv:2401.09417",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny-midclstok",
            hf_hub_filename="vim_t_midclstok_76p1acc.pth",
            description="ImageNet-1K top-1 76.1, top-5 93.0 (README)",
        ),
        "vim_tiny_patch16_stride8_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny-midclstok",
            hf_hub_filename="vim_t_midclstok_ft_78p3acc.pth",
            description="ImageNet-1K top-1 78.3, top-5 94.2 (README)",
        ),
        "vim_small_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-small-midclstok",
            hf_hub_filename="vim_s_midclstok_80p5acc.pth",
            description="ImageNet-1K top-1 80.5, top-5 95.1 (README)",
        ),
        "vim_small_patch16_stride8_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-small-midclstok",
            hf_hub_filename="vim_s_midclstok_ft_81p6acc.pth",
            description="ImageNet-1K top-1 81.6, top-5 95.4 (README)",
        ),
        "vim_base_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-base-midclstok",
            hf_hub_filename="vim_b_midclstok_81p9acc.pth",
            description="ImageNet-1K top-1 81.9, top-5 95.8 (README)",
        ),
        "vim_nano.untrained": _cfg(
            input_size=(3, 64, 64), num_classes=10, crop_pct=1.0, description="ours, for quick starts on a CPU"
        ),
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
