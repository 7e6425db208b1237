"""RSMamba: multi-path state spaces for remote-sensing scenes.

Chen et al. 2024, "RSMamba: Remote Sensing Image Classification with State Space Model", arXiv
2403.19654. Official code and weights: github KyanChen/RSMamba (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, build_sincos2d_pos_embed, to_2tuple, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from timm.models._features_fx import register_notrace_function, register_notrace_module
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import LayerNorm, MultiPathMixer, OverlapPatchEmbed
from ..paths import check_paths, fixed_random_paths, random_paths, scan_paths
from ._builder import OFFICIAL_MIXER, build_model, check_choice
from ._plain import PlainModel, cls_positions, fit_pos_embed, insert_tokens, remove_tokens, resample_pos_embed

# torch.fx takes it whole: it looks at sizes, which have no values while it traces.
register_notrace_module(MultiPathMixer)

ClsPosition = Literal["none", "head", "middle", "tail"]
GlobalPool = Literal["avg", "token", ""]
PosEmbed = Literal["learned", "sine", "none"]
Path = Literal["forward", "reverse", "shuffle"]
#: (number of permutations, length) -> (number, length) integers.
ShufflePaths = Callable[[int, int], Tensor]

_FIXED = {"forward": "raster", "reverse": "reverse"}


class RSMambaBlock(nn.Module):
    """``x + mixer(norm(x))``; the norm is the network's, one for all blocks."""

    def __init__(self, dim: int, *, drop_path: float, mixer_args: dict[str, Any], **dd) -> None:
        super().__init__()
        self.mixer = MultiPathMixer(dim, **mixer_args, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def branch(self, x: Tensor, paths: Tensor) -> Tensor:
        """What is added to the tokens, from the normalised tokens."""
        return self.drop_path(self.mixer(x, paths))

    def forward(self, x: Tensor, norm: nn.Module, paths: Tensor) -> Tensor:
        return x + self.branch(norm(x), paths)


class RSMamba(PlainModel):
    """RSMamba (Chen et al. 2024, section III), as an ordinary timm model.

    The random path is another permutation for each block. In training it is drawn anew for every forward pass
    from the default generator of the images' device, as in the paper. In evaluation it is a fixed function of
    ``shuffle_seed``, the block and the number of tokens, so that equal images get equal scores; the official code draws
    there too.

    Args:
        img_size: side, or (height, width), in pixels; any.
        patch_size: side of a patch in pixels.
        stride: pixels between patches; a patch starts at every ``stride`` pixels, and the image is padded with
            zeros at the bottom and right.
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``"avg"`` norm of the mean over the patch tokens, ``"token"`` class token, ``""`` no pooling:
            scores of every token.
        embed_dim: channels of a token.
        depth: number of blocks.
        paths: which of ``"forward"``, ``"reverse"``, ``"shuffle"``, in the order that the gate knows them.
        merge: ``"gate"`` learned softmax gate over the paths, or ``"mean"``.
        shuffle_seed: fixes the random path in evaluation.
        shuffle_draws: in evaluation, average the scores over this many fixed draws of the random path.
        shuffle_paths: source of the random path in training and evaluation alike: called once a forward pass with
            (depth, number of tokens), it returns one permutation a block. For example
            ``functools.partial(vision_mamba.paths.random_paths, generator=generator)``.
        d_state, d_conv, expand, dt_rank: of the Mamba mixer.
        cls_position: class token at the ``"head"``, ``"middle"`` or ``"tail"`` of the sequence, or ``"none"``.
        pos_embed: absolute position embedding: ``"learned"``, ``"sine"`` (fixed, 2-D) or ``"none"``.
        norm_eps: of the norms.
        drop_rate, pos_drop_rate, drop_path_rate: dropout before the head, after the position embedding,
            and stochastic depth (rising linearly to this rate).
        dynamic_img_size: accept any image size in ``forward``; a learned position embedding is resampled.

    Raises:
        ValueError: an unknown option, or options that exclude one another.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        *,
        stride: int = 8,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        paths: Sequence[Path] = ("forward", "reverse", "shuffle"),
        merge: Literal["gate", "mean"] = "gate",
        shuffle_seed: int = 0,
        shuffle_draws: int = 1,
        shuffle_paths: ShufflePaths | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        cls_position: ClsPosition = "none",
        pos_embed: PosEmbed = "learned",
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("cls_position", cls_position, ("none", "head", "middle", "tail"))
        check_choice("pos_embed", pos_embed, ("learned", "sine", "none"))
        if isinstance(paths, str) or not paths or len(set(paths)) < len(paths):
            raise ValueError(f"paths={paths!r}: give a list of one or more different paths")
        for path in paths:
            check_choice("paths", path, (*_FIXED, "shuffle"))
        if shuffle_draws < 1:
            raise ValueError(f"shuffle_draws={shuffle_draws}: at least 1")
        if pos_embed == "sine" and embed_dim % 4:
            raise ValueError(f"pos_embed='sine' needs an embed_dim that 4 divides, not {embed_dim}")
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.paths = tuple(paths)
        self.shuffle_seed, self.shuffle_draws, self.shuffle_paths = shuffle_seed, shuffle_draws, shuffle_paths
        self.cls_position = cls_position
        self.pos_embed_type, self.norm_eps = pos_embed, norm_eps
        self.grad_checkpointing = False

        self.patch_embed = OverlapPatchEmbed(
            to_2tuple(img_size),
            patch_size,
            stride,
            in_chans=in_chans,
            embed_dim=embed_dim,
            corner_pad=True,
            bias=False,
            dynamic_img_size=dynamic_img_size,
            **dd,
        )
        self.num_cls_tokens = 0 if cls_position == "none" else 1
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if self.num_cls_tokens else None
        tokens = self.patch_embed.num_patches + self.num_cls_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd)) if pos_embed == "learned" else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        self.pre_norm = LayerNorm(embed_dim, eps=norm_eps, **dd)
        mixer_args = dict(
            num_paths=len(self.paths), d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, merge=merge
        )
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            RSMambaBlock(embed_dim, drop_path=rate, mixer_args=mixer_args, **dd) for rate in rates
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.norm: nn.Module = LayerNorm(embed_dim, eps=norm_eps, stream=True, **dd)
        self.fc_norm: nn.Module = nn.Identity()
        self._set_global_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def _set_global_pool(self, global_pool: str) -> None:
        check_choice("global_pool", global_pool, ("avg", "token", ""))
        if global_pool == "token" and not self.num_cls_tokens:
            raise ValueError("global_pool='token' needs a class token; choose 'avg'")
        self.global_pool = global_pool
        if global_pool != "avg":
            self.fc_norm = nn.Identity()
        elif isinstance(self.fc_norm, nn.Identity):
            weight = self.patch_embed.proj.weight
            self.fc_norm = nn.LayerNorm(self.embed_dim, eps=self.norm_eps, device=weight.device, dtype=weight.dtype)

    def init_weights(self) -> None:
        lecun_normal_(self.patch_embed.proj.weight)
        for embedding in (self.pos_embed, self.cls_token):
            if embedding is not None:
                trunc_normal_(embedding, std=0.02)
        self._init_head()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no matrices, though some have two axes."""
        return {n for n, _ in self.named_parameters() if n.rsplit(".", 1)[-1] in ("A_log", "pos_embed", "cls_token")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        # The blocks share pre_norm: it changes as slowly as the first of them.
        return dict(
            stem=r"^cls_token|pos_embed|patch_embed|pre_norm",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm|fc_norm", (99999,))],
        )

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image -> tokens with class token and positions, (batch, L, embed_dim), and the grid of patches."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if self.pos_embed_type == "sine":
            x = x + sine_pos_embed(grid, self.embed_dim, x.device)
        if self.cls_token is not None:
            positions = cls_positions(self.cls_position, grid[0] * grid[1])
            x = insert_tokens(x, [self.cls_token.expand(x.shape[0], -1, -1)], positions)
        if self.pos_embed is not None:
            x = x + resample_pos_embed(self.pos_embed, self.patch_embed.grid_size, grid, self.cls_position)
        # The residual stream is float32 under autocast, whatever the position embedding.
        return self.pos_drop(x.to(self.pre_norm.weight.dtype)), grid

    def _paths(self, x: Tensor, grid: tuple[int, ...], draw: int = 0) -> Tensor:
        """Tables of all blocks, (depth, K, L)."""
        length = x.shape[1]
        shuffled = None
        if "shuffle" in self.paths:
            shuffled = shuffle_tables(
                len(self.blocks),
                length,
                seed=None if self.training else self.shuffle_seed + draw,
                source=self.shuffle_paths,
                device=x.device,
            )
        return block_paths(self.paths, shuffled, len(self.blocks), length, x.device)

    def forward_features(self, x: Tensor, draw: int = 0) -> Tensor:
        """As for every plain model; ``draw`` chooses among the fixed random paths in evaluation."""
        x, grid = self._embed(x)
        return self._walk(x, self._paths(x, grid, draw))

    def _shared(self) -> tuple[nn.Module, ...]:
        return (self.pre_norm,)

    def _norms(self) -> list[Any]:
        return [*(self.pre_norm for _ in self.blocks), self.norm]

    def pool(self, x: Tensor) -> Tensor:
        positions = cls_positions(self.cls_position, x.shape[1] - self.num_cls_tokens)
        if self.global_pool == "token":
            return x[:, positions[0]]
        return remove_tokens(x, positions).mean(1) if self.global_pool == "avg" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> (batch, num_classes), or what enters the classifier with ``pre_logits``."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.shuffle_draws == 1 or "shuffle" not in self.paths:
            return self.forward_head(self.forward_features(x))
        draws = [self.forward_head(self.forward_features(x, draw)) for draw in range(self.shuffle_draws)]
        return torch.stack(draws).mean(0)

    def filter_checkpoint(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official or own names and sizes -> this model's; see :func:`checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


@register_notrace_function
def shuffle_tables(
    depth: int, length: int, *, seed: int | None, source: ShufflePaths | None, device: torch.device
) -> Tensor:
    """One random path a block, (depth, length): from ``source``, else drawn anew without a seed, else fixed by it.

    Raises:
        ValueError: ``source`` gave no permutations, or another number of them.
    """
    if source is None:
        if seed is None:
            return random_paths(depth, length, device=device)
        return fixed_random_paths(depth, length, seed=seed, device=device)
    table = source(depth, length)
    if tuple(table.shape) != (depth, length):
        raise ValueError(f"shuffle_paths gave a table {tuple(table.shape)}, expected ({depth}, {length})")
    return check_paths(table).to(device=device, dtype=torch.int32)


@register_notrace_function
def block_paths(
    names: tuple[str, ...], shuffled: Tensor | None, depth: int, length: int, device: torch.device
) -> Tensor:
    """(depth, K, length): the named rows, the same for all blocks, and the shuffled ones in their place."""
    rows: list[Tensor] = []
    for name in names:
        if name == "shuffle":
            assert shuffled is not None
            rows.append(shuffled)
        else:
            rows.append(scan_paths((_FIXED[name],), 1, length, device=device).expand(depth, length))
    return torch.stack(rows, dim=1)


@register_notrace_function
def sine_pos_embed(grid: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """Fixed table (1, rows * columns, dim): sine and cosine of the row, then of the column.

    The official table of a grid that is not square runs down its columns while the tokens run along the rows; this
    one does not.
    """
    return build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=True, device=device).unsqueeze(0)


_OFFICIAL = {
    "patch_embed.projection.weight": "patch_embed.proj.weight",
    "ln1.weight": "norm.weight",
    "ln1.bias": "norm.bias",
    "ln2.weight": "fc_norm.weight",
    "ln2.bias": "fc_norm.bias",
    "head.fc.weight": "head.weight",
    "head.fc.bias": "head.bias",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RSMamba) -> dict[str, Tensor]:
    """Official state dict (mmpretrain's prefixes, transformers' mixer names) -> ours.

    Our own names pass unchanged. The position table is resampled to the model's grid (a table that is not
    of the model's length is taken to be of a square grid).
    """
    state_dict = state_dict.get("state_dict", state_dict)  # type: ignore[assignment]
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        key = key.removeprefix("backbone.")
        if key.startswith("layers."):
            _, layer, name = key.split(".", 2)
            value = value.squeeze(1) if name == "conv1d.weight" else value
            out[f"blocks.{layer}.mixer.{OFFICIAL_MIXER.get(name, name)}"] = value
        elif key.startswith("gate_layers."):
            out[f"blocks.{key.split('.')[1]}.mixer.gate.weight"] = value
        else:
            out[_OFFICIAL.get(key, key)] = value

    return fit_pos_embed(out, model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
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
        "paper_name": "RSMamba: Remote Sensing Image Classification with State Space Model",
        "paper_ids": "arXiv:2403.19654",
        "origin_url": "https://github.com/KyanChen/RSMamba",
        "notes": (
            "The authors' weights, of UC Merced, AID and RESISC45, are on https://huggingface.co/KyanChen/RSMamba; the "
            "files' names were not checked. `load_checkpoint` and `convert_checkpoint.py` read mmpretrain's files. "
            "With AID's 30 classes the models have 6.4, 16.2 and 33.1 M parameters.",
        ),
        **kwargs,
    }


def _f1(uc_merced: str, aid: str, resisc45: str) -> str:
    return f"F1 on UC Merced {uc_merced}, AID {aid}, RESISC45 {resisc45} (paper, tables I and II)"


default_cfgs = generate_default_cfgs(
    {
        "rsmamba_base.untrained": _cfg(description=_f1("93.88", "91.66", "94.84")),
        "rsmamba_large.untrained": _cfg(description=_f1("94.74", "91.90", "95.02")),
        "rsmamba_huge.untrained": _cfg(description=_f1("95.25", "92.63", "95.18")),
        "rsmamba_nano.untrained": _cfg(
            input_size=(3, 64, 64), num_classes=10, crop_pct=1.0, description="ours, for trials on a CPU"
        ),
        "test_rsmamba.untrained": _cfg(input_size=(3, 64, 64), crop_pct=1.0),
    }
)


def _create_rsmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> RSMamba:
    return build_model(RSMamba, variant, pretrained, filter_fn=checkpoint_filter_fn, levels=3, **kwargs)


@register_model
def rsmamba_base(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """RSMamba-B, 6.4 M parameters with 30 classes."""
    return _create_rsmamba("rsmamba_base", pretrained, **dict(dict(embed_dim=192, depth=24), **kwargs))


@register_model
def rsmamba_large(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """RSMamba-L, 16.2 M parameters with 30 classes."""
    return _create_rsmamba("rsmamba_large", pretrained, **dict(dict(embed_dim=256, depth=36), **kwargs))


@register_model
def rsmamba_huge(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """RSMamba-H, 33.1 M parameters with 30 classes."""
    return _create_rsmamba("rsmamba_huge", pretrained, **dict(dict(embed_dim=320, depth=48), **kwargs))


@register_model
def rsmamba_nano(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """A small RSMamba for trials on a CPU: 64-pixel images, 64 tokens. Ours, not the paper's."""
    args = dict(img_size=64, num_classes=10, embed_dim=96, depth=8)
    return _create_rsmamba("rsmamba_nano", pretrained, **dict(args, **kwargs))


@register_model
def test_rsmamba(pretrained: bool = False, **kwargs: Any) -> RSMamba:
    """Tiny, for tests only."""
    args = dict(img_size=64, stride=16, embed_dim=32, depth=4)
    return _create_rsmamba("test_rsmamba", pretrained, **dict(args, **kwargs))
