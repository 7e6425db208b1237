"""What plain backbones share: tokens of one size, class tokens in any place, timm's contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..layers import OverlapPatchEmbed
from ..layers.observed import are_observed
from ..paths import scan_paths
from ._builder import check_choice
from ._recompute import Recompute, checked, recomputed

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm 1.0.28 and before keep no record of a model's own size

    def update_model_input_size(model: nn.Module, img_size: int | Sequence[int] | None, **model_args: Any) -> None:
        pass


# torch.fx takes these whole: they look at sizes, which have no values while it traces.
register_notrace_module(OverlapPatchEmbed)
register_notrace_function(scan_paths)


class PlainModel(nn.Module):
    """A timm model made of ``patch_embed``, class tokens, ``pos_embed``, ``blocks``, ``norm`` and ``head``.

    A family's constructor makes these; the four methods that raise here are the family's too, and ``forward``: torch.fx
    wraps what was registered as not to be traced only where it is called in the module of the root's ``forward``.
    """

    patch_embed: OverlapPatchEmbed
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    pos_embed: nn.Parameter | None
    cls_position: str | int
    embed_dim: int
    head_hidden_size: int
    grad_checkpointing: Recompute = False

    def _set_global_pool(self, global_pool: str) -> None:
        """Checks the pooling and sets what depends on it."""
        raise NotImplementedError

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Image -> tokens with class tokens and positions, (batch, L, embed_dim), and the grid of patches."""
        raise NotImplementedError

    def _paths(self, x: Tensor, grid: tuple[int, ...]) -> Sequence[Tensor] | Tensor:
        """A table of scan paths (K, L) for each block, from the tokens and the grid of patches."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> (batch, num_classes), or what enters the classifier with ``pre_logits``."""
        raise NotImplementedError

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        """Recompute blocks in the backward pass; ``"selective"``: all of them but their scans."""
        self.grad_checkpointing = checked(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New head for ``num_classes`` (0 for none), and a new pooling if given."""
        kept = set(self.modules())
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        self.head = (
            nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes > 0
            else nn.Identity()
        )
        self._init_head()
        for module in set(self.modules()) - kept:  # a layer is born in training mode
            module.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Build for another image size; the position embedding is resampled."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(to_2tuple(img_size))
        if self.pos_embed is not None:
            resampled = resample_pos_embed(self.pos_embed, old_grid, self.patch_embed.grid_size, self.cls_position)
            self.pos_embed = nn.Parameter(resampled.detach().clone(), requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)

    def _block(self, block: nn.Module, x: Tensor, paths: Tensor) -> Tensor:
        # The table is an argument, so the recomputation sees the same path, drawn at random or not.
        return recomputed(self.grad_checkpointing, block, x, *self._shared(), paths)

    def _shared(self) -> tuple[nn.Module, ...]:
        """Modules of the network that every block is given."""
        return ()

    def _norms(self) -> list[Any]:
        """The norm that each block's tokens go through, and the last one."""
        blocks: list[Any] = list(self.blocks)
        return [*(block.norm for block in blocks), self.norm]

    def _walk(self, x: Tensor, paths: Sequence[Tensor] | Tensor) -> Tensor:
        if not self._adds_within_norms(x):
            for i, block in enumerate(self.blocks):
                x = self._block(block, x, paths[i])
            return self.norm(x)
        blocks: list[Any] = list(self.blocks)
        norms = self._norms()
        normed = norms[0](x)
        for i, block in enumerate(blocks):
            normed, x = norms[i + 1].after(block.branch(normed, paths[i]), x)
        return normed

    def _adds_within_norms(self, x: Tensor) -> bool:
        """Whether a block's addition can be made in one pass with the next block's norm.

        It is then outside of the block. So only where a block is but what it adds to its normalised input (``branch``),
        and nobody looks at what a block or a norm is given and returns: no hooks, no tracer, no compiler.
        """
        blocks: list[Any] = list(self.blocks)
        if (
            self.grad_checkpointing
            or not blocks
            or isinstance(x, torch.fx.Proxy)
            or torch.jit.is_scripting()
            or torch.jit.is_tracing()
            or torch.compiler.is_compiling()
            or not all(hasattr(type(block), "branch") for block in blocks)
        ):
            return False
        norms = self._norms()
        return all(hasattr(type(norm), "after") for norm in norms) and not are_observed(*blocks, *norms)

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> normalised tokens (batch, L, embed_dim), class tokens in place."""
        x, grid = self._embed(x)
        return self._walk(x, self._paths(x, grid))

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
            output_fmt: ``"NCHW"`` (batch, embed_dim, rows, columns; of a clip steps, rows, columns) or ``"NLC"``.
            intermediates_only: return the list of maps alone.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        paths = self._paths(x, grid)
        positions = cls_positions(self.cls_position, math.prod(grid))
        intermediates: list[Any] = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._block(block, x, paths[i])
            if i in take:
                taken = self.norm(x) if norm else x
                patches = remove_tokens(taken, positions)
                if output_fmt == "NCHW":
                    patches = patches.unflatten(1, grid).movedim(-1, 1).contiguous()
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


def cls_positions(cls_position: str | int, num_patches: int) -> tuple[int, ...]:
    """Places of the class tokens in a sequence of ``num_patches`` patches.

    A number stands for so many tokens that part the patches evenly: ``num_patches // (number + 1)`` before each, and
    the rest at the end (Wang et al. 2024, Mamba-R, arXiv 2405.14858).
    """
    if isinstance(cls_position, int):
        run = num_patches // (cls_position + 1)
        return tuple(run + i * (run + 1) for i in range(cls_position))
    return {
        "middle": (num_patches // 2,),
        "head": (0,),
        "tail": (num_patches,),
        "double": (0, num_patches + 1),
        "none": (),
    }[cls_position]


@register_notrace_function
def insert_tokens(x: Tensor, tokens: list[Tensor], positions: tuple[int, ...]) -> Tensor:
    """Put ``tokens`` (each (batch, n, C)) into ``x`` (batch, L, C) so that they stand at ``positions``."""
    if not tokens:
        return x
    parts, start = [], 0
    single = [token for several in tokens for token in several.split(1, dim=1)]
    for inserted, (token, position) in enumerate(zip(single, positions, strict=True)):
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
    cls_position: str | int,
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


def fit_pos_embed(state_dict: dict[str, Tensor], model: PlainModel) -> dict[str, Tensor]:
    """Resamples the position table of ``state_dict``, in place, to the model's grid.

    A table that is not of the model's length is taken to be of a square grid.
    """
    table, own = state_dict.get("pos_embed"), model.pos_embed
    if table is not None and own is not None and table.shape[1] != own.shape[1]:
        tokens = len(cls_positions(model.cls_position, 1))
        side = math.isqrt(table.shape[1] - tokens)
        if side * side + tokens == table.shape[1]:
            grid = model.patch_embed.grid_size
            state_dict["pos_embed"] = resample_pos_embed(table, (side, side), grid, model.cls_position)
    return state_dict
