"""The linear layer against torch's in float64, with its gradients."""

import pytest
import torch
from torch.nn import functional as F

from tests.ops.backends import CUDA, DEVICE, TOLERANCE, TRITON, device_of, kernels
from tests.ops.test_triton import assert_near
from vision_mamba.ops import linear

BACKENDS = ["cpu", TRITON]
# Tokens' axes, D, O: one tile and many, columns that fill no tile.
SHAPES = [((3, 5), 7, 20), ((), 4, 3), ((1,), 4, 1), ((70,), 8, 130), ((2, 3, 9), 5, 96), ((0, 4), 6, 8)]
if CUDA:
    SHAPES += [((401, 1000), 96, 384), ((49,), 64, 3072), ((12345,), 32, 100)]


def results(tensors, run):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = run(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(tensors["x"].dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


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
    found = results(tensors, lambda **t: linear(**t, backend=backend))
    assert all(tensor.dtype == dtype for tensor in found.values())
    expected = results({name: tensor.double() for name, tensor in tensors.items()}, lambda **t: F.linear(*t.values()))
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
    device = device_of(backend)
    tensors = [torch.randn(s, device=device, requires_grad=True) for s in ((3, 4), (5, 4), (5,))]

    def squared(run):
        first = torch.autograd.grad(run(*tensors).pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), tensors)

    for found, expected in zip(squared(lambda *t: linear(*t, backend=backend)), squared(F.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
