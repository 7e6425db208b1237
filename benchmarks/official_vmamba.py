"""The official VMamba on a CPU, from a checkout of github.com/MzeroMiko/VMamba, to measure and to compare with.

Nothing of it is copied here: its module is imported from the checkout as it is. Without its CUDA extensions it
takes its own pure-PyTorch scan; replaced are only what it imports for counting operations, and two functions that
select a CUDA device before they choose their own code for a CPU. Needs einops.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from pathlib import Path

import timm.layers
from torch import nn


def load(checkout: Path) -> types.ModuleType:
    """The official ``classification/models/vmamba.py``."""
    folder = checkout / "classification" / "models"
    if not (folder / "vmamba.py").is_file():
        raise SystemExit(f"{checkout} is no checkout of MzeroMiko/VMamba: it has no classification/models/vmamba.py")
    sys.path.insert(0, str(folder))
    sys.modules.setdefault("timm.models.layers", timm.layers)  # its place in older versions of timm
    names = ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count")
    fvcore, counting = types.ModuleType("fvcore"), types.ModuleType("fvcore.nn")
    counting.__dict__.update(dict.fromkeys(names))
    sys.modules.update({"fvcore": fvcore, "fvcore.nn": counting})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its CUDA extensions are missing
        official, crossing = importlib.import_module("vmamba"), importlib.import_module("csm_triton")

    def cross_scan(x, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0, force_torch=False):
        return crossing.CrossScanF.apply(x, in_channel_first, out_channel_first, one_by_one, scans)

    def cross_merge(y, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0, force_torch=False):
        return crossing.CrossMergeF.apply(y, in_channel_first, out_channel_first, one_by_one, scans)

    official.cross_scan_fn, official.cross_merge_fn = cross_scan, cross_merge
    return official


def vmamba_tiny(checkout: Path, size: int) -> nn.Module:
    """What the official factory vmamba_tiny_s1l8 makes; it takes images of any size."""
    return load(checkout).vmamba_tiny_s1l8()
