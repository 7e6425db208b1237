"""Vim-Ti on a CPU beside DeiT-Ti and the official Vim, in one run.

Example:
    uv run --with einops python -m benchmarks.cpu --official ~/Vim --threads 2

The peers take turns, and the median of each is kept; the official training step, minutes long, runs once. The
official model runs its own pure-PyTorch scan loop, the only one it has for a CPU. A time is printed only if our logits
agree with the official ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import timm
import torch

import vision_mamba
from benchmarks import official_vim


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(functions: dict, runs: int, once: str = "") -> dict[str, float]:
    """Median milliseconds of each function; they take turns, so that drift of the machine hits all alike.

    ``once`` is the name of one that takes minutes: it is run a single time, unwarmed.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        if name != once:
            function()
    for run in range(runs):
        for name, function in functions.items():
            if name != once or run == 0:
                times[name].append(timed(function))
    return {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def step(model: torch.nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of github.com/hustvl/Vim")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    official = official_vim.load(args.official)
    # The arguments of the official factory vim_tiny_patch16_224_..._midclstok_div2, less its fused CUDA norm.
    theirs = official.VisionMamba(
        patch_size=16, embed_dim=192, depth=24, rms_norm=True, residual_in_fp32=True, fused_add_norm=False,
        final_pool_type="mean", if_abs_pos_embed=True, bimamba_type="v2", if_cls_token=True, if_divide_out=True,
        use_middle_cls_token=True,
    ).eval()  # fmt: skip
    ours = timm.create_model("vim_tiny_patch16_224").eval()
    vision_mamba.load_checkpoint(ours, theirs.state_dict())
    deit = timm.create_model("deit_tiny_patch16_224").eval()
    models = {"vim_tiny (ours)": ours, "deit_tiny (timm)": deit, "vim_tiny (official)": theirs}

    print(f"{'':20} {'batch':>5} " + " ".join(f"{n:>20}" for n in models) + f" {'ours/DeiT':>10} {'official/ours':>14}")
    rows = []

    def add(what: str, batch: int, error: float, ms: dict[str, float]) -> None:
        rows.append({"what": what, "batch": batch, "rel_err": error, "ms": ms})
        a, b, c = ms.values()
        times = f"{a:17.1f} ms {b:17.1f} ms {c:17.1f} ms {a / b:10.2f} {c / a:14.1f}"
        print(f"{what:20} {batch:5} {times}", flush=True)

    for batch in (1, 8):
        x = torch.randn(batch, 3, 224, 224)
        with torch.no_grad():
            error = float((ours(x) - theirs(x)).norm() / theirs(x).norm())
            if error > 1e-4:
                sys.exit(f"our logits differ from the official ones by {error:.1e}: no times for a wrong result")
            forward = compare({n: partial(m, x) for n, m in models.items()}, args.runs)
        add("forward", batch, error, forward)

        training = compare({n: partial(step, m, x) for n, m in models.items()}, args.runs, once="vim_tiny (official)")
        add("forward + backward", batch, error, training)

    result = {
        "device": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "command": "python -m benchmarks.cpu " + " ".join(a for a in sys.argv[1:] if "/" not in a),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
