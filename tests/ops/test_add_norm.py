"""Residual addition and norm: every backend against torch's own norms in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.conftest import assert_close
from tests.ops.backends import DEVICE, TOLERANCE, TRITON, device_of, kernels, needs_gpu
from vision_mamba.ops import add_norm, shifted_norm

BACKENDS = ["reference", "cpu", TRITON]
COMPILED = ["cpu", TRITON]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    stream: torch.dtype | None = torch.float32  # of the residual; None for none
    bias: bool = True
    strided: bool = False
    offset: float = 0.0  # the mean of a row, whose deviation is about 1


CASES = [
    Case((7,)),
    Case((1, 1, 1), bias=False),
    Case((2, 7, 192)),
    Case((3, 67), bias=False),
    Case((20, 1500)),  # more rows than programs in the backward pass
    Case((3, 5, 40), strided=True),
    Case((70, 24), offset=100.0),
    Case((2, 9, 96), stream=None),
    Case((2, 9, 96), torch.bfloat16, stream=None),
    Case((2, 9, 96), torch.bfloat16),
    Case((2, 9, 97), torch.bfloat16, stream=torch.bfloat16),
    Case((2, 9, 97), torch.float32, stream=torch.bfloat16),
    Case((2, 9, 97), torch.float16, bias=False, strided=True),
]
LARGE = [
    Case((128, 197, 192), torch.bfloat16),
    Case((128, 197, 384)),
    Case((8, 2049, 768), torch.float16),
    Case((3, 1001, 1537), torch.bfloat16, stream=torch.bfloat16),
    Case((5, 33000), bias=False),
]


def make(case: Case, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    *rows, dim = case.shape
    x = (normal(*case.shape) + case.offset).to(case.dtype)
    given = {"x": x, "residual": None, "weight": normal(dim), "bias": normal(dim) if case.bias else None}
    if case.stream is not None:
        given["residual"] = normal(*case.shape).to(case.stream)
    if case.strided:  # a slice of a wide projection, and a stream whose last axis is not dense
        given["x"] = normal(*rows, 2 * dim).to(case.dtype)[..., dim:]
        given["residual"] = normal(dim, *rows).to(case.stream).movedim(0, -1)
    return {name: tensor.requires_grad_() for name, tensor in given.items() if tensor is not None}


def run(function, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name."""
    normed, total = function(given)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=generator).to(torch.bfloat16).to(t) for t in (normed, total)]
    grads = torch.autograd.grad([normed, total], list(given.values()), seeds)
    return {"normed": normed, "sum": total} | {f"d{n}": g for n, g in zip(given, grads, strict=True)}


def by_torch(given, norm):
    total = given["x"] + given["residual"] if "residual" in given else given["x"] * 1
    shape = total.shape[-1:]
    if norm == "layer":
        return F.layer_norm(total, shape, given["weight"], given.get("bias"), 1e-5), total
    normed = F.rms_norm(total, shape, given["weight"], 1e-5)
    return normed + given["bias"] if "bias" in given else normed, total


def ours(given, **options):
    return add_norm(given["x"], given.get("residual"), given["weight"], given.get("bias"), **options)


def check(case: Case, norm: str, backend: str) -> None:
    given = make(case, device_of(backend))
    actual = run(lambda x: ours(x, norm=norm, backend=backend), given)
    expected = run(lambda x: by_torch(x, norm), {n: t.detach().double().requires_grad_() for n, t in given.items()})
    dtypes = {"normed": case.dtype, "sum": case.stream or case.dtype}
    for name, value in expected.items():
        dtype = actual[name].dtype
        assert dtype == (dtypes[name] if name in dtypes else given[name[1:]].dtype), name
        # The backward pass reads the sum as it was rounded.
        tolerance = max(TOLERANCE[dtype], TOLERANCE[dtypes["sum"]] if name.startswith("d") else 0.0)
        assert_close(name, actual[name], value, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_torch(case, norm, backend):
    check(case, norm, backend)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_triton_agrees_with_torch_at_size(case, norm):
    check(case, norm, "triton")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_float64(norm, backend):
    given = {n: t.detach().double().requires_grad_() for n, t in make(Case((3, 5, 12), strided=True)).items()}
    expected = run(lambda x: by_torch(x, norm), given)
    for name, value in run(lambda x: ours(x, norm=norm, backend=backend), given).items():
        assert value.dtype == torch.float64
        assert_close(name, value, expected[name], 1e-14)
    assert torch.autograd.gradcheck(
        lambda *t: ours(dict(zip(given, t, strict=True)), norm=norm, backend=backend), list(given.values())
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output(used, backend):
    given = make(Case((3, 5, 40), torch.bfloat16), device_of(backend))
    doubles = {n: t.detach().double().requires_grad_() for n, t in given.items()}
    seed = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(2)).to(given["x"])
    found = []
    for outputs, leaves in ((ours(given, backend=backend), given), (by_torch(doubles, "rms"), doubles)):
        grads = torch.autograd.grad(outputs[used], list(leaves.values()), seed.to(outputs[used]), allow_unused=True)
        found.append(dict(zip(leaves, grads, strict=True)))
    for name, expected in found[1].items():
        if expected is None:  # the sum alone does not depend on weight and bias
            assert found[0][name] is None or not found[0][name].any()
        else:
            assert_close(f"d{name}", found[0][name], expected, 4e-3)


SHIFTED = [
    ((2, 9, 96), True, False),
    ((7,), True, False),
    ((20, 1500), False, False),
    ((3, 5, 40), True, True),
    ((0, 6), True, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("shape, has_bias, strided", SHIFTED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_what_is_shifted(backend, shape, has_bias, strided, norm, dtype):
    """As :func:`add_norm` of the sum in float64; the gradient of the shift is a sum over all rows."""
    dim, device = shape[-1], device_of(backend)
    given = make(Case(shape, dtype, stream=None, bias=has_bias), device)
    if strided:
        given["x"] = torch.randn(*shape[:-1], 2 * dim).to(device, dtype)[..., dim:].requires_grad_()
    given["shift"] = (3 * torch.randn(dim, generator=torch.Generator().manual_seed(3))).to(device).requires_grad_()
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    normed = shifted_norm(**given, norm=norm, backend=backend)
    expected = by_torch(exact | {"x": exact["x"] + exact["shift"]}, norm)[0]
    dnormed = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(normed)
    grads = torch.autograd.grad(normed, list(given.values()), dnormed)
    assert normed.dtype == dtype
    # Other backends round the sum.
    tolerance = 2 * TOLERANCE[dtype] if backend != "triton" else TOLERANCE[dtype]
    assert_close("normed", normed, expected, tolerance)
    for name, found, reference in zip(
        given, grads, torch.autograd.grad(expected, list(exact.values()), dnormed.double()), strict=True
    ):
        assert found.dtype == given[name].dtype
        assert_close(f"d{name}", found, reference, tolerance)


@pytest.mark.parametrize("backend", COMPILED)
def test_shifted_norm_compiles_and_names_wrong_arguments(backend):
    device = device_of(backend)
    x, shift, weight = (torch.randn(s, device=device, requires_grad=True) for s in ((3, 8), (8,), (8,)))
    compiled = torch.compile(shifted_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, shift, weight, backend=backend), shifted_norm(x, shift, weight, backend=backend)
    )
    with pytest.raises(ValueError, match=r"shift has shape \(7,\); with x \(3, 8\) expected \(8,\)"):
        shifted_norm(x, shift[:7], weight, backend=backend)
    grad = torch.autograd.grad(shifted_norm(x, shift, weight, backend=backend).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grad[0].sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rows(backend):
    given = make(Case((2, 0, 6)), device_of(backend))
    found = run(lambda x: ours(x, backend=backend), given)
    assert found["normed"].shape == found["sum"].shape == found["dx"].shape == (2, 0, 6)
    assert not found["dweight"].any() and not found["dbias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_takes_a_dtype_of_its_own(backend):
    x, weight = torch.randn(4, 8).bfloat16().to(device_of(backend)), torch.ones(8, device=device_of(backend))
    normed, total = add_norm(x, None, weight, residual_dtype=torch.float32, backend=backend)
    assert normed.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert torch.equal(total, x.float())
    assert add_norm(x, None, weight, dtype=torch.float32, backend=backend)[0].dtype == torch.float32
    same_dtype = add_norm(x, None, weight, backend=backend)[1]
    assert same_dtype is x


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, backend):
    given = make(Case((2, 3, 8), dtype), device_of(backend))
    torch.library.opcheck(
        torch.ops.vision_mamba.add_norm, (*given.values(), 1e-5, False, torch.float32, backend, torch.bfloat16)
    )  # fmt: skip
    alone = (given["x"], None, given["weight"], None, 1e-5, True, dtype, backend, dtype)  # the sum is empty
    torch.library.opcheck(torch.ops.vision_mamba.add_norm, alone)
    x, residual, weight, bias = (t.detach() for t in given.values())
    arguments = (x, residual, residual, weight, bias, 1e-5, True, dtype, torch.float32, backend)
    torch.library.opcheck(torch.ops.vision_mamba.add_norm_backward, arguments)


@pytest.mark.parametrize("backend", COMPILED)
def test_compiles_without_graph_break(backend):
    given = make(Case((2, 3, 8), torch.bfloat16), device_of(backend))
    compiled = torch.compile(lambda x: ours(x, backend=backend), fullgraph=True, backend="aot_eager")
    expected = run(lambda x: ours(x, backend=backend), given)
    for name, value in run(compiled, given).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", COMPILED)
def test_autocast_keeps_the_residual_stream(backend):
    device = device_of(backend)
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16).to(device)
    stream, weight = torch.randn(4, 16, device=device), torch.randn(16, device=device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        normed, total = add_norm(layer(stream), stream, weight, backend=backend)
        out = layer(normed)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    (out.float().square().sum() + total.square().sum()).backward()
    ours_grad, weight.grad = weight.grad, None
    normed, total = by_torch({"x": layer(stream), "residual": stream, "weight": weight}, "rms")
    (layer(normed).square().sum() + total.square().sum()).backward()
    assert weight.grad.dtype == torch.float32
    assert_close("dweight", ours_grad, weight.grad, 1e-2)  # two linear layers in bfloat16


@pytest.mark.parametrize("backend", COMPILED)
def test_checkpointed_gradients_are_the_same(backend):
    given = make(Case((2, 3, 8)), device_of(backend))
    expected = run(lambda x: ours(x, backend=backend), given)
    found = run(lambda x: checkpoint(ours, x, backend=backend, use_reentrant=False), given)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", COMPILED)
def test_backward_twice_gives_equal_bits(backend):
    given = make(Case((5, 67, 200) if device_of(backend) == "cuda" else (67, 1100)), device_of(backend))
    first, second = (run(lambda x: ours(x, backend=backend), given) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr("vision_mamba.ops.cpu.runtime._WORTH", 1)  # short work would not be shared out
    given = make(Case((300, 40)))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(run(lambda x: ours(x, backend="cpu"), given))
    finally:
        torch.set_num_threads(threads)
    for name in ("dx", "dresidual"):
        assert torch.equal(found[0][name], found[1][name]) and torch.equal(found[0][name], found[2][name]), name


@pytest.mark.parametrize("backend", COMPILED)
def test_second_derivative_is_a_clear_error(backend):
    given = make(Case((2, 4)), device_of(backend))
    (dx,) = torch.autograd.grad(
        ours(given, backend=backend)[0].square().sum(), given["x"], create_graph=True
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        dx.sum().backward()


@kernels
def test_triton_names_the_remedy_for_float64():
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="x is torch.float64.*backend='reference'"):
        add_norm(x, None, x[0], backend="triton")


def test_bad_input_is_named():
    x, weight = torch.zeros(2, 3, 4), torch.ones(4)
    with pytest.raises(ValueError, match="norm='batch': allowed are 'rms' and 'layer'"):
        add_norm(x, None, weight, norm="batch")
    with pytest.raises(ValueError, match=r"residual has shape \(2, 4\); with x \(2, 3, 4\) expected \(2, 3, 4\)"):
        add_norm(x, x[:, 0], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\).*expected \(4,\)"):
        add_norm(x, x, weight[:3])
    with pytest.raises(ValueError, match="bias is on meta, x on cpu"):
        add_norm(x, x, weight, weight.to("meta"))
    with pytest.raises(ValueError, match="D > 0"):
        add_norm(x[..., :0], None, weight[:0])
    with pytest.raises(ValueError, match="unknown .*backend 'cuda'"):
        add_norm(x, None, weight, backend="cuda")


@pytest.mark.gpu
@needs_gpu
def test_triton_compiles_nothing_new_for_other_numbers_of_rows():
    from vision_mamba.ops.triton import add_norm as module

    def compiled() -> int:
        return sum(
            len(cache[0])
            for kernel in (module._norm_forward_kernel, module._norm_backward_kernel)
            for cache in kernel.device_caches.values()
        )

    counts = []
    for rows in (197, 1, 16, 190, 192, 785, 2048):
        run(lambda x: ours(x, backend="triton"), make(Case((2, rows, 192)), DEVICE))
        counts.append(compiled())
    assert counts[-1] == counts[0]


@pytest.mark.gpu
@needs_gpu
def test_triton_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    rows, dim = 2**20 + 5, 2048
    x = torch.randn(rows, dim, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(dim, device=DEVICE)
    found = []
    for part in (x, x[-100:]):
        normed, total = add_norm(part, None, weight, residual_dtype=torch.float32, backend="triton")
        (dx,) = torch.autograd.grad(normed, x, x.detach()[-len(part) :])
        found.append((normed[-100:], total[-100:], dx[-100:]))
    for whole, alone in zip(*found, strict=True):
        assert torch.equal(whole, alone)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_triton_on_a_device_that_is_not_the_current_one():
    given = make(Case((2, 9, 96)), "cuda:1")
    expected = run(lambda x: by_torch(x, "rms"), {n: t.detach().double().requires_grad_() for n, t in given.items()})
    for name, value in run(lambda x: ours(x, backend="triton"), given).items():
        assert_close(name, value, expected[name], 1e-5)
