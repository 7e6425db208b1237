"""Segments whole rasters of any size: a georeferenced class map, confidence, outlines, areas and a picture.

    python tools/segment.py configs/segmentation/vmamba_tiny_loveda.py best.pth scene.tif --out maps
    python tools/segment.py CONFIG CHECKPOINT a.tif b.vrt c.jp2 --out maps --window 1024 --polygons gpkg --tta flips
    torchrun --nproc-per-node 4 tools/segment.py CONFIG CHECKPOINT huge.tif --out maps --resume
    python tools/segment.py model.pt2 - scene.tif --classes field forest water --mean 123.7 116.3 103.5 --std 58 57 57

CONFIG is one of configs/segmentation or any config of mmsegmentation; or a model in one file (.pt2, .onnx), with - for
the checkpoint. A scene that another run began goes on with --resume. The exit status is 2 where a scene failed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vision_mamba.engine.distributed import start_processes, stop_processes
from vision_mamba.engine.evaluate import choose_device
from vision_mamba.errors import UserError, run_main
from vision_mamba.geo import load_exported, load_mmseg, segment_raster
from vision_mamba.geo.arguments import add_scene_arguments, check_scene_arguments, for_each_scene


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config of mmsegmentation, or an exported model (.pt2, .onnx)")
    parser.add_argument("checkpoint", help="weights of the config's model; - for an exported model")
    add_scene_arguments(parser, window=512, batch_size=4)
    parser.add_argument("--blend", choices=("cosine", "gaussian"), default="cosine")
    parser.add_argument("--tta", choices=("none", "flips", "turns"), default="none", help="1, 4 or 8 views averaged")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="of the windows, averaged")
    parser.add_argument("--probabilities", action="store_true", help="write those of all classes")
    parser.add_argument("--polygons", choices=("gpkg", "geojson"), help="write outlines")
    parser.add_argument(
        "--simplify", type=float, default=1.0, metavar="PIXELS", help="of outlines (default: %(default)s)"
    )
    parser.add_argument("--min-area", type=float, default=0.0, metavar="M2", help="smallest outline, square metres")
    parser.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction,
        help="replay the model's passes as a CUDA graph (default: where the model can be captured)",
    )  # fmt: skip
    exported = parser.add_argument_group("exported models only, where the file does not say it")
    exported.add_argument("--classes", nargs="+", help="names in the order of the scores")
    exported.add_argument("--mean", type=float, nargs="+", help="a value a band")
    exported.add_argument("--std", type=float, nargs="+", help="a value a band")
    args = parser.parse_args(argv)
    check_scene_arguments(args)
    exported_file = Path(args.config).suffix in (".pt2", ".onnx")
    if exported_file and args.checkpoint != "-":
        raise UserError(f"{args.config} has weights of its own; give - for the checkpoint, not {args.checkpoint}")

    _, amp = choose_device(args.device, args.amp)
    device, rank, world_size = start_processes(args.device)

    if exported_file:
        segmentor = load_exported(
            args.config, args.classes, args.mean, args.std, device=device, amp=amp, bands=args.bands
        )
    else:
        segmentor = load_mmseg(args.config, args.checkpoint, device=device, amp=amp, bands=args.bands)

    def run(scene: str) -> None:
        report = segment_raster(
            scene, args.out, segmentor, window=args.window, overlap=args.overlap, batch_size=args.batch_size,
            blend=args.blend, tta=args.tta, scales=args.scales, value_range=args.value_range,
            probabilities=args.probabilities, polygons=args.polygons, simplify=args.simplify,
            min_area=args.min_area, resume=args.resume, overwrite=args.overwrite, rank=rank, world_size=world_size,
            cuda_graphs=args.cuda_graphs,
        )  # fmt: skip
        if rank == 0:
            print_report(scene, report)

    status = for_each_scene(args.scenes, world_size, run)
    stop_processes()
    return status


def print_report(scene: str, report) -> None:
    total = sum(report.pixels.values())
    print(
        f"\n{scene}: {report.windows} windows in {report.inference_seconds:.0f} s, "
        f"{report.windows / report.inference_seconds:.1f} a second; {report.seconds:.0f} s with the results written"
    )
    if report.hectares is None:
        print("the raster has no coordinate system: results have none either, and areas are in pixels")
    width = max(map(len, report.pixels))
    for name, pixels in report.pixels.items():
        area = "" if report.hectares is None else f"{report.hectares[name]:14.2f} ha"
        print(f"  {name:{width}}  {pixels:12d} pixels  {pixels / total:7.2%}{area}")
    for path in report.files.results():
        print(f"  wrote {path}")


if __name__ == "__main__":
    run_main(main)
