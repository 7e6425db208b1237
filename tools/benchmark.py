"""Speed and memory of models on this machine, beside a peer: a table, benchmark.csv, benchmark.json and a plot.

    python tools/benchmark.py vim_tiny_patch16_224 --peer deit_tiny_patch16_224 --img-size 224 512 1024 --batch-size 8
    python tools/benchmark.py vmamba_tiny_s1l8 vim_small_patch16_224 --peer convnext_tiny --train --compile

Random images, random weights. On a GPU under bfloat16 autocast, on a CPU in float32. Models with a peer take turns with
it; the median of each is shown. Memory (GPU only) is the peak of a pass beyond weights, gradients and input. A model
that runs out of memory says so in its row, and the rest goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from vision_mamba.engine.benchmark import benchmark, device_name, write_benchmark
from vision_mamba.engine.evaluate import choose_device
from vision_mamba.errors import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="timm model names; all of ours among them")
    parser.add_argument("--peer", help="a timm model to compare with, e.g. deit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224], help="pixels a side (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", help="images a batch: one, or one a size (default: 32; 1 on a CPU)"
    )
    parser.add_argument("--train", action="store_true", help="training steps (forward and backward) too")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--graph", action="store_true", help="as a CUDA graph too: the GPU's time without Python's")
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="training with gradient checkpointing too: of blocks, and selective",
    )
    parser.add_argument("--runs", type=int, default=9, help="of each model in each row (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)

    device, _ = choose_device(args.device)
    batches = args.batch_size or [32 if device.type == "cuda" else 1]
    batches = batches * len(args.img_size) if len(batches) == 1 else batches
    if len(batches) != len(args.img_size):
        raise UserError(
            f"--batch-size has {len(batches)} values for {len(args.img_size)} sizes; give one, or one a size"
        )
    if min(*args.img_size, *batches, args.runs, args.threads or 1) < 1:
        raise UserError("--img-size, --batch-size, --runs and --threads must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = list(zip(args.img_size, batches, strict=True))
    found = benchmark(
        args.models,
        settings,
        device=device,
        peer=args.peer,
        training=args.train,
        compiled=args.compile,
        graph=args.graph,
        checkpointing=args.checkpointing,
        runs=args.runs,
    )

    print(device_name(device))
    width = max(map(len, [*args.models, args.peer or ""]))
    against = f"  / {args.peer}: speed, memory" if args.peer else ""
    print(f"{'model':{width}}  what       mode           size  batch         ms   images/s       MiB{against}")
    rows = []
    for row in found:
        print(format_row(row, width), flush=True)
        rows.append(row)
    files = write_benchmark(
        rows, args.out, device=device_name(device), command=shlex.join(["tools/benchmark.py", *(argv or sys.argv[1:])])
    )
    print("wrote " + ", ".join(map(str, files)))


def format_row(row: dict[str, Any], width: int) -> str:
    start = f"{row['model']:{width}}  {row['what']:9}  {row['mode']:12} {row['size']:6} {row['batch']:6}"
    if row["error"]:
        return f"{start}  {row['error']}"

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    ratios = f"  {number(row['speed_ratio'], 2):>6} {number(row['memory_ratio'], 2):>6}" if row["peer"] else ""
    return f"{start} {row['ms']:10.1f} {row['images_per_s']:10.1f} {number(row['mib'], 0):>9}{ratios}"


if __name__ == "__main__":
    run_main(main)
