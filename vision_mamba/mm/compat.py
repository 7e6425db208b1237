"""What the mm-series (mmengine 0.10, mmcv-lite 2.1, mmsegmentation 1.2, mmdet 3.3: unmaintained) lacks on current
PyTorch, numpy and setuptools. No installed file is changed, and each adapter stands aside where it is not needed: with
full mmcv, or with the maintained forks onedl-*.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

from ..errors import UserError

_EXT = "mmcv._ext"
_FULL_MMCV = (
    "full mmcv brings it, and its compiled operators are then used instead of ours: "
    "pip uninstall -y mmcv-lite && pip install --no-build-isolation --no-binary mmcv 'mmcv>=2.1,<2.2' "
    "(compiles for half an hour; CUDA toolkit needed), or the fork: pip install onedl-mmcv"
)


class MissingExtraError(UserError, ImportError):
    """A package of the extra ``mm`` is not installed."""


def install() -> None:
    """Puts all adapters in place.

    Raises:
        MissingExtraError: a package of the extra ``mm`` is missing.
    """
    for package, distribution in (("mmengine", "mmengine"), ("mmcv", "mmcv-lite")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"segmentation and detection need {package}: pip install 'vision-mamba-zoo[mm]' (or {distribution})"
            )
    if not any(isinstance(finder, _ExtFinder) for finder in sys.meta_path):
        # Last: found only where no compiled module is. One that is there and fails to load is its user's to mend.
        sys.meta_path.append(_ExtFinder())
    _mend_package_utils()
    _allow_checkpoint_types()


class _ExtFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Supplies ``mmcv._ext`` from :mod:`vision_mamba.mm.ops`."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == _EXT else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        from . import ops

        module.__doc__ = "mmcv's operators on torchvision, supplied by vision_mamba.mm in place of the compiled ones."
        supplied = {
            name: function
            for name, function in inspect.getmembers(ops, inspect.isfunction)
            if not name.startswith("_") and function.__module__ == ops.__name__
        }
        module.__dict__.update(supplied)

        def missing(name: str) -> Callable[..., Any]:
            # mmcv asks for all names when it is imported; only a call is an error.
            if name.startswith("__"):
                raise AttributeError(name)

            def call(*args: Any, **kwargs: Any) -> Any:
                raise NotImplementedError(
                    f"mmcv's compiled operator {name!r} is not installed, and vision_mamba.mm has no counterpart of "
                    f"it (it has {', '.join(sorted(supplied))}); {_FULL_MMCV}"
                )

            call.__name__ = name
            return call

        module.__getattr__ = missing  # type: ignore[method-assign]


def _mend_package_utils() -> None:
    """Lets mmengine find the configs inside mmseg and mmdet (``mmseg::_base_/...``).

    mmengine 0.10 asks pkg_resources what is installed, which setuptools 82 removed. onedl-mmengine asks for the
    distribution ``mmsegmentation``, where its own is called onedl-mmsegmentation.
    """
    from mmengine.utils import package_utils

    try:
        if package_utils.is_installed("mmsegmentation") or importlib.util.find_spec("mmseg") is None:
            return
    except ImportError as error:
        if error.name != "pkg_resources":
            raise

    for ours in (is_installed, get_installed_path):
        theirs = getattr(package_utils, ours.__name__)
        # Other modules of mmengine hold the function under the same name.
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "mmengine" and vars(module).get(ours.__name__) is theirs:
                setattr(module, ours.__name__, ours)


def is_installed(package: str) -> bool:
    """Whether ``package`` is a distribution, its fork onedl-``package`` is, or it is a module that is no namespace."""
    if _distribution(package) is not None:
        return True
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def get_installed_path(package: str) -> str:
    """Folder of the module that ``package`` (a module's or a distribution's name) installs.

    Raises:
        ModuleNotFoundError: there is none.
    """
    distribution = _distribution(package)
    top_level = (distribution.read_text("top_level.txt") or "") if distribution else ""
    for name in (package, *top_level.split()):
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent)
    raise ModuleNotFoundError(f"{package} is not installed", name=package)


def _distribution(package: str) -> importlib.metadata.Distribution | None:
    for name in (package, f"onedl-{package}"):
        try:
            return importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _allow_checkpoint_types() -> None:
    """Lets ``torch.load`` with ``weights_only=True``, its default since 2.6, read mmengine's checkpoints.

    They hold the log history: HistoryBuffer objects around numpy arrays, and numpy scalars. All are plain data, but for
    references to HistoryBuffer's statistics, which the file makes with ``getattr``: what stands in for that gives those
    and nothing else.
    """
    import numpy as np
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer

    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray

    statistics = ("min", "max", "current", "mean")

    def statistics_method(owner: Any, name: str) -> Any:
        if owner is not HistoryBuffer or name not in statistics:
            raise UnpicklingError(f"getattr({owner!r}, {name!r}) is not an allowed part of a checkpoint")
        return getattr(HistoryBuffer, name)

    # torch's safe_globals, a context, takes away at its end what it was given, even if that was allowed before it. So
    # these entries are made unequal to any that others may give: names are written out, functions wrapped.
    kinds = (np.float64, np.float32, np.int64, np.int32, np.bool_)
    types = [HistoryBuffer, np.ndarray, np.dtype, *kinds, *{type(np.dtype(kind)) for kind in kinds}]
    allowed: list[Any] = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in types]
    allowed.append((statistics_method, "builtins.getattr"))
    # Pickles name these functions by the module that numpy 1 or numpy 2 kept them in.
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        allowed += [(partial(getattr(multiarray, name)), f"{module}.{name}") for name in ("_reconstruct", "scalar")]
    torch.serialization.add_safe_globals(allowed)
