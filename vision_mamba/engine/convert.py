"""Official release files: which model of the zoo a file is of, and the same weights under our names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from vision_mamba import __version__
from vision_mamba.checkpoint import LoadReport, load_checkpoint
from vision_mamba.errors import UserError, nearest


def zoo_models() -> list[str]:
    """Names of the models that this package has registered with timm, without the tiny ones of its tests."""
    return [name for name in timm.list_models() if _is_ours(name) and not name.startswith("test_")]


def _is_ours(name: str) -> bool:
    return timm.is_model(name) and model_entrypoint(name).__module__.startswith("vision_mamba.models.")


def guess_model(state: Mapping[str, Tensor], file: str | Path) -> str:
    """The one model of the zoo whose tensors are those of an official file, by names and shapes.

    Where several models take the file, the one decides that has to make up the fewest values (a clip's model takes an
    image model's file, with new time positions), then the released files' names (VideoMamba's image models have
    Vim's tensors).

    Args:
        state: the file's weights, in official or in our names.
        file: its path.

    Raises:
        UserError: no model fits, or several do.
    """
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    reports = {name: report for name in zoo_models() if (report := _try(name, shapes)) is not None}
    fitting = [name for name, report in reports.items() if not report.problems() and not _resampled(name, shapes)]
    missing = {name: abs(_num_values(_on_meta(name).state_dict()) - _num_values(shapes)) for name in fitting}
    fitting = [name for name in fitting if missing[name] == min(missing.values())]
    released = [name for name in fitting if Path(file).name in _released_files(name)]
    if len(released) == 1 or len(fitting) == 1:
        return (released or fitting)[0]
    if fitting:
        raise UserError(f"{file} has the tensors of {', '.join(fitting)}; say which it is of with --model NAME")
    if not reports:
        raise UserError(
            f"{file} is not of a model of the zoo: {next(iter(state))}, its first tensor, has no place there"
        )
    near = min(reports, key=lambda name: len(_misfits(reports[name])))
    problem = _problems(reports[near]) or _resampled(near, shapes)
    raise UserError(
        f"{file} fits no model of the zoo; the nearest is {near}, with {problem}. "
        "Where the file is of another image size or has lost some tensors, name its model with --model"
    )


def convert(
    state: Mapping[str, Tensor], name: str, file: str | Path, *, img_size: Sequence[int] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An official file's weights in the names of one of our models.

    Args:
        state: the file's weights.
        name: of the model; its class count and number of bands follow the file.
        file: the file's path, for messages and for the record.
        img_size: side, or height and width, where the file's position table is not of the model's own size.

    Returns:
        All parameters and buffers of the model, and what a reader has to know to build it: ``model``,
        ``num_classes`` and ``input_size`` (JSON), with the ``source``'s name and our version.

    Raises:
        UserError: no such model; tensors that do not fit it, or too few of them.
    """
    if not _is_ours(name):
        raise UserError(f"unknown model {name!r}{nearest(name, zoo_models())}")
    size = {} if img_size is None else {"img_size": (img_size[0], img_size[-1])}
    try:
        probe = _on_meta(name, **size)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        raise UserError(f"{name} has no image size of its own; leave --img-size out") from None
    except ValueError as error:
        raise UserError(f"cannot make {name} for images of {img_size}: {error}") from None
    cfg = probe.pretrained_cfg
    try:
        converted = probe.filter_checkpoint(dict(state))
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{file} is not of {name}: {error}. Leave --model out to have its model looked for") from None
    head, first = converted.get(f"{cfg['classifier']}.weight"), converted.get(f"{cfg['first_conv']}.weight")
    num_classes = 0 if head is None else head.shape[0]
    in_chans = cfg["input_size"][0] if first is None else first.shape[1]
    if problem := _resampled(name, state, probe):
        raise UserError(f"{file}: {problem}. Give the file's image size with --img-size")

    model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **size)
    if problem := _problems(load_checkpoint(model, state, strict=False)):
        raise UserError(f"{file} is not of {name}: {problem}. Leave --model out to have its model looked for")
    whole = _num_values(model.state_dict())
    lacking = whole - _num_values(state)
    if lacking > 0:  # a filter has filled the rest, as it should before a training and not here
        raise UserError(
            f"{file} lacks {lacking:,} of {name}'s {whole:,} values. A file of a part is only a start for training: "
            "model.checkpoint in a recipe, or vision_mamba.load_checkpoint"
        )
    metadata = {
        "format": "pt",
        "model": name,
        "num_classes": str(num_classes),
        "input_size": json.dumps([in_chans, *size.get("img_size", cfg["input_size"][1:])]),
        "source": Path(file).name,
        "converter": f"vision_mamba {__version__}",
    }
    return {key: tensor.contiguous() for key, tensor in model.state_dict().items()}, metadata


@cache
def _on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def _try(name: str, shapes: dict[str, Tensor]) -> LoadReport | None:
    """How the tensors fit a model; None where none of them has a place there."""
    model = _on_meta(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a head with another class count
            report = load_checkpoint(model, shapes, strict=False)
    except (IndexError, KeyError, RuntimeError, ValueError):  # a filter that was handed another family's names
        return None
    return report if len(report.unexpected) < len(shapes) else None


def _num_values(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for name, tensor in state.items() if not name.endswith("num_batches_tracked"))


def _misfits(report: LoadReport) -> list[str]:
    return [*report.missing, *report.unexpected, *report.misshapen]


def _problems(report: LoadReport) -> str:
    """How many tensors do not fit, and the first of each kind."""
    kinds = {kind: getattr(report, kind) for kind in ("missing", "unexpected", "misshapen")}
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    )


def _resampled(name: str, state: Mapping[str, Tensor], model: nn.Module | None = None) -> str:
    """The position table that would be resampled to the model's image size, if there is one."""
    own = (model or _on_meta(name)).state_dict()
    for key, tensor in state.items():
        key = key.removeprefix("backbone.")
        if (
            "pos_emb" in key
            and key in own
            and own[key].shape != tensor.shape
            and own[key].shape[-1] == tensor.shape[-1]
        ):
            return (
                f"{key} {tuple(tensor.shape)} is of another image size than {name}'s, which has {tuple(own[key].shape)}"
            )
    return ""


def _released_files(name: str) -> set[str]:
    """The names of the weight files that timm would fetch for a model."""
    cfgs = filter(None, (get_pretrained_cfg(tagged) for tagged in timm.list_models(name, include_tags=True)))
    return {str(cfg.hf_hub_filename or str(cfg.url or "").rpartition("/")[2]).rpartition("/")[2] for cfg in cfgs} - {""}
