"""The CPU kernels on several threads: what one thread gives. Work as short as the tests' is not shared out otherwise."""

import math
import platform
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from tests.conftest import assert_close
from vision_mamba.ops import add_norm, causal_conv1d, selective_scan
from vision_mamba.ops.cpu import add_norm as norms
from vision_mamba.ops.cpu import causal_conv1d as convolutions
from vision_mamba.ops.cpu import runtime
from vision_mamba.ops.cpu import selective_scan as scans


@pytest.fixture
def on_threads(monkeypatch):
    """``on_threads(number, function)`` calls it on so many; into how many parts kernels were cut is in ``parts``."""
    parts = []

    def counted(tasks, num_tasks, nanoseconds, *args):
        calls = []

        def part(openmp, threads, start, stop, *given):
            calls.append(threads)
            tasks(openmp, threads, start, stop, *given)

        runtime.run_tasks(part, num_tasks, nanoseconds, *args)
        parts.append(sum(calls))

    for module in (norms, convolutions, scans):
        monkeypatch.setattr(module, "run_tasks", counted)

    def call(number, function):
        before = torch.get_num_threads()
        parts.clear()
        try:
            torch.set_num_threads(number)
            return function()
        finally:
            torch.set_num_threads(before)

    call.parts = parts
    return call


def gradients(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad((y**2).sum(), leaves)]


def scan():
    g = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(3, 9, 2, 40, generator=g, dtype=torch.float64) for _ in range(2))
    B, C = (torch.randn(3, 9, 2, 4, generator=g, dtype=torch.float64) for _ in range(2))
    A = -torch.rand(2, 40, 4, generator=g, dtype=torch.float64)
    return gradients(
        lambda u, delta, A, B, C: selective_scan(u, delta, A, B, C, delta_softplus=True), u, delta, A, B, C
    )


def convolution():
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 9, 5), (2, 5, 4)))
    return gradients(lambda x, weight: causal_conv1d(x, weight, activation="silu"), x, weight)


def norm():
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((300, 5), (5,)))
    return gradients(lambda x, weight: add_norm(x, None, weight)[0], x, weight)


@pytest.mark.parametrize("compute", [scan, convolution, norm])
@pytest.mark.parametrize("own_threads", [False, True])
def test_shared_out_work_is_the_same(compute, own_threads, on_threads, monkeypatch):
    if own_threads:  # where torch has no OpenMP of GNU's
        monkeypatch.setattr(runtime, "_openmp", lambda: None)
    alone = on_threads(3, compute)
    assert set(on_threads.parts) == {1}  # short work
    monkeypatch.setattr(runtime, "_WORTH", 1)
    shared = on_threads(3, compute)
    assert set(on_threads.parts) > {1} or set(on_threads.parts) == {3}
    for number, (a, b) in enumerate(zip(alone, shared, strict=True)):
        assert_close(f"result {number}", b, a, 1e-13)


@numba.njit(nogil=True)
def _fails_in_the_second_part(openmp, threads, start, stop, args):
    if threads > 1:
        runtime.on_team(openmp, threads, start, stop, args)
        return
    (marks,) = args
    work = 0.0
    if start == 2:  # not done when the error is there
        for i in range(5_000_000):
            work += math.sin(i)
    marks[start] = stop if work < 1e9 else 0  # a sum that nobody reads would not be computed
    if start == 1:
        raise MemoryError("no memory")


@pytest.mark.parametrize("own_threads", [False, True])
def test_an_error_in_a_part_arrives(own_threads, monkeypatch):
    if own_threads:
        monkeypatch.setattr(runtime, "_openmp", lambda: None)
    marks, before = np.zeros(3, np.int64), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(MemoryError, match="no memory"):
            runtime.run_tasks(_fails_in_the_second_part, 3, 1e9, marks)
    finally:
        torch.set_num_threads(before)
    assert marks.tolist() == [1, 2, 3]  # the other parts ran


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
def test_memory_of_one_layer_serves_the_next():
    """Page faults of ten rounds that allocate and free four tensors of 4.8 MB: up to 46,000 if glibc is left alone.

    Some processes have none even so, as it depends on what lies at the top of the heap: hence two.
    """
    code = """
import resource, torch, vision_mamba.ops.cpu
def rounds(number):
    for _ in range(number):
        tensors = [torch.empty(1_200_000).zero_() for _ in range(4)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before, after = rounds(3), rounds(10)
print(after - before)
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 1000
