"""Means and weighted sums over paths against their definition in float64, gradients through both at once."""

import pytest
import torch

from tests.ops.backends import TOLERANCE, TRITON, device_of, output_and_gradients
from tests.ops.test_triton import assert_near
from vision_mamba.ops import path_means, weighted_path_sum

BACKENDS = ["cpu", TRITON]
# batch, L, K, D: one tile and many, more of each axis than a tile has and fewer.
SHAPES = [(2, 5, 3, 8), (1, 1, 1, 1), (2, 70, 2, 130), (3, 33, 4, 20), (0, 5, 3, 8)]


def gated(y, weights, matrix, means, weighted_sum):
    """As a gate uses them: weights that depend on the means, of results that the sum reads too."""
    y, mean = means(y)
    return weighted_sum(y, weights + (mean * matrix).sum(-1).to(weights.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_float64(backend, shape, dtype):
    batch, _, num_paths, dim = shape
    generator, device = torch.Generator().manual_seed(0), device_of(backend)
    tensors = {
        "y": torch.randn(shape, generator=generator).to(device, dtype),
        "weights": torch.rand(batch, num_paths, generator=generator).to(device) + 0.5,
        "matrix": torch.randn(num_paths, dim, generator=generator).to(device) * 0.1,
    }
    ours = output_and_gradients(
        tensors,
        lambda **t: gated(
            **t,
            means=lambda y: path_means(y, backend=backend),
            weighted_sum=lambda y, weights: weighted_path_sum(y, weights, backend=backend),
        ),
    )
    expected = output_and_gradients(
        {name: tensor.double() for name, tensor in tensors.items()},
        lambda **t: gated(
            **t,
            means=lambda y: (y, y.mean(1)),
            weighted_sum=lambda y, weights: torch.einsum("blkd,bk->bld", y, weights),
        ),
    )
    assert_near(ours, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_second_derivatives_and_wrong_shapes(backend):
    device = device_of(backend)
    wide = torch.randn(2, 5, 3, 16, device=device)
    weights = torch.rand(3, 2, device=device).t()
    found = weighted_path_sum(wide[..., ::2], weights, backend=backend)
    torch.testing.assert_close(found, torch.einsum("blkd,bk->bld", wide[..., ::2], weights))

    y = torch.randn(1, 3, 2, 4, device=device, requires_grad=True)
    w = torch.rand(1, 2, device=device, requires_grad=True)

    def squared():
        same, mean = path_means(y, backend=backend)
        out = weighted_path_sum(same, w + mean.mean(-1), backend=backend)
        return (torch.autograd.grad(out.pow(2).sum(), y, create_graph=True)[0] ** 2).sum()

    def plainly():
        out = torch.einsum("blkd,bk->bld", y, w + y.mean(1).mean(-1))
        return (torch.autograd.grad(out.pow(2).sum(), y, create_graph=True)[0] ** 2).sum()

    for found, expected in zip(
        torch.autograd.grad(squared(), (y, w)), torch.autograd.grad(plainly(), (y, w)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"weights \(batch, K\), got \(1, 3, 2, 4\), \(1, 3\)"):
        weighted_path_sum(y, torch.ones(1, 3, device=device), backend=backend)
