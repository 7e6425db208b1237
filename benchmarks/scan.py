"""Times the selective scan and checks it: no time is printed for a shape whose output is wrong.

    python -m benchmarks.scan                      # the table, written to benchmarks/results/scan-<gpu>.json
    python -m benchmarks.scan --rows 0 9 --profile
    python -m benchmarks.scan --tune --rows 0 4    # launch configurations, sorted by time

Two floors stand beside each time: bytes that must move (each input read once, each output written once)
over the measured copy bandwidth, and exponentials (one a state element; two in the backward pass, which
must find the states again) over sixteen a clock and multiprocessor. Times are medians of CUDA graph
replays with a cold L2 cache. Where ``mamba_ssm`` is installed its CUDA kernels are timed beside ours; with
several paths its time includes the copies that its layout needs before and after the kernel.

``--tune`` compiles every candidate in parallel, without a GPU for an H100, and reports registers, stack
(what does not fit in registers) and shared memory. On a GPU it also checks each against float64 and times it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.report import write_results
from vision_mamba.ops import reference
from vision_mamba.ops.triton import selective_scan as kernels

# batch, channels, length, states, paths
ROWS = [
    (128, 384, 197, 16, 1),
    (128, 768, 197, 16, 1),
    (32, 384, 785, 16, 1),
    (32, 384, 1025, 16, 1),
    (16, 384, 2048, 16, 1),
    (16, 384, 2049, 16, 1),
    (8, 384, 6085, 16, 1),
    (1, 384, 6085, 16, 1),
    (1, 384, 65536, 16, 1),
    (128, 96, 3136, 1, 4),
    (128, 192, 784, 1, 4),
    (16, 256, 4096, 64, 1),  # Samba's second level at 512 pixels
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
PARAMETERS = ("A", "D", "delta_bias")


H100 = GPUTarget("cuda", 90, 32), 132  # and its multiprocessors
_REFERENCE_NUMBERS = 2**26  # state elements that the float64 reference holds at once


def make(batch, dim, length, states, paths, dtype, device="cuda"):
    """Vim's arguments with one path; SS2D's, summed and without a gate, with four."""
    torch.manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    side = math.isqrt(length)
    table = torch.arange(length, device=device, dtype=torch.int32)[None]
    if paths == 4:
        columns = table.reshape(side, side).t().reshape(1, length)
        table = torch.cat([table, columns, table.flip(1), columns.flip(1)])
    A = -torch.arange(1, states + 1, device=device).float().expand(paths, dim, states).contiguous()
    return {
        "u": normal(batch, length, 1, dim), "delta": normal(batch, length, paths, dim), "A": A,
        "B": normal(batch, length, paths, 1, states), "C": normal(batch, length, paths, 1, states),
        "D": normal(paths, dim, dtype=torch.float32), "z": normal(batch, length, 1, dim) if paths == 1 else None,
        "delta_bias": normal(paths, dim, dtype=torch.float32) - 3, "paths": table.contiguous(),
    }  # fmt: skip


def forward(x, merge, save_states):
    return kernels.selective_scan_forward(*x.values(), None, True, merge, save_states)


def backward(x, merge, borders, dy, y):
    """With the output where autograd would give it."""
    y = y if kernels.wants_output(x["u"], x["A"], x["z"], merge) else None
    return kernels.selective_scan_backward(dy, None, borders, *x.values(), None, True, merge, y)


class Check:
    """Outputs and gradients of two images of the batch in float64, a few channels at a time."""

    def __init__(self, x, merge, dy):
        batch, length, num_paths, dim = x["delta"].shape
        self.images = sorted({0, batch - 1})
        self.dy = torch.zeros_like(dy)  # the other images then add nothing to the gradients of the parameters
        self.dy[self.images] = dy[self.images]
        present = [name for name in NAMES if x[name] is not None]
        numbers = len(self.images) * length * num_paths * x["A"].shape[-1]
        width = max(1, min(dim, _REFERENCE_NUMBERS // numbers))
        pieces = {"y": [], **{name: [] for name in present}}
        for start in range(0, dim, width):
            channels = slice(start, start + width)
            leaves = {}
            for name in present:
                tensor = x[name] if name in PARAMETERS else x[name][self.images]
                if name not in ("B", "C"):
                    tensor = tensor[:, channels] if name in PARAMETERS else tensor[..., channels]
                leaves[name] = tensor.double().requires_grad_()
            y = reference.selective_scan(
                **{n: t.squeeze(2) if n in "uz" and t.shape[2] == 1 else t for n, t in leaves.items()},
                delta_softplus=True, paths=x["paths"], merge="sum" if merge else "none",
                chunk=math.isqrt(length) + 1,
            )  # fmt: skip
            grads = torch.autograd.grad(y, list(leaves.values()), dy[self.images][..., channels].double())
            pieces["y"].append(y.detach())
            for name, grad in zip(present, grads, strict=True):
                pieces[name].append(grad)
        self.expected = {
            name: sum(parts) if name in ("B", "C") else torch.cat(parts, dim=1 if name in PARAMETERS else -1)
            for name, parts in pieces.items()
        }

    def error(self, y, grads) -> float:
        """The largest relative error of the output and of the gradients for ``self.dy``; NaN if there is one."""
        ours = {"y": y} | dict(zip(NAMES, grads, strict=False))
        errors = []
        for name, expected in self.expected.items():
            found = ours[name] if name in PARAMETERS else ours[name][self.images]
            errors.append(((found.double() - expected).norm() / expected.norm()).item())
        return math.nan if any(e != e for e in errors) else max(errors)


def milliseconds(function, repeats: int) -> float:
    """Median of graph replays, each after a write that evicts the L2 cache."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    evict = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        evict.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def size(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def extra_memory(function) -> int:
    """Bytes allocated at the peak of a call beyond what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = function()
    return torch.cuda.max_memory_allocated() - before - size(*returned)


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, counted read and written; exponentials a second."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = milliseconds(lambda: target.copy_(source), 20) / 1000
    device = torch.cuda.get_device_properties(0)
    clock = getattr(device, "clock_rate", 0) * 1000 or 1.755e9
    return 2 * size(source) / seconds, 16 * device.multi_processor_count * clock


def cross_scan(x):
    """(batch, D, side, side) -> (batch, 4 * D, L): rows, columns and both from the end, as SS2D copies them."""
    two = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], dim=1)
    return torch.cat([two, two.flip(-1)], dim=1).flatten(1, 2)


def cross_merge(y, side):
    """Its adjoint: (batch, 4 * D, L) -> (batch, D, side, side)."""
    y = y.unflatten(1, (4, -1))
    two = y[:, :2] + y[:, 2:].flip(-1)
    return two[:, 0].unflatten(-1, (side, side)) + two[:, 1].unflatten(-1, (side, side)).transpose(2, 3)


def mamba_ssm_times(x, dy, repeats) -> dict:
    """Milliseconds of the CUDA kernels on their own layout; nothing where they are not installed."""
    try:
        import selective_scan_cuda
    except ImportError:
        return {}
    paths = x["delta"].shape[2]

    def channels_first(t):  # (batch, L, 1 or K, D) -> (batch, K * D, L)
        return t.expand(-1, -1, paths, -1).flatten(2).transpose(1, 2).contiguous()

    u, delta = channels_first(x["u"]), channels_first(x["delta"])
    z = None if x["z"] is None else channels_first(x["z"])
    B, C = (t.squeeze(3).permute(0, 2, 3, 1).contiguous() for t in (x["B"], x["C"]))
    A, D, bias = x["A"].flatten(0, 1), x["D"].flatten(), x["delta_bias"].flatten()
    out, states, *_ = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
    grad = channels_first(dy if dy.ndim == 4 else dy.unsqueeze(2))
    times = {
        "peer": "mamba_ssm",
        "peer_fwd_ms": milliseconds(lambda: selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True), repeats),
        "peer_bwd_ms": milliseconds(
            lambda: selective_scan_cuda.bwd(u, delta, A, B, C, D, z, bias, grad, states, out, None, True, False),
            repeats,
        ),
    }
    if paths == 4:  # one copy in and one out in either direction
        side = math.isqrt(u.shape[-1])
        image = x["u"].squeeze(2).transpose(1, 2).unflatten(-1, (side, side)).contiguous()
        copies = milliseconds(lambda: (cross_scan(image), cross_merge(out, side)), repeats)
        times |= {name: times[name] + copies for name in ("peer_fwd_ms", "peer_bwd_ms")} | {"peer_copies_ms": copies}
    return times


def compilations() -> int:
    """Kernels compiled or loaded in this process so far."""
    jitted = [kernel for kernel in vars(kernels).values() if isinstance(kernel, JITFunction)]
    return sum(len(cache[0]) for kernel in jitted for cache in kernel.device_caches.values())


def measure(row, dtype_name: str, bandwidth: float, exponentials: float, repeats: int, profile: bool) -> dict:
    batch, dim, length, states, paths = row
    x = make(*row, getattr(torch, dtype_name))
    merge = paths > 1
    torch.cuda.synchronize()
    started, compiled = time.perf_counter(), compilations()
    y, _, borders = forward(x, merge, True)
    torch.cuda.synchronize()
    halfway = time.perf_counter()
    dy = torch.randn_like(y)
    grads = [grad for grad in backward(x, merge, borders, dy, y) if grad is not None]
    torch.cuda.synchronize()
    result = {
        "B": batch, "D": dim, "L": length, "N": states, "K": paths, "dtype": dtype_name,
        "first_forward_s": halfway - started, "first_backward_s": time.perf_counter() - halfway,
        "compilations": compilations() - compiled,
    }  # fmt: skip
    check = Check(x, merge, dy)
    result["rel_err"] = check.error(y, backward(x, merge, borders, check.dy, y))
    del check
    if not result["rel_err"] <= TOLERANCE[dtype_name]:
        return result

    def train_backward():
        return [grad for grad in backward(x, merge, borders, dy, y) if grad is not None]

    inputs = size(*x.values())
    elements = batch * dim * length * states * paths
    result |= {
        "ours_fwd_ms": milliseconds(lambda: forward(x, merge, False), repeats),
        "ours_fwd_train_ms": milliseconds(lambda: forward(x, merge, True), repeats),
        "ours_bwd_ms": milliseconds(train_backward, repeats),
        "floor_fwd_ms": 1e3 * max((inputs + size(y)) / bandwidth, elements / exponentials),
        "floor_bwd_ms": 1e3 * max((inputs + size(dy, *grads)) / bandwidth, 2 * elements / exponentials),
        "extra_memory": max(extra_memory(lambda: forward(x, merge, True)), extra_memory(train_backward)) / inputs,
        "borders_memory": size(borders) / inputs,
        "peer": None, "peer_fwd_ms": None, "peer_bwd_ms": None,
    }  # fmt: skip
    result |= mamba_ssm_times(x, dy, repeats)
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(5):
                forward(x, merge, True)
                train_backward()
            torch.cuda.synchronize()
        for event in sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)[:8]:
            print(f"    {event.device_time_total / 5000:8.4f} ms  {event.key[:90]}")
    return result


class _NoDevice:
    """Stands in for Triton's driver where kernels are only compiled, for ``target``."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _wanted_programs(sms: int):
    """``kernels._wanted_programs`` of a device of so many multiprocessors."""
    return lambda device, config: sms * config.resident // config.warps


@contextlib.contextmanager
def configured(direction: str, config, sms: int | None = None):
    """The operator with this launch configuration in one direction, on a device of ``sms`` multiprocessors."""
    chunk = config.steps * config.tiles if direction == "backward" else kernels._chunk(config.states)
    name = f"_gluon_{direction}_config" if config.gluon else f"_{direction}_config"
    patches = {name: lambda *shape, **options: config, "_chunk": lambda num_states: chunk}
    if not config.gluon:
        patches["_uses_gluon"] = lambda num_states, device: False
    if sms is not None:
        patches["_wanted_programs"] = _wanted_programs(sms)
    with mock.patch.multiple(kernels, **patches):
        yield


def launches(row, dtype_name: str, direction: str, config, sms: int, compile: bool) -> list[tuple]:
    """(kernel, grid, compiled kernel or None) of a pass, on tensors without memory: nothing is launched."""
    found = []
    run = JITFunction.run

    def record(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options) if compile else None
        found.append((kernel.__name__, grid, compiled))
        return compiled

    batch, dim, length, states, paths = row
    x = make(*row, getattr(torch, dtype_name), device="meta")
    with configured(direction, config, sms), mock.patch.object(JITFunction, "run", record):
        if direction == "forward":
            forward(x, paths > 1, True)
        else:
            dy = torch.empty((batch, length, dim) if paths > 1 else x["delta"].shape, dtype=x["u"].dtype, device="meta")
            borders = kernels.new_states(x["u"], x["delta"], x["B"], states, True)
            backward(x, paths > 1, borders, dy, torch.empty_like(dy))
    return found


def compile_candidate(row, dtype_name, direction, config, target, sms) -> dict:
    """Resources of the pass's main kernel. Runs in a process of its own and fills the disk cache."""
    triton.runtime.driver.set_active(_NoDevice(target))
    found = launches(row, dtype_name, direction, config, sms, compile=True)
    main = f"scan_{direction}_kernel"
    # The last of that name: spans start with one that gives no y.
    *_, (grid, compiled) = (rest for name, *rest in found if name.removeprefix("_") == main)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return {
        "programs": grid[0], "registers": used["REG"], "stack": used["STACK"], "shared": compiled.metadata.shared,
        "barriers": len(re.findall(r"\bbar(?:rier)?\.(?:warp\.)?sync", compiled.asm["ptx"])),
    }  # fmt: skip


def portable_candidates(default, states: int, direction: str) -> list:
    chunk, tile = kernels._chunk(states), kernels._forward_config(states).steps
    most = 128 if direction == "forward" else 32
    found = []
    for warps in (1, 2, 4, 8):
        for steps in (2, 4, 8, 16):
            for tiles in (1,) if direction == "forward" else (2, 4, 8):
                # The forward pass saves the states between its tiles.
                linked = chunk % steps == 0 if direction == "forward" else steps * tiles % tile == 0
                a_tile, borders = steps * default.states // warps, tiles * default.states // warps  # numbers a thread
                if linked and warps <= default.states and 4 <= a_tile <= most and borders <= 64:
                    found.append(default._replace(steps=steps, warps=warps, tiles=tiles))
    return found


def candidates(row, dtype_name: str, direction: str, sms: int) -> list:
    """The default first, then what fits in registers; of those with equal launches only one."""
    states = row[3]
    shares = kernels._shares(states, row[4], torch.device("meta"))
    if kernels._uses_gluon(states // shares, torch.device("meta")):
        states //= shares
        programs = row[0] * row[4] * shares * triton.cdiv(row[1], 32)
        choose = getattr(kernels, f"_gluon_{direction}_config")
        of_device = {"_wanted_programs": _wanted_programs(sms), "multiprocessors": lambda device: sms}
        with mock.patch.multiple(kernels, **of_device):
            default = choose(states, torch.device("meta"), programs, row[2])
        if direction == "forward":
            found = [default]
            shapes = (
                (32, 1, 8), (32, 1, 4), (16, 1, 8), (16, 1, 16), (32, 2, 8), (16, 2, 16), (16, 2, 32),
                (32, 4, 16), (32, 4, 32), (16, 4, 32),
            )  # fmt: skip
            for block, warps, steps in shapes:
                for registers in (None, 168) if warps == 1 else (None,):
                    found.append(default._replace(block=block, warps=warps, steps=steps, registers=registers))
        else:
            found = [default, *(default._replace(registers=registers) for registers in (224, 168))]
        found += [default._replace(spans=spans) for spans in (1, 2, 3, 5, 8, 11, 16, 22, 32, 44, 78)]
    else:
        default = getattr(kernels, f"_{direction}_config")(states)
        found = [default, *portable_candidates(default, states, direction)]
        found += [default._replace(resident=resident) for resident in (4, 6, 8, 12, 16, 24, 32)]  # more or fewer spans
    distinct = {}
    for config in found:
        grids = tuple(grid for _, grid, _ in launches(row, dtype_name, direction, config, sms, compile=False))
        distinct.setdefault((config._replace(resident=0, spans=0), grids), config)
    return list(distinct.values())


def tune(pool, row, dtype_name: str, direction: str, repeats: int) -> None:
    """Prints the candidates of one pass, the fastest first; without a GPU in the order of the sweep."""
    gpu = torch.cuda.is_available()
    target, sms = H100
    if gpu:
        target = triton.runtime.driver.active.get_current_target()
        sms = torch.cuda.get_device_properties(0).multi_processor_count
    configs = candidates(row, dtype_name, direction, sms)
    started = time.perf_counter()
    jobs = [pool.submit(compile_candidate, row, dtype_name, direction, config, target, sms) for config in configs]
    lines = [{"config": config} | job.result() for config, job in zip(configs, jobs, strict=True)]
    print(f"\n{row} {direction}: {len(configs)} candidates compiled in {time.perf_counter() - started:.0f} s")
    if gpu:
        x = make(*row, getattr(torch, dtype_name))
        merge = row[4] > 1
        y, _, borders = forward(x, merge, True)
        dy = torch.randn_like(y)
        check = Check(x, merge, dy)
        for line in lines:
            with configured(direction, line["config"]):
                y, _, borders = forward(x, merge, True)
                line["rel_err"] = check.error(y, backward(x, merge, borders, check.dy, y))
                line["ms"] = math.inf
                if line["rel_err"] <= TOLERANCE[dtype_name]:
                    line["ms"] = milliseconds(
                        (lambda: forward(x, merge, True))
                        if direction == "forward"
                        else (lambda borders=borders, y=y: backward(x, merge, borders, dy, y)),
                        repeats,
                    )
        default = lines[0]
        lines.sort(key=lambda line: line["ms"])
    else:
        default = lines[0]
    print("  steps warps tiles block resident spans programs registers stack shared barriers     error      ms")
    for line in lines:
        config = line["config"]
        print(
            f"{'*' if line is default else ' '} {config.steps:5} {config.warps:5} {config.tiles:5} {config.block:5} "
            f"{config.resident:8} {config.spans:5} {line['programs']:8} {line['registers']:9} {line['stack']:5} "
            f"{line['shared']:6} {line['barriers']:8} "
            f"{line.get('rel_err', math.nan):9.1e} {line.get('ms', math.nan):7.4f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", choices=range(len(ROWS)), help="indices into ROWS")
    parser.add_argument("--dtype", default="bfloat16", choices=TOLERANCE)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument(
        "--tune", action="store_true", help="compare launch configurations; only compiles without a GPU"
    )
    parser.add_argument("--direction", nargs="*", default=["forward", "backward"], choices=["forward", "backward"])
    parser.add_argument(
        "--output", type=Path, help="JSON file; by default benchmarks/results/scan-<gpu>.json for all rows, else none"
    )
    arguments = parser.parse_args()
    chosen = range(len(ROWS)) if arguments.rows is None else arguments.rows
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # else first calls would find last run's kernels
        if arguments.tune:
            with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
                for index in chosen:
                    for direction in arguments.direction:
                        tune(pool, ROWS[index], arguments.dtype, direction, arguments.repeats)
            return 0
        if not torch.cuda.is_available():
            parser.error("needs a GPU")
        return table(arguments, chosen)


def table(arguments, chosen) -> int:
    bandwidth, exponentials = ceilings()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, exponentials {exponentials / 1e12:.2f} T/s")
    rows, lines = [], []
    for index in chosen:
        row = measure(ROWS[index], arguments.dtype, bandwidth, exponentials, arguments.repeats, arguments.profile)
        rows.append(row)
        shape = " ".join(f"{row[name]:>6}" for name in "BDLNK")
        first = f"{row['first_forward_s']:.1f} and {row['first_backward_s']:.1f} s, {row['compilations']} compiled"
        if "ours_fwd_ms" in row:
            peer = {name: math.nan if row[name] is None else row[name] for name in ("peer_fwd_ms", "peer_bwd_ms")}
            lines.append(
                f"{shape} {row['rel_err']:.1e} | {row['ours_fwd_ms']:7.3f} ({row['ours_fwd_train_ms']:.3f}) "
                f"{row['floor_fwd_ms']:.3f} {peer['peer_fwd_ms']:7.3f} | {row['ours_bwd_ms']:7.3f} "
                f"{row['floor_bwd_ms']:.3f} {peer['peer_bwd_ms']:7.3f} | {row['extra_memory']:.2f} "
                f"{row['borders_memory']:.2f} | {first}"
            )
        else:
            lines.append(f"{shape} {row['rel_err']:.1e} | wrong, not timed | {first}")
        print(lines[-1], flush=True)
        torch.cuda.empty_cache()
    gpu = torch.cuda.get_device_name(0)
    print(
        f"\n{gpu}, torch {torch.__version__}, triton {triton.__version__}, {arguments.dtype}\n"
        "B D L N K, error | forward ms (saving states), floor, mamba_ssm | backward, floor, mamba_ssm | "
        "extra memory and border states over inputs | first calls, forward and backward, with an empty cache"
    )
    print("\n".join(lines) + f"\n{compilations()} kernels compiled in all")
    right = all("ours_fwd_ms" in row for row in rows)
    if right and (arguments.output is not None or arguments.rows is None):
        write_results("scan", torch.device("cuda"), "python -m benchmarks.scan", arguments.output, rows=rows)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
