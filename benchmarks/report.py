"""The files in results/: what was measured, on which device, with which versions and command, when."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vision_mamba.engine.benchmark import device_name
from vision_mamba.engine.checkpoint import versions
from vision_mamba.files import replacing

RESULTS = Path(__file__).parent / "results"


def short_name(device: torch.device) -> str:
    """The device in the names of files, such as ``h100`` or ``cpu``."""
    return device_name(device).split()[1].lower() if device.type == "cuda" else "cpu"


def write_results(name: str, device: torch.device, start: str, out: Path | None, **found: Any) -> None:
    """Writes ``out``, or results/NAME-DEVICE.json where it is None, and says so.

    Args:
        name: of the benchmark, in the file's name.
        start: how the program is started, before its arguments.
        found: what was measured, and what else must be known to measure it again.
    """
    out = out or RESULTS / f"{name}-{short_name(device)}.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    report = {
        "device": device_name(device),
        **versions(),
        "triton": metadata.version("triton") if device.type == "cuda" else None,
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join([start, *(argument.rsplit("/", 1)[-1] for argument in sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        **found,
    }
    write_json(out, report)
    print(f"wrote {out}")


def write_json(path: Path, report: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
