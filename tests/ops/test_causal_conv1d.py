"""Causal convolution along paths: against torch's Conv1d and the definition."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import assert_close
from vision_mamba.ops import causal_conv1d


def make(batch, length, paths, dim, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, dim, generator=generator, dtype=dtype)
    weight = torch.randn(paths, dim, width, generator=generator, dtype=dtype)
    bias = torch.randn(paths, dim, generator=generator, dtype=dtype)
    table = torch.stack([torch.randperm(length, generator=generator) for _ in range(paths)])
    return [t.requires_grad_() for t in (x, weight, bias)], table


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_raster_order_is_torch_conv1d(backend):
    (x, weight, bias), _ = make(2, 11, 1, 5, 4)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, weight[0].unsqueeze(1), bias[0], groups=5)).transpose(1, 2)
    actual = causal_conv1d(x, weight[0], bias[0], activation="silu", backend=backend)
    assert_close("y", actual, expected, 1e-14)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 2, 3, 4), (2, 37, 4, 19)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
def test_cpu_agrees_with_definition(shape, width, activation, dtype, tolerance):
    leaves, table = make(*shape, width, dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    actual = causal_conv1d(*leaves, activation=activation, paths=table)
    expected = causal_conv1d(*doubles, activation=activation, paths=table, backend="reference")
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((actual * weight.to(dtype)).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weight.to(dtype)).sum(), doubles)
    assert_close("y", actual, expected, tolerance)
    for name, a, b in zip(("dx", "dweight", "dbias"), grads, expected_grads, strict=True):
        assert_close(name, a, b, tolerance)


def test_gradcheck():
    leaves, table = make(2, 6, 2, 3, 3)
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, activation="silu", paths=table), leaves)


def test_bad_input_is_named():
    (x, weight, bias), table = make(1, 6, 2, 4, 4)
    with pytest.raises(ValueError, match="allowed are None and 'silu'"):
        causal_conv1d(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match="3 rows for 2 paths"):
        causal_conv1d(x, weight, bias, paths=table[[0, 1, 1]])
    with pytest.raises(ValueError, match="bias has shape"):
        causal_conv1d(x, weight, bias[:, :2], paths=table)
