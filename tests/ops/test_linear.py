"""The linear layer against torch's in float64, with its gradients."""

import pytest
import torch
from torch.nn import functional as F

from tests.ops.backends import (
    CUDA,
    DEVICE,
    TOLERANCE,
    TRITON,
    device_of,
    kernels,
    output_and_gradients,
    second_derivatives,
)
from tests.ops.test_triton import assert_near
from vision_mamba.ops import linear

BACKENDS = ["cpu", TRITON]
# Tokens' axes, D, O: one tile and many, columns that fill no tile.
SHAPES = [((3, 5), 7, 20), ((), 4, 3), ((1,), 4, 1), ((70,), 8, 130), ((2, 3, 9), 5, 96), ((0, 4), 6, 8)]
if CUDA:
    SHAPES += [((401, 1000), 96, 384), ((49,), 64, 3072), ((12345,), 32, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_float64(backend, shape, dtype):
    tokens, dim, out = shape
    generator, device = torch.Generator().manual_seed(0), device_of(backend)
    tensors = {
        "x": torch.randn(*tokens, dim, generator=generator).to(device, dtype),
        "weight": torch.randn(out, dim, generator=generator).to(device, dtype),
        "bias": torch.randn(out, generator=generator).to(device, dtype),
    }
    found = output_and_gradients(tensors, lambda **t: linear(**t, backend=backend))
    assert all(tensor.dtype == dtype for tensor in found.values())
    expected = output_and_gradients(
        {name: tensor.double() for name, tensor in tensors.items()}, lambda **t: F.linear(*t.values())
    )
    assert_near(found, expected, TOLERANCE[dtype])


@kernels
def test_what_wants_no_gradient_has_none():
    x, weight, bias = (torch.randn(s, device=DEVICE) for s in ((6, 4), (5, 4), (5,)))
    bias.requires_grad_()
    linear(x, weight, bias, backend="triton").sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 6.0))
    weight.requires_grad_()
    assert torch.equal(linear(x, weight, backend="triton"), F.linear(x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(device_of(backend)) for shape in ((3, 4), (5, 4), (5,))]
    found = second_derivatives(tensors, lambda *t: linear(*t, backend=backend))
    expected = second_derivatives([tensor.double() for tensor in tensors], F.linear)
    assert_near(found, expected, TOLERANCE[torch.float32])
