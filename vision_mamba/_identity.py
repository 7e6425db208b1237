"""Guards against the unrelated distribution ``vision-mamba``, which installs the same import name."""

from __future__ import annotations

import sys
from importlib import metadata

_REMEDY = (
    "the unrelated distribution 'vision-mamba' writes into the same folder as 'vision-mamba-zoo'; "
    "run: pip uninstall vision-mamba vision-mamba-zoo, then install vision-mamba-zoo again"
)


def check_installed() -> None:
    """Raises ImportError if the other distribution is installed beside ours."""
    try:
        metadata.distribution("vision-mamba")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(_REMEDY)


def check_not_shadowed() -> None:
    """Raises ImportError if the other package's ``__init__`` ran in place of ours; ours names its distribution."""
    if getattr(sys.modules[__package__], "DISTRIBUTION", None) != "vision-mamba-zoo":
        raise ImportError(_REMEDY)
