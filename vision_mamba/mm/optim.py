"""Parameter groups by depth for mmengine's optimisers."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from .backbone import VisionMambaBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VisionMambaOptimConstructor(DefaultOptimWrapperConstructor):
    """Learning rate by depth and weight decay by kind for the backbone; mmengine's own rules for all else.

    A backbone of L blocks is trained with ``lr * layer_decay ** (L + 1 - i)`` in block i and ``i = 0`` in the stem
    (Bao et al. 2021, BEiT, arXiv 2106.08254); neck, heads and norms of outputs with ``lr``. Vectors (biases, norms) and
    what the model names in ``no_weight_decay`` do not decay.

    ``paramwise_cfg`` takes ``layer_decay`` (1.0, none, if left out) beside mmengine's keys, which do not reach the
    backbone:

        optim_wrapper = dict(
            constructor="VisionMambaOptimConstructor",
            paramwise_cfg=dict(layer_decay=0.92, norm_decay_mult=0.0),
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
        )
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        # mmengine asks for groups only where the mapping is not empty.
        super().__init__(optim_wrapper_cfg, {"layer_decay": 1.0, **(paramwise_cfg or {})})
        decay = self.paramwise_cfg["layer_decay"]
        if not 0 < decay <= 1:
            raise ValueError(f"paramwise_cfg layer_decay={decay} must be above 0 and at most 1")

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        if isinstance(module, VisionMambaBackbone):
            params.extend(self._backbone_groups(module))
        else:
            super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)

    def _backbone_groups(self, backbone: VisionMambaBackbone) -> list[dict[str, Any]]:
        decay = self.paramwise_cfg["layer_decay"]
        fixed = backbone.no_weight_decay()
        depths = backbone.layer_ids() if decay < 1 else {}
        new = "feature_norms."  # norms of outputs: not of the pretrained model
        top = max((depth for name, depth in depths.items() if not name.startswith(new)), default=0) + 1
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in backbone.model.named_parameters():
            if not parameter.requires_grad:
                continue
            depth = top if name.startswith(new) else depths.get(name, top)
            decays = parameter.ndim > 1 and name not in fixed
            group = groups.setdefault((depth, decays), {"params": [], "lr": self.base_lr * decay ** (top - depth)})
            if self.base_wd is not None:
                group["weight_decay"] = self.base_wd if decays else 0.0
            group["params"].append(parameter)
        return list(groups.values())
