"""Whole models beside their peers, in one run: images/s and memory, inference and training.

Examples:
    python -m benchmarks.models vmamba                                  # a GPU: bf16 autocast, eager and compiled
    python -m benchmarks.models vim --rows 1248x8 --modes compiled
    uv run --with einops python -m benchmarks.models vmamba --device cpu --threads 2 --official ~/VMamba

On a GPU the autocast type is bfloat16, on a CPU everything is float32. The models take turns and the median of
each is kept. With ``--official`` the official code runs too (on a CPU: its pure-PyTorch scan, the only one it
has there; of training only one step at batch 1, as that takes minutes), and a time is printed only if our logits
agree with its logits. ``graph`` replays the eager kernels as one CUDA graph: what the device takes, without Python.
Memory (of eager and compiled runs) is the peak beyond weights (and gradients, after one step) and input.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

import vision_mamba
from benchmarks import official_vim, official_vmamba


@dataclass
class Family:
    """One of our models, timm's peers of its size, the official one, and (side, batch) rows."""

    ours: str
    peers: tuple[str, ...]
    official: Callable[[Path], nn.Module]
    rows: tuple[tuple[int, int], ...]


FAMILIES = {
    "vim": Family(
        "vim_tiny_patch16_224",
        ("deit_tiny_patch16_224",),
        official_vim.vim_tiny,
        ((224, 128), (512, 32), (1024, 8), (1248, 8)),
    ),
    "vmamba": Family(
        "vmamba_tiny_s1l8",
        ("swin_tiny_patch4_window7_224", "convnext_tiny"),
        official_vmamba.vmamba_tiny,
        ((224, 128), (1024, 8)),
    ),
}
CPU_ROWS = ((224, 1), (224, 8))


def create(name: str, size: int) -> nn.Module:
    try:
        return timm.create_model(name, img_size=size)
    except TypeError:  # of any size
        return timm.create_model(name)


class Bench:
    """Times and memory of one model's forward pass, or of its training step, on one device."""

    def __init__(self, model: nn.Module, x: torch.Tensor, *, training: bool, mode: str) -> None:
        self.model = model.train(training)
        self.x, self.training, self.mode = x, training, mode
        self.forward = torch.compile(model) if mode == "compiled" else model
        self.cuda = x.is_cuda
        self.graph: torch.cuda.CUDAGraph | None = None
        if mode == "graph":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled and gradients made before the capture
                for _ in range(3):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run()
            self.graph = graph

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        autocast = (
            torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=self.mode != "graph")
            if self.cuda
            else nullcontext()
        )
        if not self.training:
            with torch.no_grad(), autocast:
                self.forward(self.x)
            return
        with autocast:
            out = self.forward(self.x)
        self.model.zero_grad(set_to_none=False)
        out.float().square().mean().backward()

    def timed(self) -> float:
        """Seconds."""
        if not self.cuda:
            start = time.perf_counter()
            self.run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def memory(self) -> float | None:
        """MiB above what is held before the pass; None on a CPU."""
        if not self.cuda or self.graph is not None:
            return None
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20


def measure(benches: dict[str, Bench], runs: int, once: str | None = None) -> dict[str, dict[str, float | None]]:
    """Median ms, images/s and MiB of each; they take turns, so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in benches}
    memory = {}
    for name, bench in benches.items():
        if name != once:
            for _ in range(3 if bench.cuda else 1):
                bench.run()
            memory[name] = bench.memory()
    for i in range(runs):
        for name, bench in benches.items():
            if name != once or i == 0:
                times[name].append(bench.timed())
    return {
        name: {
            "ms": 1e3 * statistics.median(times[name]),
            "images_per_s": len(bench.x) / statistics.median(times[name]),
            "mib": memory.get(name),
        }
        for name, bench in benches.items()
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def pair(text: str) -> tuple[int, int]:
    size, batch = text.split("x")
    return int(size), int(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=pair, nargs="+", metavar="SIZExBATCH", help="default: the family's")
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "compiled", "graph"), help="default: all; eager on a CPU"
    )
    parser.add_argument("--official", type=Path, help="checkout of the official repository")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, help="default: results/FAMILY-DEVICE.json beside this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, family = torch.device(args.device), FAMILIES[args.family]
    cuda = device.type == "cuda"
    rows = args.rows or (family.rows if cuda else CPU_ROWS)
    modes = args.modes or (["eager", "compiled", "graph"] if cuda else ["eager"])

    results = []
    print(f"{'what':9} size  batch     mode  {'model':30} {'ms':>10} {'images/s':>10} {'MiB':>8} {'/ ours':>7}")
    for size, batch in rows:
        x = torch.randn(batch, 3, size, size, device=device)
        models = {name: create(name, size).to(device).eval() for name in (family.ours, *family.peers)}
        error = None
        if args.official:
            models["official"] = official = family.official(args.official).to(device).eval()
            vision_mamba.load_checkpoint(models[family.ours], official.state_dict())
            with torch.no_grad():
                ours, theirs = models[family.ours](x[:1]), official(x[:1])
            error = float((ours - theirs).norm() / theirs.norm())
            if error > 1e-4:
                sys.exit(f"our logits differ from the official ones by {error:.1e}: no times for a wrong result")
        for training in (False, True):
            for mode in modes:
                chosen = dict(models)
                if mode != "eager" or (training and not cuda and batch > 1):
                    chosen.pop("official", None)
                benches = {n: Bench(m, x, training=training, mode=mode) for n, m in chosen.items()}
                found = measure(benches, args.runs, once="official" if training and not cuda else None)
                what = "training" if training else "inference"
                for name, row in found.items():
                    ratio = row["images_per_s"] / found[family.ours]["images_per_s"]
                    mib = "" if row["mib"] is None else f"{row['mib']:.0f}"
                    print(
                        f"{what:9} {size:5} {batch:5} {mode:>8}  {name:30} {row['ms']:10.1f} "
                        f"{row['images_per_s']:10.1f} {mib:>8} {ratio:7.2f}",
                        flush=True,
                    )
                    results.append(
                        {
                            "what": what,
                            "size": size,
                            "batch": batch,
                            "mode": mode,
                            "model": name,
                            "rel_err": error,
                            **row,
                        }
                    )
        del models
    name = torch.cuda.get_device_name() if cuda else f"{processor()}, {torch.get_num_threads()} threads"
    short = name.split()[1].lower() if cuda else "cpu"
    out = args.out or Path(__file__).parent / "results" / f"{args.family}-{short}.json"
    text = {
        "device": name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": commit(),
        "command": "python -m benchmarks.models " + " ".join(a for a in sys.argv[1:] if "/" not in a),
        "date": datetime.date.today().isoformat(),
        "rows": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(text, indent=1) + "\n")
    temporary.replace(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
