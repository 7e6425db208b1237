"""What every family needs to become a timm model: weights of the official layout, and checked options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from timm.models._builder import build_model_with_cfg
from timm.models._features_fx import register_notrace_module
from timm.models._registry import get_pretrained_cfg
from torch import Tensor, nn

from ..checkpoint import official_globals
from ..layers import LayerNorm, RMSNorm

# torch.fx takes them whole: they look at dtypes, which have no values while it traces.
register_notrace_module(LayerNorm)
register_notrace_module(RMSNorm)

Model = TypeVar("Model", bound=nn.Module)

#: Parameters of mamba_ssm's mixer (transformers' has the same names) -> those of ours.
OFFICIAL_MIXER = {
    "A_log": "A_log",
    "D": "D",
    "conv1d.weight": "conv_weight",
    "conv1d.bias": "conv_bias",
    "x_proj.weight": "x_proj_weight",
    "dt_proj.weight": "dt_proj_weight",
    "dt_proj.bias": "dt_proj_bias",
}


def build_model(
    model_cls: type[Model],
    variant: str,
    pretrained: bool,
    *,
    filter_fn: Callable[[dict[str, Tensor], Any], dict[str, Tensor]],
    levels: int | tuple[int, ...],
    **kwargs: Any,
) -> Model:
    """timm's builder, for official weight files and with a message that helps without a network.

    Args:
        filter_fn: (state dict, model) -> state dict in the model's names.
        levels: ``out_indices`` of ``features_only`` where the user gives none.

    Raises:
        RuntimeError: ``pretrained``, and the weights cannot be fetched.
    """
    out_indices = kwargs.pop("out_indices", levels)
    with official_globals():
        try:
            return build_model_with_cfg(
                model_cls,
                variant,
                pretrained,
                pretrained_filter_fn=filter_fn,
                feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
                **kwargs,
            )
        except OSError as error:
            tag = kwargs.get("pretrained_cfg")
            cfg = get_pretrained_cfg(f"{variant}.{tag}" if isinstance(tag, str) else variant)
            assert cfg is not None
            if cfg.url:
                place, _, file = str(cfg.url).rpartition("/")
            else:
                place, file = f"{cfg.hf_hub_id} on the Hugging Face hub", str(cfg.hf_hub_filename)
            raise RuntimeError(
                f"could not fetch the weights of {variant} ({file} of {place}). "
                "Without a network, copy that file here and call vision_mamba.load_checkpoint(model, 'FILE')"
            ) from error


def find_backbone(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors of a detector or segmentor (mm-series names), or all of any other file."""
    prefix = "backbone."
    found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    return found or state_dict


def with_batch_counters(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adds BatchNorm's counters of batches, which files of other tools may lack and nothing here uses."""
    counters = {name: buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
    return {**counters, **state_dict}


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: names the argument and what it may be.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}")
