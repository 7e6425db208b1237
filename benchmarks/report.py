"""The files in results/: what was measured, on which device, with which versions and command, when."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vision_mamba.engine.benchmark import device_name
from vision_mamba.engine.checkpoint import versions
from vision_mamba.files import replacing


def write_results(name: str, device: torch.device, start: str, out: Path | None, **found: Any) -> None:
    """Writes ``out``, or results/NAME-DEVICE.json where it is None, and says so.

    Args:
        name: of the benchmark, in the file's name.
        start: how the program is started, before its arguments.
        found: what was measured, and what else must be known to measure it again.
    """
    gpu_or_cpu = device_name(device)
    short = gpu_or_cpu.split()[1].lower() if device.type == "cuda" else "cpu"
    out = out or Path(__file__).parent / "results" / f"{name}-{short}.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    report = {
        "device": gpu_or_cpu,
        **versions(),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join([start, *(argument.rsplit("/", 1)[-1] for argument in sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        **found,
    }
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")
