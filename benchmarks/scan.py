"""Times the selective scan and checks it: no time is printed for a shape whose output is wrong.

    python benchmarks/scan.py                      # the table, written to benchmarks/results/scan-<gpu>.json
    python benchmarks/scan.py --rows 0 9 --profile

Two floors stand beside each time: bytes that must move (each input read once, each output written once)
over the measured copy bandwidth, and exponentials (one a state element; two in the backward pass, which
must find the states again) over sixteen a clock and multiprocessor. Times are medians of CUDA graph
replays with a cold L2 cache. Where ``mamba_ssm`` is installed its CUDA kernels are timed beside ours.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

from vision_mamba.ops import reference
from vision_mamba.ops.triton import selective_scan_backward, selective_scan_forward

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
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def make(batch, dim, length, states, paths, dtype):
    """Vim's arguments with one path; SS2D's, summed and without a gate, with four."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    side = math.isqrt(length)
    table = torch.arange(length, device="cuda", dtype=torch.int32)[None]
    if paths == 4:
        columns = table.reshape(side, side).t().reshape(1, length)
        table = torch.cat([table, columns, table.flip(1), columns.flip(1)])
    A = -torch.arange(1, states + 1, device="cuda").float().expand(paths, dim, states).contiguous()
    return {
        "u": normal(batch, length, 1, dim), "delta": normal(batch, length, paths, dim), "A": A,
        "B": normal(batch, length, paths, 1, states), "C": normal(batch, length, paths, 1, states),
        "D": torch.randn(paths, dim, device="cuda"), "z": normal(batch, length, 1, dim) if paths == 1 else None,
        "delta_bias": torch.randn(paths, dim, device="cuda") - 3, "paths": table.contiguous(),
    }  # fmt: skip


def forward(x, merge, save_states):
    return selective_scan_forward(*x.values(), None, True, merge, save_states)


def check(x, merge, y, grads_of, dy) -> float:
    """The largest relative error of outputs and gradients, from two images of the batch in float64."""
    batch = x["u"].shape[0]
    images = sorted({0, batch - 1})
    masked = torch.zeros_like(dy)  # the other images then add nothing to the gradients of the parameters
    masked[images] = dy[images]
    grads = dict(zip(NAMES, grads_of(masked), strict=False))
    parameters = ("A", "D", "delta_bias")
    leaves = {
        name: (x[name] if name in parameters else x[name][images]).double().requires_grad_()
        for name in NAMES
        if x[name] is not None
    }
    squeezed = {name: leaf.squeeze(2) if name in "uz" and leaf.shape[2] == 1 else leaf for name, leaf in leaves.items()}
    expected = reference.selective_scan(
        **squeezed, delta_softplus=True, paths=x["paths"], merge="sum" if merge else "none"
    )  # fmt: skip
    expected_grads = torch.autograd.grad(expected, list(leaves.values()), dy[images].double())
    pairs = [(y[images], expected)]
    for (name, _), grad in zip(leaves.items(), expected_grads, strict=True):
        pairs.append((grads[name] if name in parameters else grads[name][images], grad))
    errors = [((ours.double() - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]
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


def mamba_ssm_times(x, dy, repeats):
    """(forward, backward) of the CUDA kernels on their own layout, or None where they are not installed."""
    try:
        import selective_scan_cuda
    except ImportError:
        return None
    paths = x["delta"].shape[2]

    def channels_first(t):  # (batch, L, 1 or K, D) -> (batch, K * D, L)
        return t.expand(-1, -1, paths, -1).flatten(2).transpose(1, 2).contiguous()

    u, delta = channels_first(x["u"]), channels_first(x["delta"])
    z = None if x["z"] is None else channels_first(x["z"])
    B, C = (t.squeeze(3).permute(0, 2, 3, 1).contiguous() for t in (x["B"], x["C"]))
    A, D, bias = x["A"].flatten(0, 1), x["D"].flatten(), x["delta_bias"].flatten()
    out, states, *_ = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
    grad = channels_first(dy if dy.ndim == 4 else dy.unsqueeze(2))
    return (
        milliseconds(lambda: selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True), repeats),
        milliseconds(
            lambda: selective_scan_cuda.bwd(u, delta, A, B, C, D, z, bias, grad, states, out, None, True, False),
            repeats,
        ),
    )


def measure(row, dtype_name: str, bandwidth: float, exponentials: float, repeats: int, profile: bool) -> dict:
    batch, dim, length, states, paths = row
    dtype = getattr(torch, dtype_name)
    x = make(*row, dtype)
    merge = paths > 1
    started = time.perf_counter()
    y, last_state, borders = forward(x, merge, True)
    dy = torch.randn_like(y)

    def backward(dy=dy):
        grads = selective_scan_backward(dy, None, borders, *x.values(), None, True, merge)
        return tuple(grad for grad in grads if grad is not None)

    def named(dy):
        return selective_scan_backward(dy, None, borders, *x.values(), None, True, merge)

    grads = backward()
    torch.cuda.synchronize()
    first_call = time.perf_counter() - started
    error = check(x, merge, y, named, dy)
    result = {
        "B": batch,
        "D": dim,
        "L": length,
        "N": states,
        "K": paths,
        "dtype": dtype_name,
        "rel_err": error,
        "first_call_s": first_call,
    }
    if not error <= TOLERANCE[dtype_name]:
        return result
    inputs = size(*x.values())
    elements = batch * dim * length * states * paths
    result |= {
        "ours_fwd_ms": milliseconds(lambda: forward(x, merge, False), repeats),
        "ours_fwd_train_ms": milliseconds(lambda: forward(x, merge, True), repeats),
        "ours_bwd_ms": milliseconds(backward, repeats),
        "floor_fwd_ms": 1e3 * max((inputs + size(y)) / bandwidth, elements / exponentials),
        "floor_bwd_ms": 1e3 * max((inputs + size(dy, *grads)) / bandwidth, 2 * elements / exponentials),
        "extra_memory": max(extra_memory(lambda: forward(x, merge, True)), extra_memory(backward)) / inputs,
        "borders_memory": size(borders) / inputs,
    }
    peer = mamba_ssm_times(x, dy, repeats)
    if peer is not None:
        result |= {"peer": "mamba_ssm", "peer_fwd_ms": peer[0], "peer_bwd_ms": peer[1]}
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(5):
                forward(x, merge, True)
                backward()
            torch.cuda.synchronize()
        for event in sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)[:8]:
            print(f"    {event.device_time_total / 5000:8.4f} ms  {event.key[:90]}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)), help="indices into ROWS")
    parser.add_argument("--dtype", default="bfloat16", choices=TOLERANCE)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--output", type=Path, help="JSON file; by default benchmarks/results/scan-<gpu>.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    bandwidth, exponentials = ceilings()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, exponentials {exponentials / 1e12:.2f} T/s")
    rows, lines = [], []
    for index in arguments.rows:
        row = measure(ROWS[index], arguments.dtype, bandwidth, exponentials, arguments.repeats, arguments.profile)
        rows.append(row)
        shape = " ".join(f"{row[name]:>6}" for name in "BDLNK")
        if "ours_fwd_ms" in row:
            lines.append(
                f"{shape} {row['rel_err']:.1e} | {row['ours_fwd_ms']:7.3f} ({row['ours_fwd_train_ms']:.3f}) "
                f"{row['floor_fwd_ms']:.3f} {row.get('peer_fwd_ms', math.nan):7.3f} | {row['ours_bwd_ms']:7.3f} "
                f"{row['floor_bwd_ms']:.3f} {row.get('peer_bwd_ms', math.nan):7.3f} | {row['extra_memory']:.2f} "
                f"{row['borders_memory']:.2f} {row['first_call_s']:.1f}"
            )
        else:
            lines.append(f"{shape} {row['rel_err']:.1e} | wrong, not timed")
        print(lines[-1], flush=True)
        torch.cuda.empty_cache()
    gpu = torch.cuda.get_device_name(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "device": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit,
        "command": " ".join(["python", *sys.argv]), "date": datetime.date.today().isoformat(), "rows": rows,
    }  # fmt: skip
    output = arguments.output or Path(__file__).parent / "results" / f"scan-{gpu.replace(' ', '-').lower()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"\n{gpu}, torch {torch.__version__}, triton {triton.__version__}, {arguments.dtype}\n"
        "B D L N K, error | forward ms (saving states), floor, mamba_ssm | backward, floor, mamba_ssm | "
        "extra memory and border states over inputs, first call s"
    )
    print("\n".join(lines))
    return 0 if all("ours_fwd_ms" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
