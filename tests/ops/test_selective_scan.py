"""The scan against the official reference's numbers, gradcheck, and the definition, on the CPU."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import assert_close
from tests.golden import recipe
from vision_mamba.ops import selective_scan
from vision_mamba.ops.backend import resolve_backend
from vision_mamba.ops.selective_scan import block_diagonal, path_products, step_matrix

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "selective_scan_ref.json").read_text())["cases"]
GRADS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def golden_inputs(case):
    """The case's tensors in the official (batch, channels, L) layout, as float64."""
    name = case["case"]
    tensors = {k: recipe.noise(f"{name}.{k}", shape) for k, shape in case["shapes"].items()}
    tensors["A"] = -np.exp(0.5 * tensors["A"])
    if "delta_bias" in tensors:
        tensors["delta_bias"] = -2 + 0.5 * tensors["delta_bias"]
    delta = tensors["delta"]
    tensors["delta"] = 0.5 * delta if case["delta_softplus"] else 0.1 * np.abs(delta)
    return {k: torch.from_numpy(v).requires_grad_() for k, v in tensors.items()}


def to_ours(name, tensor):
    if name in ("u", "delta", "z"):
        return tensor.transpose(1, 2)
    if name in ("B", "C"):
        return tensor.permute(0, 3, 1, 2)
    return tensor


def digest_error(actual, digest):
    flat = actual.detach().double().numpy().reshape(-1)
    assert list(actual.shape) == digest["shape"]
    if "full" in digest:
        expected, got = np.array(digest["full"]), flat
    else:
        expected, got = np.array(digest["values"]), flat[recipe.sample_positions(flat.size)]
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", GOLDEN, ids=[c["case"] for c in GOLDEN])
def test_official_numbers(case, backend):
    leaves = golden_inputs(case)
    arguments = {k: to_ours(k, v) for k, v in leaves.items()}
    y, last_state = selective_scan(
        **arguments, delta_softplus=case["delta_softplus"], return_last_state=True, backend=backend
    )
    y = y.transpose(1, 2)
    assert digest_error(y, case["out"]) < 1e-12
    assert digest_error(last_state, case["last_state"]) < 1e-12
    (y * torch.from_numpy(recipe.noise(f"{case['case']}.dout", y.shape))).sum().backward()
    for name, expected in case["grad"].items():
        got = recipe.grad_digest(f"{case['case']}.{name}", leaves[name].grad.numpy())
        scale = max(expected["l2"], 1e-12)
        assert abs(got["l2"] - expected["l2"]) <= 1e-11 * scale, name
        assert abs(got["dot"] - expected["dot"]) <= 1e-10 * scale, name


def make_inputs(batch, length, paths, dim, states, groups, dtype, shared=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u_shape = (batch, length, dim) if shared else (batch, length, paths, dim)
    inputs = dict(
        u=normal(*u_shape),
        delta=normal(batch, length, paths, dim),
        A=-torch.exp(0.5 * normal(paths, dim, states)),
        B=normal(batch, length, paths, groups, states),
        C=normal(batch, length, paths, groups, states),
        D=normal(paths, dim),
        z=normal(*u_shape),
        delta_bias=normal(paths, dim) - 1,
        initial_state=normal(batch, paths, dim, states),
    )
    table = torch.stack([torch.randperm(length, generator=generator) for _ in range(paths)])
    return {k: v.to(dtype) for k, v in inputs.items()}, table


def run(inputs, table, backend, dtype, **options):
    leaves = {k: v.detach().to(dtype).clone().requires_grad_() for k, v in inputs.items()}
    y, last_state = selective_scan(**leaves, paths=table, return_last_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    weight_last = torch.randn(last_state.shape, generator=generator, dtype=torch.float64).to(last_state.dtype)
    ((y * weight).sum() + (last_state * weight_last).sum()).backward()
    return {"y": y, "last_state": last_state, **{f"d{k}": v.grad for k, v in leaves.items()}}


SHAPES = [  # batch, L, K, D, N, groups
    (2, 1, 1, 3, 1, 1),
    (1, 7, 2, 64, 16, 1),
    (2, 63, 3, 40, 5, 2),
    (1, 65, 4, 200, 1, 1),
    (3, 33, 1, 24, 128, 3),
]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("merge", ["none", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-K{}-D{}-N{}-G{}".format(*s))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
def test_cpu_agrees_with_definition(shape, merge, shared, dtype, tolerance):
    inputs, table = make_inputs(*shape, dtype=dtype, shared=shared)
    options = dict(delta_softplus=True, merge=merge)
    actual = run(inputs, table, "cpu", dtype, **options)
    expected = run(inputs, table, "reference", torch.float64, **options)
    for name, value in expected.items():
        assert_close(name, actual[name], value, tolerance)


def test_gradcheck():
    inputs, table = make_inputs(1, 5, 2, 3, 2, 1, torch.float64)
    names = list(inputs)
    leaves = [inputs[n].requires_grad_() for n in names]

    def scan(*tensors):
        return selective_scan(
            **dict(zip(names, tensors, strict=True)), paths=table, delta_softplus=True, return_last_state=True
        )

    assert torch.autograd.gradcheck(scan, leaves)


def test_shared_parameters_equal_repeated_ones():
    inputs, table = make_inputs(2, 9, 3, 6, 4, 1, torch.float64, shared=True)
    shared = {k: v[:, :, 0] for k, v in inputs.items() if k in ("delta", "B", "C")}
    shared |= {k: inputs[k][0] for k in ("A", "D", "delta_bias")}
    repeated = {
        k: v.unsqueeze(2).expand(-1, -1, 3, *v.shape[2:]) for k, v in shared.items() if k in ("delta", "B", "C")
    }
    repeated |= {k: shared[k].expand(3, *shared[k].shape) for k in ("A", "D", "delta_bias")}
    short = selective_scan(inputs["u"], **shared, paths=table)
    assert torch.equal(short, selective_scan(inputs["u"], **repeated, paths=table))
    assert_close("y", short, selective_scan(inputs["u"], **shared, paths=table, backend="reference"), 1e-12)


def test_strided_inputs_equal_contiguous_ones():
    inputs, _ = make_inputs(2, 12, 1, 8, 4, 1, torch.float32)
    wide = torch.randn(2, 12, 24)
    u, z = wide[..., :8], wide[..., 16:]
    a = selective_scan(u, inputs["delta"][:, :, 0], inputs["A"][0], inputs["B"][:, :, 0], inputs["C"][:, :, 0], z=z)
    transposed = u.transpose(0, 1).contiguous().transpose(0, 1)
    b = selective_scan(
        transposed,
        inputs["delta"][:, :, 0],
        inputs["A"][0],
        inputs["B"][:, :, 0],
        inputs["C"][:, :, 0],
        z=z.contiguous(),
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("merge", ["none", "sum"])
def test_cpu_reads_memory_of_any_strides(merge):
    """The kernels get addresses: a stride that is taken for granted would read, or write, somewhere else."""
    inputs, table = make_inputs(2, 12, 3, 8, 4, 2, torch.float32)
    options = dict(delta_softplus=True, merge=merge)

    def turned(tensor):  # the last axis is the one with the largest step
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    found = []
    for form in (torch.clone, turned):
        leaves = {name: form(tensor).requires_grad_() for name, tensor in inputs.items()}
        y, last_state = selective_scan(**leaves, paths=table, return_last_state=True, backend="cpu", **options)
        seeds = [form(torch.ones_like(y)), form(torch.ones_like(last_state))]
        found.append([y, last_state, *torch.autograd.grad([y, last_state], list(leaves.values()), seeds)])
    for dense, strided in zip(*found, strict=True):
        assert torch.equal(dense, strided)


def test_operator_takes_paths_of_any_integers():
    inputs, table = make_inputs(1, 9, 2, 6, 4, 1, torch.float32)
    given = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    options = None, True, False, False, "cpu"
    long, short = (torch.ops.vision_mamba.selective_scan(*given, p, *options)[0] for p in (table.long(), table.int()))
    assert torch.equal(long, short)


def test_backward_twice_gives_equal_bits():
    inputs, table = make_inputs(3, 50, 2, 200, 16, 1, torch.float32)
    a, b = (run(inputs, table, "cpu", torch.float32, delta_softplus=True, merge="sum") for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_compiles_without_graph_break():
    inputs, table = make_inputs(1, 6, 2, 4, 3, 1, torch.float32)

    def scan(x):
        return selective_scan(**x, paths=table, merge="sum", delta_softplus=True)

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), scan(inputs))


def test_second_derivative_is_a_clear_error():
    inputs, table = make_inputs(1, 4, 1, 2, 2, 1, torch.float64)
    u = inputs.pop("u").requires_grad_()
    y = selective_scan(u, **inputs, paths=table)
    (du,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        du.sum().backward()


def test_bad_input_is_named():
    inputs, table = make_inputs(1, 6, 2, 4, 3, 1, torch.float32)
    with pytest.raises(ValueError, match=r"paths\[1\] is not a permutation"):
        selective_scan(**inputs, paths=torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 4]]))
    with pytest.raises(ValueError, match=r"paths\[0\] is not a permutation"):
        selective_scan(**inputs, paths=table + 1)
    with pytest.raises(ValueError, match="A has shape"):
        selective_scan(**{**inputs, "A": inputs["A"][:, :3]}, paths=table)
    with pytest.raises(ValueError, match="A is torch.complex64; expected a real"):
        selective_scan(**{**inputs, "A": inputs["A"].to(torch.complex64)}, paths=table)
    with pytest.raises(ValueError, match="merge='mean'"):
        selective_scan(**inputs, paths=table, merge="mean")
    with pytest.raises(ValueError, match="unknown scan backend 'cuda'.*triton, cpu, reference"):
        selective_scan(**inputs, paths=table, backend="cuda")
    with pytest.raises(RuntimeError, match="use 'triton' or 'reference'"):
        resolve_backend("cpu", torch.device("cuda"))


@pytest.mark.parametrize("backend", ["reference", "cpu", "cpu, multiplied as on a GPU"])
@pytest.mark.parametrize("own", [True, False], ids=["a matrix for each path", "one for all"])
@pytest.mark.parametrize("with_paths", [True, False])
@pytest.mark.parametrize("dim, groups", [(6, 1), (400, 2)])
def test_low_rank_steps_equal_their_product(dim, groups, with_paths, own, backend, monkeypatch):
    backend, _, elsewhere = backend.partition(",")
    if elsewhere:  # one block-diagonal matrix for all paths
        module = sys.modules[selective_scan.__module__]
        monkeypatch.setattr(module, "step_matrix", lambda delta, weight: step_matrix(delta.to("meta"), weight))
    generator = torch.Generator().manual_seed(0)
    inputs, table = make_inputs(2, 7, 3, dim, 4, groups, torch.float64)
    if not with_paths:  # every path reads the same steps, B and C
        inputs |= {name: inputs[name][:, :, 0] for name in ("B", "C")}
    low = torch.randn(2, 7, *([3] if with_paths else []), 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(*([3] if own and with_paths else []), dim, 2, generator=generator, dtype=torch.float64)
    product = "blkr,kdr->blkd" if weight.ndim == 3 else "...r,dr->...d"

    found = []
    for given in (
        lambda low, weight: {"delta": torch.einsum(product, low, weight)},
        lambda low, weight: {"delta": low, "delta_weight": weight},
    ):
        leaves = [t.clone().requires_grad_() for t in (inputs["u"], low, weight)]
        others = {name: t for name, t in inputs.items() if name not in ("u", "delta")}
        y = selective_scan(leaves[0], **given(*leaves[1:]), **others, delta_softplus=True, paths=table, backend=backend)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, cotangent)])
        with torch.no_grad():
            again = selective_scan(
                leaves[0], **given(*leaves[1:]), **others, delta_softplus=True, paths=table, backend=backend
            )
        assert_close("without gradients", again, y.detach(), 1e-12)
    for name, product, low_rank in zip(("y", "du", "dlow", "dweight"), *found, strict=True):
        assert_close(name, low_rank, product, 1e-12)


def test_low_rank_steps_are_all_that_is_kept():
    u = torch.randn(2, 7, 40, requires_grad=True)
    low, weight = torch.randn(2, 7, 3, 2), torch.randn(3, 40, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        selective_scan(u, low, -torch.ones(3, 40, 1), *[torch.randn(2, 7, 3, 1)] * 2, delta_weight=weight)
    assert low.shape in kept and (2, 7, 3, 40) not in kept


def test_bad_low_rank_steps_are_named():
    u, low, A, B = torch.randn(1, 5, 4), torch.randn(1, 5, 2, 3), -torch.ones(2, 4, 1), torch.randn(1, 5, 2, 1)
    with pytest.raises(ValueError, match=r"delta_weight has shape \(2, 3, 4\).*\(4, 3\) or \(2, 4, 3\)"):
        selective_scan(u, low, A, B, B, delta_weight=torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="delta_weight is on meta, u on cpu"):
        selective_scan(u, low, A, B, B, delta_weight=torch.randn(4, 3, device="meta"))
    with pytest.raises(RuntimeError, match="no second derivative"):
        weight = torch.randn(4, 3, requires_grad=True)
        y = selective_scan(u, low, A, B, B, delta_weight=weight)
        (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
        grad.sum().backward()


def test_a_block_diagonal_product_is_each_paths_own():
    """What a GPU does in the place of a product for each path; the golden cases test the rest of it there."""
    x, weight = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    expected = torch.einsum("blki,koi->blko", x, weight)
    product = torch.nn.functional.linear(x.flatten(2), block_diagonal(weight)).unflatten(-1, (3, 6))
    assert_close("block-diagonal", product, expected, 1e-12)
    assert_close("batched", path_products(x, weight), expected, 1e-12)
