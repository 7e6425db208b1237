"""Training throughput of several GPUs of one host beside that of one of them, in one run.

Example:
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ddp
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ddp --modes graph
    torchrun --standalone --nproc-per-node 2 -m benchmarks.ddp --device cpu --models vim_nano --size 64 --batch-size 2

The first process trains alone while the others wait, then all train the same model under DistributedDataParallel: the
same images a process, random ones that lie on its device, so nothing is read; bfloat16 autocast on GPUs, forward,
backward and a step of fused AdamW. Eagerly, and with the passes replayed as CUDA graphs (`train.cuda_graphs=true`), on
both sides. Medians of blocks of steps; the slowest process counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vision_mamba  # noqa: F401  # registers the models
from benchmarks.report import write_results
from vision_mamba.engine.build import create_any_size
from vision_mamba.engine.distributed import barrier, start_processes, stop_processes
from vision_mamba.engine.graphs import Replayed
from vision_mamba.errors import UserError, run_main

MODELS = ("vim_tiny_patch16_224", "vmamba_tiny_s1l8")


def trainer(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """One training step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    target = torch.arange(len(x), device=x.device) % 1000

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else nullcontext():
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def seconds(step: Callable[[], None], x: torch.Tensor, runs: int, steps: int) -> float:
    """Median seconds of a step in this process."""
    times = []
    for run in range(runs + 1):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if x.is_cuda:
            torch.cuda.synchronize()
        if run > 0:  # the first compiles and allocates
            times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def measure(name: str, mode: str, size: int, batch: int, device: torch.device, runs: int, steps: int) -> dict:
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model: nn.Module = create_any_size(name, {"img_size": size}).to(device)
    if mode == "graph":
        model = Replayed(model)
    x = torch.randn(batch, 3, size, size, device=device)
    alone = seconds(trainer(model, x), x, runs, steps) if rank == 0 else math.inf
    barrier()
    slowest = torch.tensor(seconds(trainer(DistributedDataParallel(model), x), x, runs, steps), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {
        "model": name,
        "mode": mode,
        "img_size": size,
        "batch": batch,
        "processes": processes,
        "one_images_per_s": batch / alone,  # 0 but in the first process
        "all_images_per_s": processes * batch / slowest.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="default: %(default)s")
    parser.add_argument("--modes", nargs="+", choices=("eager", "graph"), help="default: both; eager on a CPU")
    parser.add_argument("--size", type=int, default=224, help="pixels a side (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images a process (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="blocks of steps that are timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="in a block (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="default: results/ddp-DEVICE.json beside this file")
    args = parser.parse_args()
    device, rank, processes = start_processes(args.device)
    if processes < 2:
        raise UserError("there is one process: start it as torchrun --nproc-per-node 2 -m benchmarks.ddp")
    modes = args.modes or (("eager", "graph") if device.type == "cuda" else ("eager",))
    if "graph" in modes and device.type == "cpu":
        raise UserError("--modes graph needs GPUs")
    rows = [
        measure(name, mode, args.size, args.batch_size, device, args.runs, args.steps)
        for name in args.models
        for mode in modes
    ]
    if rank == 0:
        for row in rows:
            one, every = row["one_images_per_s"], row["all_images_per_s"]
            who = f"{row['model']:28} {row['mode']:6}"
            print(f"{who} one {one:9.1f}  {processes} processes {every:9.1f} images/s  {every / one:.2f}x")
        write_results("ddp", device, "torchrun -m benchmarks.ddp", args.out, rows=rows)
    stop_processes()


if __name__ == "__main__":
    run_main(main)
