"""Whole models beside their peers, in one run: images/s and memory, inference and training.

Examples:
    python -m benchmarks.models vmamba                                  # a GPU: bf16 autocast, eager and compiled
    python -m benchmarks.models vim --rows 1248x8 --modes compiled
    uv run --with einops python -m benchmarks.models vmamba --device cpu --threads 2 --official ~/VMamba
    uv run --with transformers --with mambapy python -m benchmarks.models rsmamba --modes eager --official ~/RSMamba

On a GPU the autocast type is bfloat16, on a CPU everything is float32. The models take turns and the median of each
is kept. With ``--official`` the official code runs too, eagerly (on a CPU: its pure-PyTorch scan, the only one it has
there; of training only one step at batch 1, as that takes minutes), and a time is printed only if our logits agree
with its logits; where it cannot run, out of memory for example, its row says so. ``graph`` replays the eager kernels
as one CUDA graph: what the device takes, without Python. ``checkpointed`` is eager training with gradient
checkpointing, ``selective`` that of all but the scans. Forward passes are of models prepared by
``timm.utils.reparameterize_model``, whosever they are (of the official ones it changes nothing). Memory (not of
graphs) is the peak beyond weights (and gradients, after one step) and input.

Results go to results/FAMILY-DEVICE.json; results/models-DEVICE.json has all families', each model beside each peer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vision_mamba
from benchmarks import official_rsmamba, official_vim, official_vmamba
from benchmarks.report import RESULTS, short_name, write_json, write_results
from vision_mamba.engine.benchmark import CHECKPOINTED, Bench, measure
from vision_mamba.engine.build import create_any_size


@dataclass
class Family:
    """One of our models, timm's peers of its size, the official one, and (side, batch) rows."""

    ours: str
    peers: tuple[str, ...]
    official: Callable[[Path, int], nn.Module] | None
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
    "rsmamba": Family(
        "rsmamba_base",
        ("deit_tiny_patch16_224",),
        official_rsmamba.rsmamba_base,
        # The official code keeps all states of a layer: of 64 images they do not fit into 80 GB.
        ((224, 64), (224, 16), (224, 8)),
    ),
    "vim_small": Family("vim_small_patch16_224", ("deit_small_patch16_224",), None, ((224, 128),)),
    "vmamba_small": Family("vmamba_small_s2l15", ("swin_small_patch4_window7_224",), None, ((224, 128),)),
    "vmamba_base": Family("vmamba_base_s2l15", ("swin_base_patch4_window7_224",), None, ((224, 128),)),
    "samba": Family("samba", ("swin_tiny_patch4_window7_224",), None, ((512, 16),)),
}
CPU_ROWS = ((224, 1), (224, 8))


def with_peers(device: str, results: Path = RESULTS) -> dict[str, Any]:
    """The last results of all families on a device (``"h100"``), a row for each of our models and each peer of it.

    ``run`` says how the passes were started: eager, compiled, graph, checkpointed, selective. Each row has the commit,
    command and date of its family's file, or its own; ``error`` is why a peer has no figure.
    """
    rows, last = [], {}
    for name, family in FAMILIES.items():
        path = results / f"{name}-{device}.json"
        report = json.loads(path.read_text()) if path.exists() else {"rows": ()}
        keys = ("what", "size", "batch", "mode")
        for key, found in groupby(report["rows"], key=lambda row: tuple(row[k] for k in keys)):
            what, size, batch, mode = key
            ours, *peers = sorted(found, key=lambda row: row["model"] != family.ours)
            for peer in peers:
                rows.append({
                    "model": family.ours, "img_size": size, "batch": batch, "mode": what,
                    "compiled": mode == "compiled", "run": mode,
                    "images_per_s": ours["images_per_s"], "peak_mib": ours["mib"],
                    "peer": peer["model"], "peer_images_per_s": peer.get("images_per_s"),
                    "peer_peak_mib": peer.get("mib"), "error": peer.get("error"),
                    **{k: ours.get(k, report[k]) for k in ("commit", "command", "date")},
                })  # fmt: skip
        if report["rows"] and report["date"] >= last.get("date", ""):
            last = {k: report.get(k) for k in ("device", "torch", "triton", "timm", "commit", "command", "date")}
    return {**last, "rows": rows}


def pair(text: str) -> tuple[int, int]:
    size, batch = text.split("x")
    return int(size), int(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=pair, nargs="+", metavar="SIZExBATCH", help="default: the family's")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=("eager", "compiled", "graph", *CHECKPOINTED),
        help="default: the first three; eager on a CPU",
    )
    parser.add_argument(
        "--official", type=Path, help="checkout of the official repository (for vim, vmamba and rsmamba)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, help="default: results/FAMILY-DEVICE.json beside this file")
    args = parser.parse_args()
    if args.official and FAMILIES[args.family].official is None:
        parser.error(f"no official code can be run beside {args.family}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.official:
        torch.backends.cudnn.allow_tf32 = False  # logits are compared in float32
    device, family = torch.device(args.device), FAMILIES[args.family]
    cuda = device.type == "cuda"
    rows = args.rows or (family.rows if cuda else CPU_ROWS)
    modes = args.modes or (["eager", "compiled", "graph"] if cuda else ["eager"])

    results = []
    print(f"{'what':9} size  batch     mode  {'model':30} {'ms':>10} {'images/s':>10} {'MiB':>8} {'/ ours':>7}")
    for size, batch in rows:
        x = torch.randn(batch, 3, size, size, device=device)
        models = {
            name: create_any_size(name, {"img_size": size}).to(device).eval() for name in (family.ours, *family.peers)
        }
        error = None
        if args.official:
            assert family.official is not None
            models["official"] = official = family.official(args.official, size).to(device).eval()
            vision_mamba.load_checkpoint(models[family.ours], official.state_dict())
            with torch.no_grad():
                ours, theirs = models[family.ours](x[:1]), official(x[:1])
            error = float((ours - theirs).norm() / theirs.norm())
            if error > 1e-4:
                sys.exit(f"our logits differ from the official ones by {error:.1e}: no times for a wrong result")
        for training in (False, True):
            for mode in modes if training else [m for m in modes if m not in CHECKPOINTED]:
                chosen = dict(models)
                if mode != "eager" or (training and not cuda and batch > 1):
                    chosen.pop("official", None)
                makers = {n: partial(Bench, m, x, training=training, mode=mode) for n, m in chosen.items()}
                found = measure(makers, args.runs, once="official" if training and not cuda else None)
                what = "training" if training else "inference"
                for name, row in found.items():
                    start = f"{what:9} {size:5} {batch:5} {mode:>8}  {name:30}"
                    if (failure := row["error"]) and name != "official":
                        sys.exit(f"{name}, {what}, {mode}, {size} pixels, batch {batch}: {failure}")
                    if failure:
                        print(f"{start} {failure}", flush=True)
                    else:
                        del row["error"]
                        ratio = row["images_per_s"] / found[family.ours]["images_per_s"]
                        mib = "" if row["mib"] is None else f"{row['mib']:.0f}"
                        print(
                            f"{start} {row['ms']:10.1f} {row['images_per_s']:10.1f} {mib:>8} {ratio:7.2f}", flush=True
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
    write_results(args.family, device, "python -m benchmarks.models", args.out, rows=results)
    if args.out is None:
        short = short_name(device)
        write_json(RESULTS / f"models-{short}.json", with_peers(short))


if __name__ == "__main__":
    main()
