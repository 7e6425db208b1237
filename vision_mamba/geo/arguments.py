"""What the tools for whole scenes ask for alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vision_mamba.engine.evaluate import AMP_DTYPES
from vision_mamba.errors import UserError


def add_scene_arguments(parser: argparse.ArgumentParser, *, window: int, batch_size: int) -> None:
    """Scenes, results, windows, bands and device."""
    parser.add_argument("scenes", nargs="+", help="rasters: GeoTIFF, COG, VRT, JPEG2000, PNG, JPEG")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--window", type=int, default=window, help="pixels a side (default: %(default)s)")
    parser.add_argument("--overlap", type=int, help="pixels that neighbours share (default: a quarter of the window)")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help="windows a forward pass (default: %(default)s)"
    )
    parser.add_argument("--bands", type=int, nargs="+", help="bands of the raster, from 1, in the model's order")
    parser.add_argument(
        "--value-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="for 8-bit models on other rasters"
    )
    parser.add_argument("--resume", action="store_true", help="go on with interrupted scenes")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--amp", choices=tuple(AMP_DTYPES), default="none", help="autocast type")


def check_scene_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: windows that are no windows, or a scene that does not exist.
    """
    if args.window < 1 or args.batch_size < 1:
        raise UserError("--window and --batch-size must be at least 1")
    if args.overlap is not None and not 0 <= args.overlap < args.window:
        raise UserError(f"--overlap {args.overlap} must be 0 or more, and below the window ({args.window})")
    missing = [scene for scene in args.scenes if "://" not in scene and not Path(scene).exists()]
    if missing:
        raise UserError(f"no raster {missing[0]}")


def for_each_scene(scenes: Sequence[str], world_size: int, run: Callable[[str], None]) -> int:
    """Runs a scene after the other. One that fails is named and the others go on, but where several processes wait for
    each other, or it is the only one.

    Returns:
        The tool's exit status: 2 where a scene failed, else 0.
    """
    status = 0
    for scene in scenes:
        try:
            run(scene)
        except UserError as error:
            if world_size > 1 or len(scenes) == 1:
                raise
            print(f"failed: {error}", file=sys.stderr)
            status = 2
    return status
