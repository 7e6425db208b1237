"""Runs of one recipe that differ in a few keys and the seed, one after another or several at once, and their table."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml

import vision_mamba
from vision_mamba.engine import build
from vision_mamba.engine.checkpoint import LOG
from vision_mamba.engine.config import Config, changed_keys, config_from_dict, config_to_dict, load_config
from vision_mamba.engine.train import train
from vision_mamba.errors import UserError, nearest, run_main
from vision_mamba.files import replacing

RESULT = "result.json"
MEASURES = (
    "top1",
    "f1",
    "loss",
    "best_epoch",
    "best_top1",
    "best_f1",
    "train_loss",
    "parameters",
    "images_per_s",
)


@dataclass
class Run:
    """One run of a sweep: the name of its variant, the seed, what is trained and where."""

    variant: str
    seed: int
    config: Config
    output: Path


def read_variants(path: str | Path, names: Sequence[str] = ()) -> dict[str, list[str]]:
    """Reads a file of variants: a mapping from a name to the keys that it sets, as `{section.key: value}`.

    Args:
        path: YAML file.
        names: those to take, in this order; none takes all.

    Returns:
        For each variant its overrides, as `plan` takes them.

    Raises:
        UserError: the file cannot be read or holds something else, or a name is not in it.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"variants file {path} cannot be read: {error}") from None
    if not isinstance(tree, dict) or not tree or not all(isinstance(keys, dict) for keys in tree.values()):
        raise UserError(f"variants file {path} must map names to keys, such as 'small: {{model.name: vim_tiny}}'")
    for name in names:
        if name not in tree:
            raise UserError(f"{path} has no variant {name!r}{nearest(name, tree)} (it has: {', '.join(tree)})")
    return {
        # JSON is YAML, and stays on one line.
        str(name): [f"{key}={json.dumps(value)}" for key, value in tree[name].items()]
        for name in (names or tree)
    }


def vary(key: str, values: Sequence[str]) -> dict[str, list[str]]:
    """Variants that differ in one key: each value (YAML text) is the name of one.

    Raises:
        UserError: a value is given twice, or looks like an override of another key.
    """
    if any("=" in value for value in values):
        raise UserError(f"--vary {key} takes values only; put section.key=value before it")
    for i, value in enumerate(values):
        if _folder(value) in map(_folder, values[:i]):
            raise UserError(f"the value {value} of {key} is given twice")
    return {value: [f"{key}={value}"] for value in values}


def plan(
    recipe: str | Path,
    variants: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    overrides: Sequence[str],
    output: Path,
) -> list[Run]:
    """The runs of a sweep, one of each variant with the first seed, then with the next.

    Every configuration is read and every model is made, without memory for its weights, so that a mistake in a key or a
    model of the last variant is found before the first run.

    Args:
        recipe: YAML file, as for `tools/train.py`.
        variants: from `vary` or `read_variants`: names and overrides.
        seeds: one or more.
        overrides: further `section.key=value`, the same for all runs; a variant's own come after them.
        output: folder of the sweep.

    Raises:
        UserError: a wrong key or value, two variants whose folders would have one name, or a seed given twice.
    """
    for what, given in (("variant", [_folder(name) for name in variants]), ("seed", seeds)):
        twice = [g for i, g in enumerate(given) if g in given[:i]]
        if twice:
            raise UserError(f"the {what} {twice[0]} is given twice")
    runs = []
    for seed in seeds:
        for name, own in variants.items():
            config = load_config(recipe, [*overrides, *own, f"train.seed={seed}"])
            runs.append(Run(name, seed, config, output / f"{_folder(name)}-seed{seed}"))
    for run in runs[: len(variants)]:
        with torch.device("meta"):
            build.build_model(run.config, run.config.model.num_classes or 10, pretrained=False)
    return runs


def sweep(runs: Sequence[Run], title: str, output: Path, *, jobs: int = 1, every_s: float = 10.0) -> str:
    """Trains what is not yet trained and writes `runs.csv` and `table.md` to `output`, anew after every run.

    A run that was interrupted goes on where it stopped; one that has ended is known by its `result.json` and not
    repeated. A run that fails (its loss is no longer finite, for example) does not keep the others from running.

    Args:
        runs: from `plan`.
        title: what varies, for the table's first column.
        output: folder of the sweep.
        jobs: runs at the same time, each a process. They take the visible GPUs in turn; on a CPU they share its cores
            (another number of jobs is another number of threads a run, and so other bits). What a run prints goes to
            `<its folder>.txt`.
        every_s: seconds between lines of progress where there are several jobs.

    Returns:
        The table, as Markdown: means over the seeds and, from two seeds on, standard deviations.

    Raises:
        UserError: a run failed (said when all others have ended), or a folder holds a run of another configuration.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep runs in one process; start it without torchrun")
    results = {run.output: result for run in runs if (result := _finished(run))}
    failed: dict[Path, str] = {}

    def ended(run: Run, error: str | None) -> None:
        if error is None:
            results[run.output] = _finished(run) or {}
        else:
            failed[run.output] = error
        _write_table(runs, results, title, output)

    for run in runs:
        if run.output in results:
            print(f"{run.output.name}: done before", flush=True)
    _write_table(runs, results, title, output)
    left = [run for run in runs if run.output not in results]
    if jobs > 1:
        _run_processes(left, jobs, every_s, ended)
    else:
        for number, run in enumerate(left, 1):
            print(f"\n[{number}/{len(left)}] {title} {run.variant}, seed {run.seed}", flush=True)
            error = None
            try:
                train_run(run.config, run.output)
            except (UserError, RuntimeError) as e:  # RuntimeError: the device's memory, for example
                error = str(e).strip().partition("\n")[0]
                print(f"failed: {error}", flush=True)
            ended(run, error)
    if failed:
        first = next(run for run in runs if run.output in failed)
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed (the others are in {output / 'table.md'}); {first.output.name}: "
            f"{failed[first.output]}"
        )
    return (output / "table.md").read_text()


def train_run(config: Config, output: Path) -> None:
    """One run of a sweep, from where it stopped, and its `result.json`."""
    metrics = train(config, output, resume="auto")
    if metrics["train_loss"] is None:
        raise UserError(
            f"{output / LOG} is missing, which holds the run's loss and speed; delete the folder to run it again"
        )
    result = {
        **{name: metrics["last"][name] for name in ("top1", "f1", "loss")},
        "best_epoch": metrics["best_epoch"],
        **{f"best_{name}": metrics["best"][name] for name in ("top1", "f1")},
        **{name: metrics[name] for name in ("train_loss", "parameters", "images_per_s")},
    }
    with replacing(output / RESULT) as temporary:
        temporary.write_text(json.dumps({**result, "config": config_to_dict(config)}, indent=1) + "\n")


def _run_processes(runs: Sequence[Run], jobs: int, every_s: float, ended: Any) -> None:
    """Trains the runs, `jobs` at a time, and calls `ended(run, error or None)` after each."""
    waiting, free = list(runs), list(range(min(jobs, len(runs))))
    slots = len(free)
    running: dict[int, tuple[Run, subprocess.Popen]] = {}
    done = bad = 0
    start = shown = time.perf_counter()
    with ExitStack() as stack:
        stack.callback(lambda: _stop([process for _, process in running.values()]))  # Ctrl-C, or a mistake of ours
        while waiting or running:
            while waiting and free:
                slot = free.pop(0)
                run = waiting.pop(0)
                running[slot] = run, _start(run, slot, slots)
            time.sleep(0.2)
            for slot, (run, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                free.append(slot)
                error = _error(run, process.returncode)
                done, bad = done + (error is None), bad + (error is not None)
                ended(run, error)
                print(f"{run.output.name}: {f'failed: {error}' if error else 'done'}", flush=True)
            if time.perf_counter() - shown >= every_s and running:
                shown = time.perf_counter()
                print(
                    f"{shown - start:5.0f} s  {done}/{len(runs)} done{f', {bad} failed' if bad else ''}; "
                    + ", ".join(
                        f"{run.output.name} {_epochs(run)}/{run.config.schedule.epochs}" for run, _ in running.values()
                    ),
                    flush=True,
                )


def _start(run: Run, slot: int, slots: int) -> subprocess.Popen:
    environment = dict(os.environ)
    if run.config.train.device != "cpu" and torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    # The package that this process runs, installed or not.
    path = [str(Path(vision_mamba.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // slots, 1)))
    run.output.parent.mkdir(parents=True, exist_ok=True)
    # The configuration goes as a file: of a pipe nobody can see later what was asked for.
    settings = _beside(run, "json")
    with replacing(settings) as temporary:
        temporary.write_text(json.dumps(config_to_dict(run.config)))
    with open(_beside(run, "txt"), "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "vision_mamba.engine.sweep", str(settings), str(run.output)],
            stdin=subprocess.PIPE,  # closed with us, however we end: the run then ends too
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _beside(run: Run, ending: str) -> Path:
    # The folder itself is made by the training, when nothing can be wrong any more.
    return run.output.with_name(f"{run.output.name}.{ending}")


def _error(run: Run, code: int) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"killed by signal {-code} (9 may be a lack of memory); what it printed is in {_beside(run, 'txt')}"
    lines = _beside(run, "txt").read_text(errors="replace").strip().splitlines() or ["it ended without a word"]
    return lines[-1].removeprefix("error: ")


def _epochs(run: Run) -> int:
    try:
        return max(len((run.output / LOG).read_text().splitlines()) - 1, 0)
    except OSError:
        return 0


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


def _write_table(runs: Sequence[Run], results: Mapping[Path, Mapping[str, float]], title: str, output: Path) -> None:
    ended = [(run, results[run.output]) for run in runs if run.output in results]
    with replacing(output / "runs.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((title, "seed", *MEASURES, "folder"))
        writer.writerows((r.variant, r.seed, *(m[name] for name in MEASURES), r.output.name) for r, m in ended)
    with replacing(output / "table.md") as temporary:
        temporary.write_text(_markdown(title, ended))


def _markdown(title: str, ended: Sequence[tuple[Run, Mapping[str, float]]]) -> str:
    # Heading, measure, factor, decimals.
    columns = (
        ("top-1, last epoch", "top1", 100, 2),
        ("macro F1, last epoch", "f1", 100, 2),
        ("top-1, best epoch", "best_top1", 100, 2),
        ("training loss, last epoch", "train_loss", 1, 4),
        ("parameters, M", "parameters", 1e-6, 2),
        ("training images/s", "images_per_s", 1, 0),
    )
    lines = [f"| {title} | runs | {' | '.join(heading for heading, *_ in columns)} |", f"|---|{'---:|' * 7}"]
    for variant in dict.fromkeys(run.variant for run, _ in ended):
        of_variant = [result for run, result in ended if run.variant == variant]
        cells = []
        for _, name, factor, decimals in columns:
            values = [factor * result[name] for result in of_variant]
            # Parameters do not vary.
            spread = f" ± {stdev(values):.{decimals}f}" if len(values) > 1 and name != "parameters" else ""
            cells.append(f"{mean(values):.{decimals}f}{spread}")
        lines.append(f"| {variant} | {len(of_variant)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "empty"


def _end_with_parent() -> None:
    # Until our parent's end of the pipe is closed, by itself or by its death. Not sys.stdin: a thread that holds its
    # lock when the interpreter ends aborts the process.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":  # one run of `_run_processes`
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run_main(lambda: train_run(config_from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])))
