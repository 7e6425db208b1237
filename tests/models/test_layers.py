"""Layers whose GPU form computes in another way than the plain one, and their gradients."""

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import assert_close
from vision_mamba.layers import OverlapPatchEmbed
from vision_mamba.layers.mamba import shared_linear


@pytest.mark.parametrize("size", [(32, 48), (16, 16)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_patches_without_overlap_are_a_product(size, device):
    """What a GPU computes as one product is the convolution, whatever the images' memory format."""
    torch.manual_seed(0)
    embed = OverlapPatchEmbed(size, 16, 16, in_chans=5, embed_dim=24, device=device, dtype=torch.float64)
    images = torch.randn(2, 5, *size, dtype=torch.float64, device=device)
    expected = embed.proj(images).permute(0, 2, 3, 1)
    for given in (images, images.to(memory_format=torch.channels_last)):
        assert_close("tokens", embed._project(given, embed.grid_size), expected, 1e-12)
        assert_close("forward", embed(given), expected, 1e-12)


def test_gradients_of_a_shared_product():
    """Of tokens that are read twice: by the product, and by what follows it; twice differentiable."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def shared(x, weight):
        tokens, product = shared_linear(2 * x, weight)
        return (tokens.sin() * tokens).sum() + (product**2).sum()

    def plain(x, weight):
        tokens = 2 * x
        return (tokens.sin() * tokens).sum() + (F.linear(tokens, weight) ** 2).sum()

    expected = torch.autograd.grad(plain(x, weight), (x, weight))
    for found, gradient in zip(torch.autograd.grad(shared(x, weight), (x, weight)), expected, strict=True):
        assert_close("gradient", found, gradient, 1e-12)
    assert torch.autograd.gradgradcheck(shared, (x, weight))


def test_a_shared_product_leaves_the_gradients_of_others_alone():
    """The product's gradient is added in place, to a tensor that must be nobody else's: an expanded one is copied."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64)
    tokens, product = shared_linear(2 * x, weight)
    (tokens.sum() + product.sum()).backward()  # the gradient of a sum is one number, seen everywhere
    assert_close("gradient", x.grad, 2 * (1 + weight.sum(0)).expand(3, 6), 1e-12)
