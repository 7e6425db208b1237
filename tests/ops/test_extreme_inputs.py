"""The scan in float32 against float64 where numbers are extreme, sequences long, and memory is laid out oddly."""

import pytest
import torch

from tests.conftest import assert_close
from tests.ops.backends import CUDA, DEVICE, TRITON, device_of, needs_gpu
from vision_mamba.ops import causal_conv1d, reference, selective_scan

BACKENDS = ["cpu", TRITON]


def uniform(low, high):
    return lambda generator, *shape: torch.rand(*shape, generator=generator) * (high - low) + low


def fixed(value):
    return lambda generator, *shape: torch.full(shape, value)


def every_decay(generator, *shape):
    """From -1e-3 to -1e3."""
    return -torch.logspace(-3, 3, torch.Size(shape).numel()).reshape(shape)


def make(length, dim, states, delta, A):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "u": normal(1, length, dim), "delta": delta(generator, 1, length, dim), "A": A(generator, dim, states),
        "B": normal(1, length, states), "C": normal(1, length, states), "D": normal(dim), "z": normal(1, length, dim),
        "initial_state": normal(1, dim, states),
    }  # fmt: skip


def results(scan, given, dtype=torch.float32, **options):
    """Outputs and gradients by name. The leaves have the strides of what is given."""
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}
    y, last_state = scan(**leaves, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=generator).to(t) for t in (y, last_state)]
    grads = torch.autograd.grad([y, last_state], list(leaves.values()), seeds)
    return {"y": y, "last_state": last_state} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def check(given, backend, chunk=32, **options):
    given = {name: tensor.to(device_of(backend)) for name, tensor in given.items()}
    actual = results(selective_scan, given, backend=backend, **options)
    expected = results(reference.selective_scan, given, torch.float64, chunk=chunk, **options)
    for name, value in expected.items():
        assert_close(name, actual[name], value, 1e-5)


BEFORE_SOFTPLUS = {
    "all": uniform(-30, 30),
    "tiny": uniform(-30, -20),
    "large": uniform(20, 30),
    "usual": uniform(-3, 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", BEFORE_SOFTPLUS)
def test_softplus_of_extreme_steps(steps, backend):
    length = 1100 if device_of(backend) == "cuda" or backend == "cpu" else 24
    check(make(length, 12, 8, BEFORE_SOFTPLUS[steps], every_decay), backend, delta_softplus=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("decay", [1e-3, 1.0, 1e3])
def test_steps_times_decay(decay, scale, backend):
    length = 1100 if device_of(backend) == "cuda" or backend == "cpu" else 12
    check(make(length, 12, 8, uniform(0, scale), fixed(-decay)), backend)


@pytest.mark.parametrize("length", [1, 63, 197, 500, 1000, 2049])
def test_lengths_on_the_cpu(length):
    check(make(length, 20, 16, uniform(-3, 1), uniform(-3, 0)), "cpu", delta_softplus=True)


def test_a_long_sequence_with_slow_decay_on_the_cpu():
    check(make(65536, 3, 2, uniform(-5, -1), fixed(-1e-3)), "cpu", chunk=256, delta_softplus=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("decay", [1e-3, 1.0, 1e3])
def test_triton_on_a_long_sequence(decay):
    check(make(65536, 40, 16, uniform(-5, -1), fixed(-decay)), "triton", chunk=256, delta_softplus=True)


def test_chunks_of_the_reference_are_its_definition():
    given = {n: t.double() for n, t in make(37, 5, 4, uniform(-3, 1), every_decay).items()}
    expected = results(reference.selective_scan, given, torch.float64, delta_softplus=True)
    for chunk in (1, 5, 37, 64):
        for name, value in results(
            reference.selective_scan, given, torch.float64, delta_softplus=True, chunk=chunk
        ).items():
            assert_close(name, value, expected[name], 1e-13)


def scattered(tensor):
    """The same numbers in memory in the reverse order of axes, with gaps."""
    gaps = torch.full((*tensor.shape[::-1], 2), float("nan"), dtype=tensor.dtype, device=tensor.device)
    gaps[..., 1] = tensor.permute(*reversed(range(tensor.ndim)))
    return gaps[..., 1].permute(*reversed(range(tensor.ndim)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_in_memory_does_not_matter(backend):
    device = device_of(backend)
    given = make(67 if CUDA or backend == "cpu" else 9, 6, 4, uniform(-3, 1), uniform(-3, 0))
    given = {name: tensor.to(device) for name, tensor in given.items()}
    expected = results(selective_scan, given, backend=backend, delta_softplus=True)
    odd = {name: scattered(tensor) for name, tensor in given.items()}
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    for name, value in results(selective_scan, odd, backend=backend, delta_softplus=True).items():
        assert torch.equal(value, expected[name]), name

    x, weight, bias = given["u"], torch.randn(2, 6, 4, device=device), torch.randn(2, 6, device=device)
    found = []
    for layout in (lambda t: t, scattered):
        leaves = [layout(t).requires_grad_() for t in (x, weight, bias)]
        y = causal_conv1d(*leaves, activation="silu", backend=backend)
        dy = layout(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device))
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@needs_gpu
def test_triton_convolution_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    x = torch.randn(2, 131072, 8224, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(1, 8224, 4, device=DEVICE)
    found = []
    for part in (x, x[1:]):
        y = causal_conv1d(part, weight, backend="triton")
        (dx,) = torch.autograd.grad(y, x, x.detach()[-len(part) :].unsqueeze(2))
        found.append((y[-1].detach(), dx[-1]))
        del y, dx
    for whole, alone in zip(*found, strict=True):
        assert torch.equal(whole, alone)
