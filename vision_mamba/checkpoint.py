"""Loading weights: our own checkpoints and the official ones, into any model of the zoo."""

from __future__ import annotations

import argparse
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn


@dataclass
class LoadReport:
    """What :func:`load_checkpoint` did; each list holds names of the model's (or the file's) tensors.

    ``unused`` are those of parts that a ``features_only`` model has given up: later stages, final norm, head.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def problems(self) -> str:
        """One line that names every missing, unexpected and misshapen key; empty if there are none."""
        parts = []
        for kind in ("missing", "unexpected", "misshapen"):
            names = getattr(self, kind)
            if names:
                parts.append(f"{len(names)} {kind}: {', '.join(names)}")
        return "; ".join(parts)


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike | Mapping[str, Any],
    strict: bool = True,
    *,
    use_ema: bool = False,
) -> LoadReport:
    """Load weights into ``model``, converting official names, sizes, bands and head.

    Position embeddings are resampled to the model's grid; the first convolution is adapted to the model's
    ``in_chans`` (summed or repeated as timm does); a head of another class count is left out, and the model
    keeps its own (a warning says so).

    Args:
        model: any model of the zoo, its ``features_only`` form, or any timm model whose names the file uses.
        checkpoint: a ``.safetensors`` file, a ``torch.save`` file (weights bare, or under ``"model"``,
            ``"state_dict"``, ``"model_ema"``, ``"state_dict_ema"``), or such a mapping.
        strict: missing, unexpected or misshapen tensors are an error; if False they are skipped and reported.
        use_ema: take the averaged weights where the file has them.

    Returns:
        What was missing, unexpected, misshapen (only without ``strict``), adapted and unused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint; or, with ``strict``, tensors that do not fit, each named.
    """
    source = "checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    loaded = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    state = find_state_dict(loaded, use_ema=use_ema, source=source)
    features_only = isinstance(model, FeatureGetterNet)
    if features_only:
        model = model.get_submodule("model")
    convert = getattr(model, "filter_checkpoint", None)
    if convert is not None:
        state = convert(state)

    own = model.state_dict()
    report = LoadReport()
    first_conv, classifier = _ends(model)
    accepted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in own:
            if features_only and _is_pruned(model, name):
                report.unused.append(name)
            elif _belongs(name, classifier) and getattr(model, "num_classes", None) == 0:
                report.adapted.append(name)
            else:
                report.unexpected.append(name)
        elif tensor.shape == own[name].shape:
            accepted[name] = tensor
        elif (
            name == f"{first_conv}.weight"
            and tensor.shape[2:] == own[name].shape[2:]
            and (tensor.shape[0] == own[name].shape[0] and tensor.shape[1] == 3)
        ):
            # timm's function knows kernels of two axes; a tubelet's has three.
            adapted = adapt_input_conv(own[name].shape[1], tensor.flatten(2, -2))
            accepted[name] = adapted.reshape(own[name].shape)
            report.adapted.append(name)
        elif _belongs(name, classifier) and tensor.shape[1:] == own[name].shape[1:]:
            report.adapted.append(name)
        else:
            report.misshapen.append(f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}")
    known = set(state)
    report.missing = [name for name in own if name not in known]
    if strict and report.problems():
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {report.problems()}. Is it of another model? "
            "strict=False loads what fits"
        )
    new_head = [name for name in report.adapted if _belongs(name, classifier) and name in own]
    if new_head:
        warnings.warn(
            f"{source}: the head has another class count; {', '.join(new_head)} keep the model's own values",
            stacklevel=2,
        )
    model.load_state_dict(accepted, strict=False)
    return report


def _ends(model: nn.Module) -> tuple[str | None, str | None]:
    """Names of the first convolution and of the classifier, which a new task may have changed.

    timm's configuration knows them; a model built by its class has none, and its classifier is ``head``.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    first = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    return cfg.get("first_conv", first), cfg.get("classifier", "head")


def _belongs(name: str, module: str | tuple[str, ...] | None) -> bool:
    modules = (module,) if isinstance(module, str) else module or ()
    return any(name.startswith(f"{m}.") for m in modules)


def _is_pruned(model: nn.Module, name: str) -> bool:
    """Whether a tensor is of a part that ``prune_intermediate_layers`` took away or made an identity."""
    if isinstance(getattr(model, name.split(".")[0], None), nn.Identity):  # a norm may have parts of its own
        return True
    module = model
    for part in name.split(".")[:-1]:
        child = getattr(module, part, None)
        if child is None:
            return isinstance(module, nn.ModuleList | nn.Sequential) and part.isdigit()
        module = child
    return isinstance(module, nn.Identity)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Contents of a checkpoint file, read without running code from it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, or holds objects that are not weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with official_globals():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    return dict(loaded)


def _nothing(owner: Any, name: str) -> None:
    """In place of ``getattr``, by which mmengine's logs refer to methods of theirs."""


@contextmanager
def official_globals() -> Iterator[None]:
    """While it is entered, ``weights_only`` loading accepts what official files hold beside their weights.

    Those are plain data: the run's argparse.Namespace (Vim), its yacs configuration (VMamba), and the logs of
    mmengine's runner with their numpy arrays. The classes of yacs and mmengine are not imported: an OrderedDict,
    which torch's unpickler knows how to fill, stands for them.

    Not torch's own ``safe_globals``: of two entries for one name, that takes one by chance, and mmengine's log class
    may be allowed already (by :mod:`vision_mamba.mm.compat`). What was allowed before is as before at the end.
    """
    data: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(t)) for t in "?bhilqBHILQefd")]
    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 2 moved them
        data += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    data.append((_nothing, "builtins.getattr"))
    data += [(OrderedDict, name) for name in ("yacs.config.CfgNode", "mmengine.logging.history_buffer.HistoryBuffer")]

    before = torch.serialization.get_safe_globals()
    ours = {_global_name(entry) for entry in data}
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*(entry for entry in before if _global_name(entry) not in ours), *data])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _global_name(entry: Any) -> str:
    """Under which name a pickle finds an allowed global."""
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def find_state_dict(
    loaded: Mapping[str, Any], *, use_ema: bool = False, source: str = "checkpoint"
) -> dict[str, Tensor]:
    """The weights in a checkpoint, without the prefixes that DDP and torch.compile add.

    Raises:
        ValueError: no weights in it.
    """
    averaged, plain = ("state_dict_ema", "model_ema"), ("state_dict", "model")
    for key in (*averaged, *plain) if use_ema else (*plain, *averaged):
        if isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    state = {str(name): tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError(f"{source} holds no weights (looked for {', '.join((*plain, *averaged))} and bare tensors)")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state
