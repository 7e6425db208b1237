"""The depthwise convolution of maps against PyTorch's in float64, with its gradients."""

import importlib

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
    needs_gpu,
    output_and_gradients,
    second_derivatives,
)
from tests.ops.test_triton import assert_near
from vision_mamba.ops import depthwise_conv2d

BACKENDS = ["cpu", TRITON]
ACTIVATIONS = {None: lambda x: x, "silu": F.silu, "gelu": F.gelu}
# batch, H, W, D: single rows and columns, more of each axis than a strip has, channels that fill no block.
SHAPES = [(2, 5, 7, 20), (1, 1, 1, 3), (1, 2, 9, 70), (3, 8, 3, 64), (1, 17, 1, 33), (0, 4, 4, 8)]


def expected_of(x, weight, bias, activation):
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return ACTIVATIONS[activation](y.permute(0, 2, 3, 1))


def check(backend, shape, activation, has_bias, dtype, side=3):
    generator, device = torch.Generator().manual_seed(0), device_of(backend)
    batch, height, width, dim = shape
    tensors = {  # of a wider map, as a half of a projection is
        "x": torch.randn(batch, height, width, 2 * dim, generator=generator).to(device, dtype)[..., dim:],
        "weight": torch.randn(dim, 1, side, side, generator=generator).to(device, dtype) / side,
        "bias": torch.randn(dim, generator=generator).to(device, dtype),
    }
    if not has_bias:
        del tensors["bias"]
    found = output_and_gradients(tensors, lambda **t: depthwise_conv2d(**t, activation=activation, backend=backend))
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected = output_and_gradients(exact, lambda x, weight, bias=None: expected_of(x, weight, bias, activation))
    assert found["output"].is_contiguous() and all(t.dtype == dtype for t in found.values())
    assert_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("activation, has_bias", [(None, True), (None, False), ("silu", False), ("gelu", True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_float64(backend, shape, activation, has_bias):
    check(backend, shape, activation, has_bias, torch.float32)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS), ids=str)
def test_agrees_with_float64_in_16_bits(activation, dtype):
    check("triton", (2, 7, 9, 40), activation, True, dtype)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS), ids=str)
@pytest.mark.parametrize("shape", [(32, 56, 56, 96), (3, 200, 301, 64), (64, 7, 7, 768), (2, 31, 33, 1796)], ids=str)
def test_agrees_with_float64_at_size(shape, activation, dtype):
    check("triton", shape, activation, True, dtype)


@pytest.mark.parametrize("side", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_sides(backend, side, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(backend, (2, 6, 7, 8), "silu", True, torch.float32, side)


@kernels
def test_offsets_of_64_bits(monkeypatch):
    import triton.language as tl

    module = importlib.import_module("vision_mamba.ops.triton.depthwise_conv2d")
    monkeypatch.setattr(module, "offset_type", lambda *given: tl.int64)
    monkeypatch.setattr(module, "_plan", module._plan.__wrapped__)  # which remembers
    check("triton", (2, 4, 5, 40), "silu", True, torch.float32)


@kernels
def test_gelu_far_from_zero():
    """Where its two parts cancel, and where there is nothing left of it."""
    x = torch.linspace(-12, 12, 1024, device=DEVICE).view(1, 1, 1024, 1).contiguous()
    weight = torch.zeros(1, 1, 3, 3, device=DEVICE)
    weight[..., 1, 1] = 1.0
    found = output_and_gradients(
        {"x": x, "weight": weight}, lambda **t: depthwise_conv2d(**t, activation="gelu", backend="triton")
    )
    exact = x.double().requires_grad_()
    y = F.gelu(exact)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(exact)
    torch.testing.assert_close(found["output"].double(), y.detach(), rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(found["dx"].double(), dy * slope, rtol=1e-6, atol=3e-6)


@kernels
def test_backward_twice_gives_equal_bits():
    shape = (32, 56, 56, 96) if CUDA else (3, 5, 9, 40)
    tensors = {"x": torch.randn(shape, device=DEVICE), "weight": torch.randn(shape[3], 1, 3, 3, device=DEVICE)}
    first, second = (
        output_and_gradients(tensors, lambda **t: depthwise_conv2d(**t, activation="gelu", backend="triton"))
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of PyTorch's convolutions, which these are
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator).to(device_of(backend)) for shape in ((1, 3, 4, 5), (5, 1, 3, 3), (5,))
    ]
    found = second_derivatives(tensors, lambda *t: depthwise_conv2d(*t, activation="silu", backend=backend))
    expected = second_derivatives([tensor.double() for tensor in tensors], lambda *t: expected_of(*t, "silu"))
    assert_near(found, expected, TOLERANCE[torch.float32])


def test_wrong_arguments_name_the_remedy():
    x, weight = torch.zeros(1, 4, 4, 6), torch.zeros(6, 1, 3, 3)
    with pytest.raises(ValueError, match="activation='relu'.*'silu'"):
        depthwise_conv2d(x, weight, activation="relu")
    with pytest.raises(ValueError, match=r"weight \(D, 1, k, k\), got \(1, 4, 4, 6\), \(5, 1, 3, 3\)"):
        depthwise_conv2d(x, weight[:5])
    with pytest.raises(ValueError, match="k odd"):
        depthwise_conv2d(x, weight[..., :2, :2])
    with pytest.raises(ValueError, match=r"bias has shape \(5,\); expected \(6,\)"):
        depthwise_conv2d(x, weight, torch.zeros(5))
