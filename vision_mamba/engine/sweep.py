"""Runs of one recipe that differ in one key and the seed, and their table."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from vision_mamba.engine import build
from vision_mamba.engine.config import Config, changed_keys, config_to_dict, load_config
from vision_mamba.engine.plots import replacing
from vision_mamba.engine.train import train
from vision_mamba.errors import UserError

RESULT = "result.json"
MEASURES = ("top1", "best_top1", "best_epoch", "loss")


@dataclass
class Run:
    """One run of a sweep: the key's value as it was given, the seed, what is trained and where."""

    value: str
    seed: int
    config: Config
    output: Path


def plan(
    recipe: str | Path, key: str, values: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], output: Path
) -> list[Run]:
    """The runs of a sweep, one of each value with the first seed, then with the next.

    Every configuration is read and every model is made, without memory for its weights, so that a mistake in the last
    value is found before the first run.

    Args:
        recipe: YAML file, as for `tools/train.py`.
        key: dotted name of the key that varies.
        values: YAML text, one or more.
        seeds: one or more.
        overrides: further `section.key=value`, the same for all runs.
        output: folder of the sweep.

    Raises:
        UserError: a wrong key or value, or one that is given twice.
    """
    if any("=" in value for value in values):
        raise UserError(f"--vary {key} takes values only; put section.key=value before it")
    names = [re.sub(r"[^\w.-]+", "-", value).strip("-") or "empty" for value in values]
    for what, given in (("value", names), ("seed", seeds)):
        twice = [g for i, g in enumerate(given) if g in given[:i]]
        if twice:
            raise UserError(f"the {what} {twice[0]} of {key} is given twice")
    runs = []
    for seed in seeds:
        for value, name in zip(values, names, strict=True):
            config = load_config(recipe, [*overrides, f"{key}={value}", f"train.seed={seed}"])
            runs.append(Run(value, seed, config, output / f"{name}-seed{seed}"))
    for run in runs[: len(values)]:
        with torch.device("meta"):
            build.build_model(run.config, run.config.model.num_classes or 10, pretrained=False)
    return runs


def sweep(runs: Sequence[Run], key: str, output: Path) -> str:
    """Trains what is not yet trained and writes `runs.csv` and `table.md` to `output`, anew after every run.

    A run that was interrupted goes on where it stopped; one that has ended is known by its `result.json` and not
    repeated.

    Returns:
        The table, as Markdown: means over the seeds and, from two seeds on, standard deviations.

    Raises:
        UserError: as `train`; or a folder holds a run of another configuration.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep runs in one process; start it without torchrun")
    results: list[tuple[Run, dict[str, float]]] = []
    table = ""
    for number, run in enumerate(runs, 1):
        result = _finished(run)
        done = " (done before)" if result else ""
        print(f"\n[{number}/{len(runs)}] {key}={run.value}, seed {run.seed}{done}", flush=True)
        if result is None:
            metrics = train(run.config, run.output, resume="auto")
            result = {
                "top1": metrics["last"]["top1"],
                "best_top1": metrics["best"]["top1"],
                "best_epoch": metrics["best_epoch"],
                "loss": metrics["last"]["loss"],
            }
            with replacing(run.output / RESULT) as temporary:
                temporary.write_text(json.dumps({**result, "config": config_to_dict(run.config)}, indent=1) + "\n")
        results.append((run, result))
        with replacing(output / "runs.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow((key, "seed", *MEASURES, "folder"))
            writer.writerows((r.value, r.seed, *(m[name] for name in MEASURES), r.output.name) for r, m in results)
        table = _markdown(key, results)
        with replacing(output / "table.md") as temporary:
            temporary.write_text(table)
    return table


def _finished(run: Run) -> dict[str, float] | None:
    path = run.output / RESULT
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        keys = changed_keys(saved["config"], config_to_dict(run.config))
        result = {name: saved[name] for name in MEASURES}
    except (OSError, ValueError, KeyError):
        raise UserError(f"{path} is damaged: delete it, and the run's result is measured again") from None
    if keys:
        raise UserError(
            f"{run.output} holds a run of another configuration ({', '.join(keys)} differ); choose another --output"
        )
    return result


def _markdown(key: str, results: Sequence[tuple[Run, dict[str, float]]]) -> str:
    lines = [f"| {key} | runs | top-1, last epoch | top-1, best epoch |", "|---|---:|---:|---:|"]
    for value in dict.fromkeys(run.value for run, _ in results):
        of_value = [result for run, result in results if run.value == value]
        cells = [_spread([result[name] for result in of_value]) for name in ("top1", "best_top1")]
        lines.append(f"| {value} | {len(of_value)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"
