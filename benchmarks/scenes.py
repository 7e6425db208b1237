"""Whole scenes: throughput beside the bare model's, memory of a small and a large scene, one large window.

Examples:
    python -m benchmarks.scenes picture.jpg                          # a GPU: about two minutes
    python -m benchmarks.scenes picture.jpg --device cpu --quick     # tiny models and scenes, to see that it works
    python -m benchmarks.scenes picture.jpg --device cpu --sides 2000 4000 --large 1024 --batch-size 4    # six minutes

The scenes are the picture repeated: four bands of uint16 (red, green, blue, red again; 16 times the picture's
values) in a tiled GeoTIFF. The model is a pyramid of ours, a 1x1 convolution on its last level and a bilinear resize,
with random weights, under bfloat16 autocast on a GPU. Each scene is segmented by a process of its own: its peaks of
resident memory (VmHWM, and RssAnon by sampling) and of the GPU's memory are of that scene alone. "bare" is the model
on windows that lie on the device, before and after the scene; "scene" is segment_raster while it reads, infers, blends
and stores; "whole" is all of it, with the maps written. On a GPU once eagerly and once with cuda_graphs=True, the bare
model as well. What the stages are: vision_mamba.geo.scene.SceneReport.

The large window is seen in one pass and in small windows, without overlap and blended over a quarter. "agreement" is
the share of pixels that have the one pass's class; "seams" is the mean step of the probabilities across the small
windows' borders over that across all other pixels: 1 where no border shows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import vision_mamba  # noqa: F401  # registers the models
from benchmarks.report import write_results
from vision_mamba.data.rasters import load_rasterio
from vision_mamba.engine.graphs import InferenceGraph
from vision_mamba.errors import UserError, run_main
from vision_mamba.geo import Segmentor, segment_raster
from vision_mamba.geo.reader import SceneReader
from vision_mamba.geo.windows import Grid, blend_rows, blend_weights

CLASSES = tuple(f"class {i}" for i in range(6))
BLACK, WHITE = 0, 16 * 255
# Models (the scenes are the first's), sides of the scenes, window, windows a pass, side of the large window.
FULL = (("vmamba_tiny_s1l8", "vim_tiny_patch16_224"), (2_000, 20_000), 512, 16, 4096)
QUICK = (("test_vmamba", "test_vim"), (300, 1_200), 128, 4, 256)


class Network(nn.Module):
    """(N, 4, H, W) -> (N, classes, H, W)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        options = {"dynamic_img_size": True} if "vim" in name else {}
        self.backbone = timm.create_model(name, features_only=True, out_indices=(-1,), in_chans=4, **options)
        self.head = nn.Conv2d(self.backbone.feature_info.channels()[-1], len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.backbone(x)[-1])
        return F.interpolate(scores, x.shape[-2:], mode="bilinear", align_corners=False)


def make_segmentor(name: str, device: torch.device) -> Segmentor:
    torch.manual_seed(0)
    amp = torch.bfloat16 if device.type == "cuda" else None
    numbers = dict(mean=[124.0, 116.0, 104.0, 124.0], std=[58.0, 57.0, 57.0, 58.0])
    return Segmentor(model=Network(name).to(device).eval(), classes=CLASSES, device=device, amp=amp, **numbers)


def write_scene(picture: Path, path: Path, side: int) -> None:
    rasterio = load_rasterio()
    try:
        image = np.asarray(Image.open(picture).convert("RGB"))
    except OSError as error:
        raise UserError(f"cannot read the picture {picture}: {error}") from None
    tile = np.concatenate([image, image[..., :1]], axis=2).transpose(2, 0, 1).astype(np.uint16) * (WHITE // 255)
    across = -(-side // tile.shape[2])
    with rasterio.open(
        path, "w", driver="GTiff", count=4, height=side, width=side, dtype="uint16", crs="EPSG:32612", tiled=True,
        transform=rasterio.transform.from_origin(500_000, 5_000_000, 0.1, 0.1), blockxsize=512, blockysize=512,
        bigtiff="if_safer",
    ) as scene:  # fmt: skip
        for top in range(0, side, 512):
            rows = np.arange(top, min(top + 512, side)) % tile.shape[1]
            box = rasterio.windows.Window(0, top, side, len(rows))
            scene.write(np.tile(tile[:, rows], (1, 1, across))[:, :, :side], window=box)


def resident(what: str) -> float:
    """MiB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024


def seconds(device: torch.device, run: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure_scene(
    name: str, path: Path, device: torch.device, window: int, batch_size: int, cuda_graphs: bool
) -> dict[str, Any]:
    """In a process of its own: throughput and memory of one scene."""
    segmentor = make_segmentor(name, device)
    reader = SceneReader(path, segmentor, (BLACK, WHITE))
    grid = Grid(reader.height, reader.width, window, window // 4)
    count = len(grid.tops) * len(grid.lefts)

    def bare() -> float:
        """Windows a second; nothing of it stays on the device."""
        model = InferenceGraph(segmentor.model) if cuda_graphs else segmentor.model
        size = min(batch_size, count)
        with closing(reader.batches(grid, [(grid.panels[0], range(len(grid.tops)))], size)) as batches:
            inputs = [reader.normalised(batch) for _, batch in zip(range(4), batches, strict=False)]
        inputs = [x for x in inputs if len(x) == size]
        passes = -(-count // size)

        def run() -> None:
            with torch.inference_mode(), segmentor.autocast():
                for i in range(passes):
                    model(inputs[i % len(inputs)])

        with torch.inference_mode(), segmentor.autocast():
            for _ in range(3):
                model(inputs[0])  # kernels are compiled and chosen
        return passes * size / seconds(device, run)

    before = bare()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    anonymous, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            anonymous[0] = max(anonymous[0], resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        report = segment_raster(
            path, path.with_suffix(".out"), segmentor, window=window, batch_size=batch_size, value_range=(BLACK, WHITE),
            overwrite=True, cuda_graphs=cuda_graphs, progress=False,
        )  # fmt: skip
    finally:
        over.set()
        watcher.join()
    held = {"host_mib": resident("VmHWM"), "host_anonymous_mib": anonymous[0]}
    if cuda:
        held["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        held["gpu_reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    bare_speed = (before + bare()) / 2
    scene_speed = report.windows / report.inference_seconds
    return {
        "model": name, "cuda_graphs": cuda_graphs, "side": reader.width, "windows": report.windows, "bare": bare_speed,
        "scene": scene_speed, "whole": report.windows / report.seconds, "scene_over_bare": scene_speed / bare_speed,
        **held, "seconds": report.seconds, "inference_seconds": report.inference_seconds, "stages": report.stages,
    }  # fmt: skip


def measure_window(name: str, path: Path, device: torch.device, window: int, batch_size: int) -> list[dict[str, Any]]:
    """In a process of its own: a scene in one forward pass, and in small windows."""
    segmentor = make_segmentor(name, device)
    reader = SceneReader(path, segmentor, (BLACK, WHITE))
    side = reader.width
    x = reader.normalised(next(reader.batches(Grid(side, side, side, 0), [(range(1), range(1))], 1)))

    def one_pass() -> Tensor:
        with torch.inference_mode():
            return segmentor.probabilities(x)[0]

    def in_windows(overlap: int) -> Callable[[], Tensor]:
        grid = Grid(side, side, window, overlap)
        weights = blend_weights(window, overlap, "cosine").to(device)
        corners = [(top, left) for top in grid.tops for left in grid.lefts]

        def scores() -> Iterator[Tensor]:
            for i in range(0, len(corners), batch_size):
                cut = [x[0, :, top : top + window, left : left + window] for top, left in corners[i : i + batch_size]]
                with torch.inference_mode():
                    yield from segmentor.probabilities(torch.stack(cut)).mul_(weights)

        def run() -> Tensor:
            blocks = blend_rows(grid, range(len(grid.tops)), scores(), weights)
            return torch.cat([block.clone() for _, block in blocks], dim=1)

        return run

    rows = []
    ways = {f"one pass of {side}": one_pass, f"{window}, no overlap": in_windows(0)}
    ways[f"{window}, a quarter overlap"] = in_windows(window // 4)
    borders = torch.zeros(side - 1, dtype=torch.bool, device=device)
    for overlap in (0, window // 4):
        for begin in Grid(side, side, window, overlap).lefts:
            borders[[edge - 1 for edge in (begin, begin + window) if 0 < edge < side]] = True
    whole: Tensor | None = None
    for way, run in ways.items():
        cuda, mib = device.type == "cuda", None
        run()  # kernels are compiled
        if cuda:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times = [seconds(device, run) for _ in range(3)]
        if cuda:
            mib = (torch.cuda.max_memory_allocated() - held) / 2**20
        found = run()
        chosen = found.argmax(0)
        whole = chosen if whole is None else whole
        across = [found.diff(dim=axis).abs().mean(0).movedim(axis - 1, 0) for axis in (1, 2)]
        at_borders, elsewhere = (torch.cat([a[at].flatten() for a in across]).mean() for at in (borders, ~borders))
        rows.append({
            "model": name, "way": way, "ms": 1e3 * statistics.median(times), "mib": mib,
            "agreement": float((chosen == whole).double().mean()), "seams": float(at_borders / elsewhere),
        })  # fmt: skip
        del found, across
    return rows


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scenes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, help="an aerial picture that the scenes are made of")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny models and scenes; the figures say nothing")
    parser.add_argument(
        "--batch-size", type=int, help=f"windows a forward pass (default: {FULL[3]}; quick: {QUICK[3]})"
    )
    parser.add_argument(
        "--sides", type=int, nargs="+", metavar="PIXELS", help=f"of the scenes (default: {FULL[1]}; quick: {QUICK[1]})"
    )
    parser.add_argument(
        "--large", type=int, metavar="PIXELS", help=f"side of the large window (default: {FULL[4]}; quick: {QUICK[4]})"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the scenes, 4 GB (default: the system's)")
    parser.add_argument("--out", type=Path, help="default: results/scenes-DEVICE.json beside this file")
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU")
    names, sides, window, batch_size, large = QUICK if args.quick else FULL
    batch_size, device = args.batch_size or batch_size, torch.device(args.device)
    sides, large = args.sides or sides, args.large or large
    if min(*sides, large) < window:
        raise UserError(f"--sides and --large must be at least the window's {window} pixels")

    scenes, windows = [], []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        path = Path(folder) / "scene.tif"
        print(f"{'':15} {'windows/s':>8} {'':17} {'':8}MiB at the peak")
        print("  side  windows     bare    scene    whole  / bare     RSS    anon     GPU")
        for side, cuda_graphs in product(sides, (False, True) if device.type == "cuda" else (False,)):
            if not cuda_graphs:
                write_scene(args.picture, path, side)
            row = alone(measure_scene, names[0], path, device, window, batch_size, cuda_graphs)
            scenes.append(row)
            gpu = f"{row['gpu_mib']:7.0f}" if "gpu_mib" in row else f"{'':7}"
            print(
                f"{side:6} {row['windows']:8} {row['bare']:8.1f} {row['scene']:8.1f} {row['whole']:8.1f} "
                f"{row['scene_over_bare']:7.2f} {row['host_mib']:7.0f} {row['host_anonymous_mib']:7.0f} {gpu}",
                flush=True,
            )
            stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in sorted(row["stages"].items()))
            account = (
                f"{row['seconds']:.1f} s, {row['inference_seconds']:.1f} s until the last window; of them {stages}"
            )
            account = "by a CUDA graph, " * cuda_graphs + account
            print(textwrap.fill(account, 110, initial_indent=" " * 8, subsequent_indent=" " * 8), flush=True)
        for cuda_graphs in sorted({row["cuda_graphs"] for row in scenes}):
            mine = [row for row in scenes if row["cuda_graphs"] == cuda_graphs]
            first, last = mine[0], mine[-1]
            growth = ", ".join(f"{key} {last[key] / first[key] - 1:+.1%}" for key in first if key.endswith("_mib"))
            print(f"  from {sides[0]} to {sides[-1]} pixels a side{', by a CUDA graph' * cuda_graphs}: {growth}")
        write_scene(args.picture, path, large)
        print(f"\n{'model':24} {'windows':24} {'ms':>9} {'MiB':>8} {'agreement':>10} {'seams':>7}")
        for name in names:
            for row in alone(measure_window, name, path, device, window, batch_size):
                windows.append(row)
                mib = "" if row["mib"] is None else f"{row['mib']:.0f}"
                print(
                    f"{name:24} {row['way']:24} {row['ms']:9.1f} {mib:>8} {row['agreement']:10.2%} {row['seams']:7.2f}",
                    flush=True,
                )
    write_results(
        "scenes", device, "python -m benchmarks.scenes", args.out, rasterio=load_rasterio().__version__,
        batch_size=batch_size, window=window, scenes=scenes, large_window=windows,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
