"""Finds objects in whole rasters of any size: boxes in map coordinates, COCO results in pixels, a picture.

    python tools/detect.py configs/detection/faster_rcnn_vmamba_tiny_aerial_cars.py best.pth scene.tif --out found
    python tools/detect.py CONFIG CHECKPOINT a.tif b.jpg --out found --window 1280 --overlap 320 --score 0.4
    torchrun --nproc-per-node 4 tools/detect.py CONFIG CHECKPOINT huge.tif --out found --resume

CONFIG is one of configs/detection or any config of mmdetection. Windows are seen at the scene's own scale; the overlap
should be larger than an object. A scene that another run began goes on with --resume. The exit status is 2 where a
scene failed.
"""

from __future__ import annotations

import argparse
from collections import Counter

from vision_mamba.engine.distributed import start_processes, stop_processes
from vision_mamba.engine.evaluate import choose_device
from vision_mamba.errors import run_main
from vision_mamba.geo import detect_raster, load_mmdet
from vision_mamba.geo.arguments import add_scene_arguments, check_scene_arguments, for_each_scene


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config of mmdetection")
    parser.add_argument("checkpoint", help="weights of the config's model")
    add_scene_arguments(parser, window=1024, batch_size=2)
    parser.add_argument("--score", type=float, default=0.3, help="leave out objects below (default: %(default)s)")
    parser.add_argument("--iou", type=float, default=0.5, help="of boxes that are one object (default: %(default)s)")
    args = parser.parse_args(argv)
    check_scene_arguments(args)

    _, amp = choose_device(args.device, args.amp)
    device, rank, world_size = start_processes(args.device)

    detector = load_mmdet(args.config, args.checkpoint, device=device, amp=amp, bands=args.bands)

    def run(scene: str) -> None:
        found = detect_raster(
            scene, args.out, detector, window=args.window, overlap=args.overlap, batch_size=args.batch_size,
            score=args.score, iou=args.iou, value_range=args.value_range, resume=args.resume,
            overwrite=args.overwrite, rank=rank, world_size=world_size,
        )  # fmt: skip
        if rank > 0:
            return
        counts = Counter(detector.classes[i] for i in found.labels.tolist())
        print(f"\n{scene}: {len(found.boxes)} objects; {found.windows} windows in {found.seconds:.0f} s")
        for name, count in counts.most_common():
            print(f"  {name}  {count}")
        for path in found.files:
            print(f"  wrote {path}")

    status = for_each_scene(args.scenes, world_size, run)
    stop_processes()
    return status


if __name__ == "__main__":
    run_main(main)
