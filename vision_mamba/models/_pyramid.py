"""What backbones with four levels share: stages over channels-last maps, timm's contract, features at every stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerScale, Mlp, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..layers import LayerNorm, add_layer_norm, apply_linear
from ..layers.mamba import with_cast_linears
from ._builder import check_choice
from ._recompute import Recompute, checked, recomputed


class Stage(nn.Module):
    """Downsampling (an identity in the first stage), blocks, and a norm where the family has one.

    The downsampling belongs to the stage that it leads to, so a stage's output is its level of the pyramid.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing: Recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last map -> channels-last map."""
        return self.norm(self.run_blocks(self.downsample(x)))

    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run_block(block, x)
        return x

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        return recomputed(self.grad_checkpointing, block, *args)


class BlockMlp(Mlp):
    """timm's, whose weights :func:`timm.utils.reparameterize_model` has cast once."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return apply_linear(self.act(apply_linear(x, self.fc1)), self.fc2)

    def fuse(self) -> nn.Module:
        return with_cast_linears(self, "fc1", "fc2")


@register_notrace_module  # torch.fx takes it whole: it looks at sizes, which have no values while it traces
class ResidualBlock(nn.Module):
    """``x + mixer(norm1(x))``, then ``x + mlp(norm2(x))`` where ``mlp_ratio`` is above 0, channels-last.

    The last sum is left to whoever comes next, who adds and normalises in one pass over memory.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None = None,
        mlp_layer: Callable[..., nn.Module] = BlockMlp,
        **dd,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module | None:  # no identity: a file's scales would be taken for parts that were pruned
            return None if layer_scale is None else LayerScale(dim, layer_scale, **dd)

        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = mixer
        self.scale1 = scale()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if mlp_ratio > 0:
            self.norm2 = LayerNorm(dim, **dd)
            self.mlp: nn.Module | None = mlp_layer(dim, int(dim * mlp_ratio), **dd)
            self.scale2 = scale()
        else:
            self.mlp = None

    def mix(self, x: Tensor) -> Tensor:
        """What the mixer makes of a normalised map."""
        return self.mixer(x)

    def forward(self, x: Tensor, pending: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residual stream and what is still to be added to it -> the same."""
        if pending is None:
            normed = self.norm1(x)
        else:
            normed, x = add_layer_norm(pending, x, self.norm1)
        pending = self.mix(normed)
        pending = self.drop_path(pending if self.scale1 is None else self.scale1(pending))
        if self.mlp is not None:
            normed, x = add_layer_norm(pending, x, self.norm2)
            pending = self.mlp(normed)
            pending = self.drop_path(pending if self.scale2 is None else self.scale2(pending))
        return x, pending


class ResidualStage(Stage):
    """Of :class:`ResidualBlock`, which leave their last sum to the next one."""

    def run_blocks(self, x: Tensor) -> Tensor:
        pending = None
        for block in self.blocks:
            x, pending = self.run_block(block, x, pending)
        return x if pending is None else x + pending


def init_linear(model: nn.Module) -> None:
    """Linear layers of the published pyramids: a normal distribution cut at two deviations of 0.02, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def make_feature_norms(stages: Sequence[int], dims: Sequence[int], **dd) -> nn.ModuleDict:
    """Norms for the levels of chosen stages, which :meth:`PyramidModel.level` applies.

    Raises:
        ValueError: an unknown stage.
    """
    if not set(stages) <= set(range(len(dims))):
        raise ValueError(f"feature_norms={tuple(stages)}: stages are 0 to {len(dims) - 1}")
    return nn.ModuleDict({str(i): nn.LayerNorm(dims[i], **dd) for i in sorted(set(stages))})


class PyramidModel(nn.Module):
    """A timm model made of ``stem``, ``stages`` (:class:`Stage`), ``norm`` and ``head``, for images of any size.

    A family's constructor makes these four, ``feature_info``, ``in_chans``, ``num_classes`` and ``num_features``;
    ``feature_norms`` (:func:`make_feature_norms`) where levels may have norms of their own.
    """

    output_fmt = "NHWC"
    stem: nn.Module
    stages: nn.ModuleList
    norm: nn.Module
    head: ClassifierHead
    num_features: int
    feature_info: list[dict[str, Any]]

    @property
    def head_hidden_size(self) -> int:
        """Channels that enter the classifier: ``"catavgmax"`` gives it two for one."""
        return self.head.in_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no matrices, though some have two axes (one row a path)."""
        special = ("A_log", "D", "dt_proj_bias", "conv_bias")
        return {n for n, _ in self.named_parameters() if n.rsplit(".", 1)[-1] in special}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return dict(stem=r"^stem", blocks=r"^stages\.(\d+)")
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        """Recompute blocks in the backward pass; ``"selective"``: all of them but their scans."""
        for stage in self.stages:
            stage.grad_checkpointing = checked(enable)  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New head for ``num_classes`` (0 for none), and a new pooling if given."""
        self.num_classes = num_classes
        self.head.in_features = self.num_features  # of the last stage that pruning left
        self.head.reset(num_classes, global_pool)
        weight = next(self.parameters())  # a head without weights knows neither device nor type
        self.head.to(device=weight.device, dtype=weight.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> normalised last map (batch, rows, columns, channels)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map -> (batch, num_classes), or what enters the classifier with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def level(self, index: int, x: Tensor) -> Tensor:
        """What is given out of a stage's map as its level."""
        norms = getattr(self, "feature_norms", {})
        return norms[str(index)](x) if str(index) in norms else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Last map and the levels of chosen stages.

        Args:
            x: (batch, in_chans, height, width).
            indices: stages, or how many of the last; None for all.
            norm: apply the final norm to the last stage's map.
            stop_early: leave out the stages after the last one asked for, and the norm with them.
            output_fmt: ``"NCHW"`` (batch, channels, rows, columns) or ``"NHWC"``.
            intermediates_only: return the list of maps alone.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                taken = self.level(i, self.norm(x) if norm and i == len(self.stages) - 1 else x)
                intermediates.append(taken.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else taken)
        if intermediates_only:
            return intermediates
        # The norm is of the last stage's width.
        return (x if stop_early and last < len(self.stages) - 1 else self.norm(x)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop stages, norm and head that the chosen intermediates do not need."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        # Norm and head are of the last stage's width.
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take
