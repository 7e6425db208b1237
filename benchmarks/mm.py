"""Training steps of segmentors and detectors with VMamba-T beside Swin-T under the same heads, in one run.

Examples:
    python -m benchmarks.mm                                    # a GPU: bf16 autocast, eager and with CUDA graphs
    python -m benchmarks.mm --tasks segmentation --batch 4
    python -m benchmarks.mm --device cpu --size 64 --batch 2 --runs 1

Mask R-CNN at 800 x 1216, batch 2, and UPerNet at 512, batch 2 and 8, by our configs; Swin-T is mmdet's and mmseg's own.
A step is the losses of the whole model, the backward pass and a step of fused AdamW; images and labels are random and
lie on the device. ``graphs`` replays the backbone's passes as CUDA graphs, on both sides by the same code; heads are
eager. A backbone that cannot be captured has the reason in its row. All take turns, in blocks of steps; medians are
kept. Memory is the peak of a step with weights, the optimiser's state and what the graphs keep. Results are written
after each input, for a run that is stopped.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vision_mamba.mm  # noqa: F401  # before mmseg and mmdet
from benchmarks.report import write_results
from vision_mamba.engine.graphs import TrainingGraphs
from vision_mamba.mm.run import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = ("detection", "segmentation")
BLOCK = 3  # steps between two looks at the clock, so that Python may run ahead
Size = tuple[int, int]


def segmentors() -> dict[str, nn.Module]:
    from mmengine.hub import get_config

    ours = load_config(str(CONFIGS / "segmentation/vmamba_tiny_ade20k.py"), "seg", {"model.backbone.pretrained": False})
    swin = copy.deepcopy(ours)
    backbone = get_config("mmseg::_base_/models/upernet_swin.py").model.backbone
    swin.model.backbone = dict(backbone, drop_path_rate=ours.model.backbone.drop_path_rate)
    return {"vmamba_tiny": build("mmseg", ours.model), "swin_tiny": build("mmseg", swin.model)}


def detectors() -> dict[str, nn.Module]:
    from mmengine.hub import get_config

    path = str(CONFIGS / "detection/mask_rcnn_vmamba_tiny_1x_coco.py")
    ours = load_config(path, "det", {"model.backbone.pretrained": False})
    swin = get_config("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py")
    swin.model.backbone.init_cfg = None
    return {"vmamba_tiny": build("mmdet", ours.model), "swin_tiny": build("mmdet", swin.model)}


def build(scope: str, config: Any) -> nn.Module:
    from mmengine.logging import MMLogger
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(scope)
    MMLogger.get_current_instance().setLevel("ERROR")  # a line for every parameter otherwise
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config))
    model.init_weights()
    return model


def segmentation_data(batch: int, size: Size) -> dict[str, Any]:
    """Images with labels in squares of 16 pixels."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(batch):
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size))
        labels = torch.randint(0, 150, (1, size[0] // 16, size[1] // 16), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels.repeat_interleave(16, 1).repeat_interleave(16, 2))
        samples.append(sample)
    images = torch.randint(0, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)
    return {"inputs": list(images), "data_samples": samples}


def detection_data(batch: int, size: Size, boxes: int = 10) -> dict[str, Any]:
    """Images with ellipses as objects."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = size
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(batch):
        w, h = rng.uniform(0.06, 0.4, boxes) * width, rng.uniform(0.06, 0.4, boxes) * height
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        rows, columns = np.ogrid[:height, :width]
        across, down = (columns[..., None] - x) / w - 0.5, (rows[..., None] - y) / h - 0.5
        inside = across**2 + down**2 <= 0.25
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor(np.stack([x, y, x + w, y + h], 1), dtype=torch.float32)),
            labels=torch.from_numpy(rng.integers(0, 80, boxes)),
            masks=BitmapMasks(inside.transpose(2, 0, 1).astype(np.uint8), height, width),
        )
        sample.ignored_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(sample)
    images = rng.integers(0, 256, (batch, 3, height, width), dtype=np.uint8)
    return {"inputs": list(torch.from_numpy(images)), "data_samples": samples}


class Trainee:
    """A model with its optimiser."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=self.cuda)
        self.eager = model.backbone.forward

    def take(self, data: dict[str, Any]) -> None:
        """The batch of the coming steps, and no graphs of earlier ones."""
        self.data = self.model.data_preprocessor(data, True)
        self.graphs = TrainingGraphs()

    def step(self, mode: str) -> None:
        backbone = self.model.backbone
        backbone.forward = partial(self.graphs, backbone, self.eager) if mode == "graphs" else self.eager
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda):
            loss, _ = self.model.parse_losses(self.model(**self.data, mode="loss"))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm_up(self, mode: str) -> float | None:
        """Runs until nothing is compiled any more; MiB at the peak of a step, None on a CPU."""
        for _ in range(3 if self.cuda else 1):
            self.step(mode)
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        others = torch.cuda.memory_allocated() - self.held()
        torch.cuda.reset_peak_memory_stats()
        self.step(mode)
        torch.cuda.synchronize()
        kept = self.graphs.memory if mode == "graphs" else 0
        return (torch.cuda.max_memory_allocated() - others + kept) / 2**20

    def held(self) -> int:
        """Bytes of weights and the optimiser's state."""
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in [*self.model.parameters(), *state] if t.is_cuda)

    def timed(self, mode: str, steps: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step(mode)
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps


def compare(trainees: dict[str, Trainee], runs: int, batch: int) -> list[dict[str, Any]]:
    """Rows of every model and mode, all of which take turns."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    modes = ("graphs", "eager") if all(t.cuda for t in trainees.values()) else ("eager",)
    for mode in modes:
        for name, trainee in trainees.items():
            row: dict[str, Any] = {"model": name, "mode": mode, "mib": None, "error": None, "all_ms": []}
            rows[name, mode] = row
            try:
                row["mib"] = trainee.warm_up(mode)
            except RuntimeError as error:  # also what an eager step raises on a full device
                what = "not capturable: " if mode == "graphs" else ""
                row["error"] = what + str(error).splitlines()[0]
                trainee.optimizer.zero_grad()
    block = min(BLOCK, runs)
    for _ in range(max(1, round(runs / block))):
        for (name, mode), row in rows.items():
            if row["error"] is None:
                row["all_ms"].append(1e3 * trainees[name].timed(mode, block))
    for row in rows.values():
        row["ms"] = statistics.median(row["all_ms"]) if row["all_ms"] else None
        row["images_per_s"] = 1e3 * batch / row["ms"] if row["ms"] else None
        row["all_ms"] = [round(ms, 2) for ms in row["all_ms"]]
    return list(rows.values())


def best(rows: list[dict[str, Any]], model: str) -> dict[str, Any]:
    return max((r for r in rows if r["model"] == model), key=lambda r: r["images_per_s"] or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=(2, 8), help="of segmentation, at least 2; default: 2 8"
    )
    parser.add_argument("--size", type=int, help="side of segmentation; detection has half as much again as width")
    parser.add_argument("--runs", type=int, default=15, help="timed steps of each model in each mode")
    parser.add_argument("--out", type=Path, help="default: results/mm-DEVICE.json beside this file")
    args = parser.parse_args()
    if min(args.batch) < 2:
        parser.error("--batch: UPerNet pools an image to one pixel, and of one pixel batch norm has no variance")
    device = torch.device(args.device)
    warnings.filterwarnings("ignore")  # what mmseg and mmdet call that torch is about to drop

    every: list[dict[str, Any]] = []
    table = [f"{'':12} {'size':>9} batch  {'VMamba-T':>8} images/s  {'Swin-T':>8} images/s  ratio"]
    for task in args.tasks:
        segmentation = task == "segmentation"
        torch.backends.cudnn.benchmark = segmentation  # as in mmseg's configs, and not in mmdet's
        models = (segmentors if segmentation else detectors)()
        trainees = {name: Trainee(model, device) for name, model in models.items()}
        side = args.size or 512
        size = (side, side) if segmentation else (args.size, args.size * 3 // 2) if args.size else (800, 1216)
        for batch in args.batch if segmentation else (2,):
            for trainee in trainees.values():
                trainee.take((segmentation_data if segmentation else detection_data)(batch, size))
            rows = compare(trainees, args.runs, batch)
            where = {"task": task, "height": size[0], "width": size[1], "batch": batch}
            ours, theirs = (best(rows, name) for name in trainees)
            for row in rows:
                start = f"{task:12} {size[0]:4}x{size[1]:<4} {batch:5}  {row['model']:12} {row['mode']:7}"
                mib = "" if row["mib"] is None else f"{row['mib']:7.0f} MiB"
                numbers = row["error"] or f"{row['ms']:8.1f} ms {row['images_per_s']:8.1f} images/s {mib}"
                print(f"{start} {numbers}", flush=True)
                every.append({**where, **row})
            line = f"{task:12} {size[0]:4}x{size[1]:<4} {batch:5}"
            if ours["ms"] and theirs["ms"]:
                ratio = ours["images_per_s"] / theirs["images_per_s"]
                for found in (ours, theirs):
                    line += f"  {found['images_per_s']:8.1f} {found['mode']:8}"
                line += f"  {ratio:5.2f}"
            table.append(line)
            write_results("mm", device, "python -m benchmarks.mm", args.out, rows=every)
        del models, trainees, trainee
        gc.collect()  # models and their forwards refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\nthe faster mode of each:")
    print("\n".join(table))


if __name__ == "__main__":
    main()
