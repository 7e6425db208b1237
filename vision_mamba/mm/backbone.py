"""Any model of the zoo as a backbone of mmsegmentation and mmdetection."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from .. import load_checkpoint
from ..engine.graphs import TrainingGraphs
from ..errors import nearest
from ..layers import OverlapPatchEmbed
from ..models._recompute import Recompute

# Arguments that only some families have, with what this wrapper wants of those.
_IF_SUPPORTED = ("dynamic_img_size", "feature_norms")


@MODELS.register_module()
class VisionMambaBackbone(BaseModule):
    """Feature maps (batch, channels, rows, columns) of a timm model, one for each of ``out_indices``.

    Registered in mmengine's root registry, which mmseg and mmdet both look into. Images whose sides are no multiples
    of a plain model's patch are padded with zeros at the bottom and right.

    VMamba gives maps at strides 4, 8, 16 and 32, each through a norm of its own (``outnorm{i}`` of the official
    detection and segmentation backbones). Vim gives maps of one stride; :class:`SimpleFeaturePyramid`, or mmseg's
    ``Feature2Pyramid``, makes a pyramid of them.

    Args:
        model_name: a timm name of this package, for example ``"vmamba_tiny_s1l8"``; other timm models with
            ``features_only`` work too.
        out_indices: stages (or blocks, of a plain model), counted from 0; negative ones from the end. The model's own
            choice if None.
        pretrained: fetch the published ImageNet weights; or the path of a weights file, as with ``init_cfg``.
        img_size: side, or (height, width), that a position embedding is laid out for; other sizes work, resampled at
            every call. None for the model's own. Only for models with a position embedding.
        drop_path_rate: stochastic depth of the last block.
        frozen_stages: -1 trains everything; 0 fixes the stem (patch and position embedding), i also the first i stages
            (or blocks). Fixed parts stay in evaluation mode.
        with_cp: recompute blocks in the backward pass: less memory, more time. ``"selective"``: all but their scans.
        cuda_graphs: on a GPU, replay training passes as CUDA graphs instead of launching their kernels from Python,
            which small batches wait for. The first batch of every size costs about a second; the memory that the
            largest size needs is kept. Sizes beyond the first 64 run eagerly, with a warning. With
            ``with_cp`` only without ``drop_path_rate``; drop rates are fixed with the first pass. More in
            :class:`vision_mamba.engine.graphs.TrainingGraphs`.
        in_channels: image channels.
        init_cfg: ``dict(type="Pretrained", checkpoint="FILE")`` loads official or own weights, also from files of whole
            detectors and segmentors, as :func:`vision_mamba.load_checkpoint` does; no other type.
        **model_args: further arguments of ``timm.create_model``.

    Raises:
        ValueError: an unknown name (near ones are shown), an argument that the model does not take, an index beyond
            its stages, or ``cuda_graphs`` with what it does not go with.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        *,
        pretrained: bool | str = False,
        img_size: int | tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: Recompute = False,
        cuda_graphs: bool = False,
        in_channels: int = 3,
        init_cfg: dict[str, Any] | None = None,
        **model_args: Any,
    ) -> None:
        if isinstance(pretrained, str):
            if init_cfg is not None:
                raise ValueError("give the weights file as pretrained or as init_cfg, not as both")
            init_cfg = dict(type="Pretrained", checkpoint=pretrained)
        if cuda_graphs and with_cp and drop_path_rate:
            raise ValueError(
                "cuda_graphs with with_cp cannot drop the same paths again when it recomputes: set drop_path_rate=0, "
                "or unset one of the two"
            )
        if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or "checkpoint" not in init_cfg):
            raise ValueError(f"init_cfg={init_cfg}: only dict(type='Pretrained', checkpoint='FILE') is supported")
        super().__init__(init_cfg)
        self.model_name = model_name
        args = dict(model_args, in_chans=in_channels, drop_path_rate=drop_path_rate)
        if img_size is not None:
            args["img_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
        if out_indices is not None:
            args["out_indices"] = tuple(out_indices)
        self.net = _create_features(model_name, pretrained is True, args)
        info = self.net.feature_info
        self.out_channels: list[int] = list(info.channels())
        self.strides: list[int] = list(info.reduction())
        self.frozen_stages = frozen_stages
        self._register_load_state_dict_pre_hook(self._take_official_names)
        if with_cp:
            self.model.set_grad_checkpointing(with_cp)
        self._freeze()
        self._graphs = TrainingGraphs() if cuda_graphs else None

    @property
    def model(self) -> nn.Module:
        """The timm model, without head and without stages that no output needs."""
        return getattr(self.net, "model", self.net)

    def init_weights(self) -> None:
        """Loads the file of ``init_cfg``; mmengine calls this once when training starts.

        Raises:
            FileNotFoundError: no such file.
            ValueError: tensors that do not fit. Norms of outputs may be missing (ImageNet files have none).
        """
        if self.init_cfg is None or self._is_init:
            return
        checkpoint = self.init_cfg["checkpoint"]
        report = load_checkpoint(self.net, checkpoint, strict=False)
        report.missing = [name for name in report.missing if not name.startswith("feature_norms.")]
        if report.problems():
            raise ValueError(
                f"init_cfg checkpoint {checkpoint} does not fit the backbone {self.model_name}: {report.problems()}"
            )
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (batch, in_channels, height, width) -> maps (batch, ``out_channels[i]``, rows, columns).

        Rows and columns are ``ceil(size / strides[i])``; with overlapping patches and no padding of the model's own, as
        many as patches tile.
        """
        x = self._pad(x)
        if self._graphs is None or not self.training:
            return self._maps(x)
        return self._graphs(self.net, self._maps, x)

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter (by its name in ``self.model``): 0 stem, then blocks; norms of outputs last."""
        return _depths(self.model, coarse=False)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of ``self.model`` that are not to decay."""
        return set(getattr(self.model, "no_weight_decay", set)())

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.net(x)
        if str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC"):
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return tuple(maps)

    def _pad(self, x: Tensor) -> Tensor:
        """The least padding with which the patches of a plain model tile the image."""
        embed = getattr(self.model, "patch_embed", None)
        if not isinstance(embed, OverlapPatchEmbed) or embed.corner_pad:
            return x
        sides = (max(side, embed.patch_size) for side in (x.shape[-1], x.shape[-2]))
        width, height = (side + (embed.patch_size - side) % embed.stride for side in sides)
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

    def _take_official_names(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Lets whole detectors and segmentors of the official repositories load: their ``backbone.*`` become ours."""
        official = {
            name: state_dict.pop(name)
            for name in list(state_dict)
            if name.startswith(prefix) and not name.startswith(f"{prefix}net.")
        }
        convert = getattr(self.model, "filter_checkpoint", None)
        own = f"{prefix}net.model." if self.model is not self.net else f"{prefix}net."
        if official and convert is not None:
            official = {
                own + name: t for name, t in convert({n[len(prefix) :]: t for n, t in official.items()}).items()
            }
        state_dict.update(official)

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        depths = _depths(self.model, coarse=True)
        blocks = max(depth for name, depth in depths.items() if not name.startswith("feature_norms."))
        if self.frozen_stages > blocks:
            raise ValueError(f"frozen_stages={self.frozen_stages}: {self.model_name} has {blocks} stages here")
        for name, parameter in self.model.named_parameters():
            if depths[name] <= self.frozen_stages:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> VisionMambaBackbone:
        super().train(mode)
        if mode and self.frozen_stages >= 0:
            for module in self.model.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self


def _create_features(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise ValueError(
            f"unknown backbone model_name {name!r}{hint}; timm.list_models('*mamba*') and timm.list_models('vim*') "
            "list names"
        )
    wanted = dict(args)
    for argument in _IF_SUPPORTED:
        wanted.setdefault(argument, True if argument == "dynamic_img_size" else _stages(args))
    while True:
        try:
            return timm.create_model(name, pretrained=pretrained, features_only=True, **wanted)
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused is None:
                raise
            if refused[1] not in _IF_SUPPORTED or refused[1] in args:
                raise ValueError(
                    f"{name} has no argument {refused[1]!r}; leave it out of the backbone's config"
                ) from error
            del wanted[refused[1]]
        except (AssertionError, IndexError) as error:  # what timm raises for an index beyond the last stage
            raise ValueError(
                f"{name}: out_indices={args.get('out_indices')} is not within its stages: {error}"
            ) from error


def _stages(args: dict[str, Any]) -> tuple[int, ...]:
    """The chosen stages, counted from 0, of a family whose models all have four."""
    return tuple(i % 4 for i in args.get("out_indices", range(4)) if -4 <= i < 4)


def _depths(model: nn.Module, *, coarse: bool) -> dict[str, int]:
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"{type(model).__name__} has no group_matcher: no frozen_stages and no layer decay with it")
    return group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
