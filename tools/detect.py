"""Finds objects in whole rasters of any size: boxes in map coordinates, COCO results in pixels, a picture.

    python tools/detect.py configs/detection/faster_rcnn_vmamba_tiny_aerial_cars.py best.pth scene.tif --out found
    python tools/detect.py CONFIG CHECKPOINT a.tif b.jpg --out found --window 1280 --overlap 320 --score 0.4

CONFIG is one of configs/detection or any config of mmdetection. Windows are seen at the scene's own scale; the overlap
should be larger than an object. The exit status is 2 where a scene failed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from vision_mamba.engine.evaluate import AMP_DTYPES, choose_device
from vision_mamba.errors import UserError, run_main


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config of mmdetection")
    parser.add_argument("checkpoint", help="weights of the config's model")
    parser.add_argument("scenes", nargs="+", help="rasters: GeoTIFF, COG, VRT, JPEG2000, PNG, JPEG")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--window", type=int, default=1024, help="pixels a side (default: %(default)s)")
    parser.add_argument("--overlap", type=int, help="pixels that neighbours share (default: a quarter of the window)")
    parser.add_argument("--batch-size", type=int, default=2, help="windows a forward pass (default: %(default)s)")
    parser.add_argument("--score", type=float, default=0.3, help="leave out objects below (default: %(default)s)")
    parser.add_argument("--iou", type=float, default=0.5, help="of boxes that are one object (default: %(default)s)")
    parser.add_argument("--bands", type=int, nargs="+", help="bands of the raster, from 1, in the model's order")
    parser.add_argument(
        "--value-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="for 8-bit models on other rasters"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--amp", choices=tuple(AMP_DTYPES), default="none", help="autocast type")
    args = parser.parse_args(argv)
    if args.window < 1 or args.batch_size < 1:
        raise UserError("--window and --batch-size must be at least 1")
    if args.overlap is not None and not 0 <= args.overlap < args.window:
        raise UserError(f"--overlap {args.overlap} must be 0 or more, and below the window ({args.window})")
    missing = [scene for scene in args.scenes if "://" not in scene and not Path(scene).exists()]
    if missing:
        raise UserError(f"no raster {missing[0]}")

    device, amp = choose_device(args.device, args.amp)
    from vision_mamba.geo import detect_raster, load_mmdet

    detector = load_mmdet(args.config, args.checkpoint, device=device, amp=amp, bands=args.bands)
    failed = 0
    for scene in args.scenes:
        try:
            found = detect_raster(
                scene, args.out, detector, window=args.window, overlap=args.overlap, batch_size=args.batch_size,
                score=args.score, iou=args.iou, value_range=args.value_range, overwrite=args.overwrite,
            )  # fmt: skip
        except UserError as error:
            if len(args.scenes) == 1:
                raise
            print(f"failed: {error}", file=sys.stderr)
            failed += 1
            continue
        counts = Counter(detector.classes[i] for i in found.labels.tolist())
        print(f"\n{scene}: {len(found.boxes)} objects in {found.seconds:.0f} s")
        for name, count in counts.most_common():
            print(f"  {name}  {count}")
        for path in found.files:
            print(f"  wrote {path}")
    return 2 if failed else 0


if __name__ == "__main__":
    run_main(main)
