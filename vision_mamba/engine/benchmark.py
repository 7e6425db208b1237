"""Speed and memory of whole models: forward passes and training steps, models taking turns on one device."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timm
import timm.utils
import torch
from torch import Tensor, nn

from vision_mamba.engine.build import create_any_size
from vision_mamba.engine.checkpoint import versions
from vision_mamba.engine.plots import new_figure, replacing, save_figure
from vision_mamba.errors import UserError, nearest

#: Columns of a row, in the order of the CSV file; see :func:`benchmark`.
COLUMNS = (
    "model", "what", "mode", "size", "batch", "ms", "images_per_s", "mib",
    "peer", "peer_images_per_s", "speed_ratio", "peer_mib", "memory_ratio", "error",
)  # fmt: skip

CHECKPOINTED = {"checkpointed": True, "selective": "selective"}  # modes of training alone


class Bench:
    """Times and memory of one model's forward pass, or of its training step, on one device.

    On a GPU under bfloat16 autocast, on a CPU in float32. A forward pass is of the model prepared for inference
    (``timm.utils.reparameterize_model``), whosever it is.

    Args:
        model: on the device of ``x``.
        x: images, (batch, C, H, W).
        training: a step without the optimiser: forward, backward.
        mode: ``"eager"``, ``"compiled"`` (torch.compile), ``"graph"``: the eager kernels replayed as one CUDA graph,
            ``"checkpointed"``: eager with gradient checkpointing, or ``"selective"``: of all but the scans (of whole
            blocks where a model of another library has no scans to keep).
    """

    def __init__(self, model: nn.Module, x: Tensor, *, training: bool, mode: str) -> None:
        if not training:
            model = timm.utils.reparameterize_model(model)  # a copy
        self.model = model.train(training)
        if hasattr(model, "set_grad_checkpointing"):  # the same model may be measured with it before
            model.set_grad_checkpointing(CHECKPOINTED.get(mode, False))
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

    def warm_up(self) -> float | None:
        """Runs until nothing is compiled any more, and gives :meth:`memory`."""
        for _ in range(3 if self.cuda else 1):
            self.run()
        return self.memory()

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


def measure(
    makers: Mapping[str, Callable[[], Bench]], runs: int, *, once: str | None = None
) -> dict[str, dict[str, Any]]:
    """Median ``ms``, ``images_per_s`` and ``mib`` of each; they take turns: drift of the machine hits all alike.

    One that fails has None for these and an ``error``: ``"out of memory"``, or the first line of what was raised. Its
    memory is given back, and the others go on.

    Args:
        makers: what to measure, made when its turn to warm up comes.
        runs: of each.
        once: the name of one that runs only once, and is not warmed up.
    """
    benches: dict[str, Bench] = {}
    memory: dict[str, float | None] = {}
    times: dict[str, list[float]] = {name: [] for name in makers}
    errors: dict[str, str] = {}

    def guarded(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # models, compilers and allocators raise whatever they like
            errors[name] = _reason(error)
            benches.pop(name, None)
        # Outside of the handler: there the traceback still holds the tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    for name, make in makers.items():
        bench = guarded(name, make)
        if bench is not None:
            benches[name] = bench
            if name != once:
                memory[name] = guarded(name, bench.warm_up)
        del bench
    for i in range(runs):
        for name, bench in list(benches.items()):
            if name != once or i == 0:
                seconds = guarded(name, bench.timed)
                if seconds is not None:
                    times[name].append(seconds)
            del bench
    rows: dict[str, dict[str, Any]] = {}
    for name in makers:
        if name in errors:
            rows[name] = {"ms": None, "images_per_s": None, "mib": None, "error": errors[name]}
            continue
        seconds = statistics.median(times[name])
        images = len(benches[name].x)
        rows[name] = {"ms": 1e3 * seconds, "images_per_s": images / seconds, "mib": memory.get(name), "error": None}
    return rows


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    # torch's CPU allocator has no exception of its own.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return text.splitlines()[0]


def benchmark(
    names: Sequence[str],
    settings: Sequence[tuple[int, int]],
    *,
    device: torch.device | str,
    peer: str | None = None,
    training: bool = False,
    compiled: bool = False,
    graph: bool = False,
    checkpointing: bool = False,
    runs: int = 9,
) -> Iterator[dict[str, Any]]:
    """Measures models, a peer beside them where one is named; gives a row of :data:`COLUMNS` as soon as it is known.

    Without a peer each model is measured alone, so that the device's memory holds one.

    ``mib`` is the peak of a pass beyond weights (and gradients, after one step) and input, None on a CPU.
    ``speed_ratio`` is images/s over the peer's, ``memory_ratio`` MiB over the peer's. A model that fails in a row has
    its ``error`` there.

    Args:
        names: timm models.
        settings: (side in pixels, images a batch).
        device: where; on a GPU under bfloat16 autocast, on a CPU in float32.
        peer: a timm model, measured in the same turns.
        training: training steps too.
        compiled: ``torch.compile`` too.
        graph: the eager kernels replayed as one CUDA graph too: the device's time without Python's. On a GPU.
        checkpointing: training with gradient checkpointing too, of whole blocks and of all but the scans.
        runs: of each model in each row; medians are given.

    Raises:
        UserError: an unknown model, ``graph`` without a GPU or ``checkpointing`` without ``training``, before anything
            is measured.
    """
    every = list(dict.fromkeys([*names, *([peer] if peer else [])]))
    for name in every:
        if not timm.is_model(name):
            hint = nearest(name, timm.list_models()) or "; timm.list_models() lists all"
            raise UserError(f"unknown model {name!r}{hint}")
    device = torch.device(device)
    if graph and device.type != "cuda":
        raise UserError("CUDA graphs need a GPU; leave out --graph")
    if checkpointing and not training:
        raise UserError("gradient checkpointing is of training; give --train with --checkpointing")
    modes = ("eager", *(["compiled"] if compiled else []), *(["graph"] if graph else []))
    modes += tuple(CHECKPOINTED) if checkpointing else ()
    # Those that are compared take turns, and are all in memory.
    turns = [every] if peer else [[name] for name in every]
    return _rows(turns, settings, device, peer, (False, True) if training else (False,), modes, runs)


def _rows(turns, settings, device, peer, trainings, modes, runs) -> Iterator[dict[str, Any]]:
    for size, batch in settings:
        for train, mode in product(trainings, modes):
            for names in turns if train or mode not in CHECKPOINTED else []:
                makers = {name: partial(_make, name, size, batch, device, training=train, mode=mode) for name in names}
                found = measure(makers, runs)
                for name in names:
                    row = {"model": name, "what": "training" if train else "inference", "mode": mode}
                    row |= {"size": size, "batch": batch, **found[name]}
                    yield row | _beside(found[name], peer, found.get(peer, {}))


def _make(name: str, size: int, batch: int, device: torch.device, *, training: bool, mode: str) -> Bench:
    model = create_any_size(name, {"img_size": size})
    channels = model.pretrained_cfg["input_size"][0]
    frames = [] if getattr(model, "num_frames", None) is None else [model.num_frames]
    x = torch.randn(batch, channels, *frames, size, size, device=device)
    return Bench(model.to(device), x, training=training, mode=mode)


def _beside(row: Mapping[str, Any], peer: str | None, other: Mapping[str, Any]) -> dict[str, Any]:
    def ratio(name: str) -> float | None:
        return row[name] / other[name] if row[name] and other.get(name) else None

    return {
        "peer": peer,
        "peer_images_per_s": other.get("images_per_s"),
        "speed_ratio": ratio("images_per_s"),
        "peer_mib": other.get("mib"),
        "memory_ratio": ratio("mib"),
    }


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """What the operating system calls the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_benchmark(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike, **about: Any) -> list[Path]:
    """Writes ``benchmark.json`` (with device, versions and date), ``benchmark.csv`` and ``benchmark.png``.

    Args:
        rows: from :func:`benchmark`.
        folder: made where it is missing.
        **about: goes into the JSON file.

    Returns:
        The files.
    """
    folder = Path(folder)
    files = [folder / f"benchmark.{suffix}" for suffix in ("json", "csv", "png")]
    report = {**about, "versions": versions(), "date": datetime.date.today().isoformat(), "rows": list(rows)}
    with replacing(files[0]) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(files[1]) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot_benchmark(rows, files[2])
    return files


def plot_benchmark(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws images/s, and memory where it was measured, against the side of the images, for inference and training.

    Rows with an error leave a gap. The points say how many images a batch has.
    """
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    values = ["images_per_s"] + (["mib"] if any(row["mib"] is not None for row in rows) else [])
    titles = {"images_per_s": "images a second", "mib": "MiB an image"}
    figure = new_figure(4.6 * len(values), 3.6 * len(kinds))
    for at, (what, value) in enumerate(((k, v) for k in kinds for v in values), 1):
        axes = figure.add_subplot(len(kinds), len(values), at)
        lines = dict.fromkeys((row["model"], row["mode"]) for row in rows if row["what"] == what)
        for model, mode in lines:
            points = sorted(
                (row["size"], row[value] / (row["batch"] if value == "mib" else 1), row["batch"])
                for row in rows
                if (row["what"], row["model"], row["mode"]) == (what, model, mode) and row[value] is not None
            )
            if not points:
                continue
            label = model if mode == "eager" else f"{model}, {mode}"
            axes.plot(*zip(*((x, y) for x, y, _ in points), strict=True), marker="o", markersize=4, label=label)
            for x, y, batch in points:
                axes.annotate(f"x{batch}", (x, y), textcoords="offset points", xytext=(3, 4), fontsize=6, alpha=0.6)
        sizes = sorted({row["size"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("pixels a side (batch beside the points)")
        axes.set_title(f"{what}: {titles[value]}")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    save_figure(figure, path)
