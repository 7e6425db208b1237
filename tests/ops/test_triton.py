"""The Triton kernels against the definitions in float64.

Without a GPU they run in Triton's interpreter (``backends.py``).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from tests.ops.backends import CUDA, DEVICE, INTERPRETED, TOLERANCE, kernels, needs_gpu
from tests.ops.gluon_interpreter import emulate
from vision_mamba.ops.backend import load_backend
from vision_mamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_of_half
from vision_mamba.ops.selective_scan import selective_scan

gpu = pytest.mark.gpu


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests of the kernels run in this process")
def test_in_the_interpreter():
    """All tests of this folder with "triton" in the name of the file, test or parameter."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-k", "triton", "-p", "no:cacheprovider", os.path.dirname(__file__)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@dataclass(frozen=True)
class Case:
    length: int
    dim: int = 5
    num_states: int = 4
    num_paths: int = 2
    batch: int = 1
    groups: int = 1
    merge: str = "none"
    u_shared: bool = True
    z: str = "shared"  # "shared", "each" or "none"
    parameters: bool = True  # D, delta_bias and an initial state
    softplus: bool = True
    broadcast: bool = False  # delta, B, C and the parameters once for all paths
    dtype: torch.dtype = torch.float32
    programs: int | None = None  # how many are wanted: 0 has each walk all paths, many cut the paths


def inputs(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    """In the dtype of the case, with the slices of wide projections that models pass in."""
    generator = torch.Generator().manual_seed(case.length + 31 * case.dim)
    batch, length, dim, states, paths = case.batch, case.length, case.dim, case.num_states, case.num_paths

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    each = () if case.broadcast else (paths,)
    token_shape = (batch, length, paths, dim)
    wide = normal(batch, length, 2 * dim, dtype=case.dtype)
    lead = (batch, length) if case.broadcast else (batch, length, paths)
    projected = normal(*lead, case.groups, 2 * states + 3, dtype=case.dtype)
    table = torch.stack([torch.randperm(length, generator=generator) for _ in range(paths)])
    return {
        "u": wide[..., :dim] if case.u_shared else normal(*token_shape, dtype=case.dtype),
        "delta": normal(*lead, dim, dtype=case.dtype) * 0.5 + (-1.0 if case.softplus else 1.5),
        "A": -torch.rand(*each, dim, states, generator=generator).to(device) * 3 - 0.1,
        "B": projected[..., 3 : 3 + states],
        "C": projected[..., 3 + states :],
        "D": normal(*each, dim) if case.parameters else None,
        "z": {"shared": wide[..., dim:], "each": normal(*token_shape, dtype=case.dtype), "none": None}[case.z],
        "delta_bias": normal(*each, dim) * 0.3 if case.parameters else None,
        "initial_state": normal(batch, paths, dim, states) if case.parameters else None,
        "paths": table.to(device),
    }


def results(case: Case, given: dict, backend: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients, by name."""
    float64 = backend == "reference"
    tensors = {}
    for name, tensor in given.items():
        if tensor is not None and name != "paths":
            tensor = (tensor.double() if float64 else tensor).detach()
            tensors[name] = tensor.requires_grad_()
    y, last = selective_scan(
        **tensors, paths=given["paths"], delta_softplus=case.softplus, merge=case.merge, return_last_state=True,
        backend=backend,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(y.shape, generator=generator).to(given["u"].dtype).to(y)
    dlast = torch.randn(last.shape, generator=generator).to(last)
    grads = torch.autograd.grad([y, last], list(tensors.values()), [dy, dlast])
    return {"y": y.detach(), "last_state": last.detach()} | {
        f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)
    }


def assert_near(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == reference.keys()
    errors = {}
    for name, tensor in ours.items():
        expected = reference[name]
        assert tensor.shape == expected.shape, name
        errors[name] = ((tensor.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2e} of {errors}"


def as_if_programs_fill_the_device(module, programs: int, monkeypatch) -> None:
    """So many: where there are fewer, paths are cut into spans, however short."""
    monkeypatch.setattr(module, "_wanted_programs", lambda *_: programs)
    monkeypatch.setattr(module, "_SPAN_STEPS", 1)
    monkeypatch.setattr(module, "_gluon_spans", lambda given, length, *_, **__: spans_of(programs // given, length))


def spans_of(wanted: int, length: int) -> int:
    """Shorter ones than the kernels' own choice, for which the paths of tests are too short."""
    return max(1, min(wanted, math.isqrt(length)))


def check_scan(case: Case, monkeypatch) -> None:
    from vision_mamba.ops.triton import selective_scan as module

    if case.programs is not None:
        as_if_programs_fill_the_device(module, case.programs, monkeypatch)
    given = inputs(case, DEVICE)
    reference = results(case, given, "reference")
    assert_near(results(case, given, "triton"), reference, TOLERANCE[case.dtype])


def use_gluon(module, monkeypatch) -> None:
    """The kernels in Gluon, emulated in the interpreter; the test is skipped where there are none."""
    if INTERPRETED:
        emulate(monkeypatch, module)
    elif not module.HAS_GLUON:
        pytest.skip("needs Triton 3.6 and an NVIDIA GPU")


def record_launches(module, monkeypatch) -> list[tuple[str, dict, int]]:
    """Name, arguments and warps of the kernels that are launched from now on."""
    launched = []
    launch = module.launch

    def record(kernel, grid, arguments, warps, *options):
        launched.append((kernel.__name__, arguments, warps))
        launch(kernel, grid, arguments, warps, *options)

    monkeypatch.setattr(module, "launch", record)
    return launched


SMALL = [
    Case(1),
    Case(7, dim=40, num_states=16, batch=2, merge="sum"),
    Case(7, num_paths=1, num_states=3, z="none", parameters=False),
    Case(7, num_paths=4, num_states=1, merge="sum", u_shared=False, z="each", softplus=False, programs=0),
    Case(7, num_paths=3, merge="sum", batch=2, programs=0),
    Case(7, num_paths=3, z="each", programs=0),
    Case(7, num_paths=3, u_shared=False, merge="sum"),
    Case(7, dim=6, groups=3, num_states=3, num_paths=1),
    Case(7, num_paths=2, broadcast=True, merge="sum"),
    Case(7, num_states=33, num_paths=1, parameters=False),
    Case(7, num_states=128, num_paths=1),
    Case(7, num_states=16, dtype=torch.bfloat16, merge="sum"),
    Case(7, num_states=1, dtype=torch.float16, z="each"),
    Case(63, num_states=16, num_paths=1),
    Case(63, num_states=1, merge="sum", programs=100),
    Case(63, num_states=16, num_paths=1, z="none", programs=100),
    Case(197, num_states=1, num_paths=2, merge="sum", programs=0),
    Case(197, num_states=3, num_paths=1, z="none", programs=100),
]


@kernels
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_scan_agrees_with_the_reference(case, monkeypatch):
    check_scan(case, monkeypatch)


LARGE = [
    *(Case(length, 96, 16, 2, batch=2, merge="sum") for length in (1, 63, 197, 500, 1000, 2049)),
    *(Case(length, 100, 16, 2, batch=2, merge="sum", dtype=torch.bfloat16) for length in (500, 1000, 2049)),
    *(Case(1000, 72, states, 1, z="none") for states in (1, 2, 7, 32, 64, 128)),
    *(Case(500, 80, 16, paths, batch=2, merge="sum", programs=0) for paths in (1, 2, 3, 4)),
    *(Case(500, 80, 1, 4, batch=2, merge=merge, u_shared=False, z="each") for merge in ("none", "sum")),
    Case(2049, 96, 1, 4, batch=2, merge="sum", z="none", dtype=torch.bfloat16),
    Case(785, 192, 16, 2, batch=2, groups=4, dtype=torch.float16),
    Case(785, 96, 16, 3, broadcast=True, z="each"),
    Case(1000, 384, 16, 1, softplus=False),
    Case(20000, 32, 16, 1, dtype=torch.bfloat16),
]


@gpu
@needs_gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_scan_agrees_with_the_reference_at_size(case, monkeypatch):
    check_scan(case, monkeypatch)


# Of the kernels in scan_gluon.py: 5 to 16 states, and every argument that is a different program.
GLUON = [
    *(Case(length, 40, 16, 2, batch=2) for length in (1, 3, 4, 5, 8, 15, 16, 17, 33)),
    *(Case(100, 33, states, 2) for states in (5, 7, 8, 9, 13, 15)),
    Case(150, 50, 8, 2, merge="sum", programs=100),
    Case(150, 50, 16, 1, z="none", programs=100),
    Case(150, 50, 16, 1, z="none", parameters=False),
    Case(150, 50, 16, 3, u_shared=False, z="each", softplus=False),
    Case(150, 50, 16, 3, z="each", merge="sum", programs=0),
    Case(150, 48, 12, 2, groups=3, merge="sum"),
    Case(150, 50, 16, 2, broadcast=True, merge="sum", programs=40),
    Case(150, 50, 16, 2, merge="sum", dtype=torch.bfloat16, programs=60),
    Case(150, 50, 16, 2, merge="sum", dtype=torch.float16),
    # More states than the kernels hold, shared out among scans that are added: of 16, 12, 10.
    Case(150, 50, 32, 1, merge="sum", programs=100),
    Case(150, 48, 24, 1, groups=3, z="each", softplus=False, parameters=False),
    Case(150, 50, 20, 1, z="none", u_shared=False, broadcast=True),
    Case(150, 50, 64, 1, dtype=torch.bfloat16),
    Case(150, 50, 32, 1, dtype=torch.float16),
]


@kernels
@pytest.mark.parametrize("case", GLUON, ids=str)
@pytest.mark.parametrize("block", [16, 32])
def test_gluon_scan_agrees_with_the_reference(case, block, monkeypatch):
    from vision_mamba.ops.triton import selective_scan as module

    use_gluon(module, monkeypatch)
    if INTERPRETED:
        if GLUON.index(case) % 2 == (block == 16):
            pytest.skip("too slow in the interpreter: each case with one block of channels, in turn")
        # More than one saved state (two spans where they are cut), and channels that fill no block.
        length, dim = min(case.length, 33 if case.programs else 17), min(case.dim, 18)
        case = dataclasses.replace(case, length=length, dim=dim, batch=1)
    states = case.num_states // module._shares(case.num_states, case.num_paths, torch.device(DEVICE))
    config = module._gluon_forward_config(states, torch.device("meta"), 10**6, case.length)
    config = config._replace(block=block, spans=spans_of(case.programs or 1, case.length))
    monkeypatch.setattr(module, "_gluon_forward_config", lambda *given: config)
    launched = record_launches(module, monkeypatch)
    check_scan(case, monkeypatch)
    assert {"scan_forward_kernel", "scan_backward_kernel"} <= {name for name, *_ in launched}
    if states < case.num_states:  # without gradients the parts of the sum are rounded
        given = inputs(case, DEVICE)
        options = dict(delta_softplus=case.softplus, merge=case.merge)
        y = selective_scan(**given, **options, backend="triton")
        assert_near({"y": y}, {"y": results(case, given, "reference")["y"]}, TOLERANCE[case.dtype])


@kernels
def test_operators_of_shared_out_states(monkeypatch):
    """What a compiler is told of their results' shapes, which are those of other scans inside."""
    from vision_mamba.ops.triton import selective_scan as module

    use_gluon(module, monkeypatch)
    given = inputs(Case(18, 10, 20, 1), DEVICE)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "paths", "initial_state")
    tensors = [given[name].unsqueeze(2) if name in "uz" else given[name] for name in names]
    tensors[8] = tensors[8].int()
    checked = dict(test_utils=("test_schema", "test_faketensor"))
    arguments = (*tensors, True, False, True, "triton")
    torch.library.opcheck(torch.ops.vision_mamba.selective_scan, arguments, **checked)
    y, last_state, states = torch.ops.vision_mamba.selective_scan(*arguments)
    assert module.wants_output(tensors[0], tensors[2], tensors[6], False) and states.shape[2] == 2
    arguments = (torch.ones_like(y), torch.ones_like(last_state), states, *tensors, True, False, "triton", y)
    torch.library.opcheck(torch.ops.vision_mamba.selective_scan_backward, arguments, **checked)


@kernels
@pytest.mark.parametrize("states", [8, 16])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("several", [False, True])
def test_border_states_of_any_size(states, block, several, monkeypatch):
    """They are saved in 16 bits, of which five are the exponent's: far less than a state's range."""
    from vision_mamba.ops.triton import selective_scan as module

    use_gluon(module, monkeypatch)
    config = module._gluon_forward_config(states, torch.device("meta"), 10**6, 35)._replace(block=block)
    if several:
        config = shared_config(module, states, block, 512 // block)
    monkeypatch.setattr(module, "_gluon_forward_config", lambda *given: config)
    # Of one block of channels in the backward pass: the interpreter would cut parts of dB and dC, and then their sums.
    case = Case(18 if INTERPRETED else 70, 30, states, 1, z="none", dtype=torch.bfloat16, parameters=False)
    for exponent in (-90, 90) if INTERPRETED else (-90, -30, 20, 90):
        given = inputs(case, DEVICE)
        given["u"] = given["u"] * 2.0**exponent
        given["u"][..., :16] *= 2.0**8  # channels that share an exponent, and others
        reference = results(case, given, "reference")
        assert_near(results(case, given, "triton"), reference, TOLERANCE[case.dtype])


# Of several warps a program: channels a program, steps a tile; over one tile and more.
TILES = [(16, 32), (32, 16), (32, 32)]
SHARED = [
    (Case(1, 18, 16, 1), (32, 16)),
    (Case(63, 20, 5, 2, z="each", softplus=False), (16, 32)),
    (Case(63, 20, 16, 2, groups=2, merge="sum"), (16, 32)),
    (Case(70, 18, 8, 1, z="none", parameters=False), (32, 16)),
    (Case(70, 34, 16, 3, z="each", merge="sum", programs=0), (32, 16)),
    (Case(35, 18, 12, 2, u_shared=False, broadcast=True, dtype=torch.bfloat16), (16, 32)),
    *((Case(70, 34, states, 1, dtype=torch.bfloat16), tile) for states in (8, 16) for tile in TILES),
    *((Case(500, 384, 16, paths, batch=2, merge="sum"), tile) for paths in (1, 2) for tile in TILES),
    *((Case(800, 384, 16, 1, programs=60), tile) for tile in TILES),
    *((Case(197, 40, states, 3, dtype=torch.float16), tile) for states in (8, 16) for tile in TILES),
]


def shared_config(module, states, block, steps):
    """Four warps a program."""
    config = module._gluon_forward_config(states, torch.device("meta"), 10**6, 1)
    return config._replace(block=block, steps=steps, warps=4, registers=None)


@kernels
@pytest.mark.parametrize("case, tile", SHARED, ids=str)
def test_gluon_scan_by_several_warps_agrees_with_the_reference(case, tile, monkeypatch):
    from vision_mamba.ops.triton import selective_scan as module

    if INTERPRETED:
        if case.length > 100:
            pytest.skip("too slow in the interpreter")
        # More than one tile and one block.
        case = dataclasses.replace(case, length=min(case.length, 35), dim=min(case.dim, tile[0] + 2))
    use_gluon(module, monkeypatch)
    config = shared_config(module, case.num_states, *tile)._replace(spans=spans_of(case.programs or 1, case.length))
    monkeypatch.setattr(module, "_gluon_forward_config", lambda *given: config)
    launched = record_launches(module, monkeypatch)
    check_scan(case, monkeypatch)
    assert {"scan_forward_kernel", "scan_backward_kernel"} <= {name for name, *_ in launched}
    for name, arguments, warps in launched:
        if name == "scan_forward_kernel":
            assert warps == 4 and not arguments["LOOP_PATHS"], "one warp loops over paths: no barrier is between them"


@kernels
@pytest.mark.parametrize("kernel", ["portable", "spans", "gluon"])
def test_gradient_of_the_step_sizes_over_them(kernel, monkeypatch):
    """The same numbers in the memory of step sizes that are the operator's own, here those of low rank."""
    from vision_mamba.ops.triton import selective_scan as module

    if kernel != "portable":
        use_gluon(module, monkeypatch)
    if kernel == "spans":
        as_if_programs_fill_the_device(module, 60, monkeypatch)
    length, dim = (35, 18) if INTERPRETED else (197, 96)
    states = {"portable": 1, "spans": 5}.get(kernel, 16)
    given = inputs(Case(length, dim, states, 2, dtype=torch.bfloat16), DEVICE)
    delta, weight = given.pop("delta")[..., :3].clone(), torch.randn(2, dim, 3, device=DEVICE)
    leaves = [t.requires_grad_() for t in (delta, weight, *given.values()) if t is not None and t.is_floating_point()]
    run = module.selective_scan_backward
    found = []
    for own in (True, False):
        over = []

        def backward(*inputs, own=own, over=over):
            *inputs, overwrite = inputs
            inputs[4] = inputs[4].contiguous()  # as a GPU's product of all paths is
            grads = run(*inputs, overwrite and own)
            over.append((overwrite, grads[1].data_ptr() == inputs[4].data_ptr()))
            return grads

        monkeypatch.setattr(load_backend("triton"), "selective_scan_backward", backward)
        y = selective_scan(delta=delta, delta_weight=weight, delta_softplus=True, backend="triton", **given)
        found.append(torch.autograd.grad(y.float().square().sum(), leaves))
        assert over == [(True, own)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gates", ["zero", "tiny", "large"])
def test_gates_that_leave_nothing(gates, dtype):
    """The gate's gradient comes from what was gated, of which the output shows nothing at such gates."""
    case = Case(9, dim=20, num_paths=2, merge="sum", batch=2, dtype=dtype)
    given = inputs(case, DEVICE)
    z = given["z"].clone()
    z[:, ::2] = {"zero": 0.0, "tiny": 1e-30, "large": -60.0}[gates]
    given["z"] = z
    ours, reference = results(case, given, "triton"), results(case, given, "reference")
    assert_near(ours, reference, TOLERANCE[dtype])
    if gates != "large":  # where z is small, its slope is a half all the same
        assert_near({"dz": ours["dz"][:, ::2]}, {"dz": reference["dz"][:, ::2]}, TOLERANCE[dtype])


@kernels
@pytest.mark.parametrize("kernel", ["portable", "spans", "gluon", "shared"])
def test_y_over_the_step_sizes(kernel, monkeypatch):
    """Where the caller gives their memory away: the same numbers in it; else, or with gradients, it is left alone."""
    from vision_mamba.ops.triton import selective_scan as module

    states = {"portable": 3, "spans": 5}.get(kernel, 16)  # each state is a program of the kernel that links spans
    length, dim = (33, 18) if INTERPRETED else (197, 96)
    if kernel != "portable":
        use_gluon(module, monkeypatch)
        config = module._gluon_forward_config(states, torch.device("meta"), 10**6, length)
        if kernel == "shared":
            config = shared_config(module, states, 16, 32)
        if kernel == "spans":
            config = config._replace(spans=3)
        monkeypatch.setattr(module, "_gluon_forward_config", lambda *given: config)
    if kernel == "spans":
        as_if_programs_fill_the_device(module, 60, monkeypatch)

    def run(given, **options):
        given = given | {"delta": given["delta"].clone()}
        return given["delta"], selective_scan(**given, delta_softplus=True, backend="triton", **options)

    given = inputs(Case(length, dim, states, 2, dtype=torch.bfloat16), DEVICE)
    _, expected = run(given)
    delta, y = run(given, overwrite_delta=True)
    assert y.data_ptr() == delta.data_ptr() and torch.equal(y, expected)

    def left_alone(given, **options):
        delta, y = run(given, overwrite_delta=True, **options)
        return torch.equal(delta, given["delta"]) and y.data_ptr() != delta.data_ptr()

    assert left_alone(given, merge="sum")
    assert left_alone(given | {"u": given["u"].clone().requires_grad_()})
    assert left_alone(given | {"u": given["u"].float()}), "y has the dtype of u"
    assert left_alone(inputs(Case(length, dim, states, 2, broadcast=True), DEVICE)), "one for all paths"


def test_warps_and_spans_where_programs_are_few(monkeypatch):
    """On 132 multiprocessors: enough images fill them, and one image alone has too few channels for a long walk."""
    module = pytest.importorskip("vision_mamba.ops.triton.selective_scan")
    monkeypatch.setattr(module, "HAS_GLUON", True)  # spans are of its chunks
    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    forward, backward = {}, {}
    for batch, length in (
        (128, 197), (96, 197), (32, 785), (64, 1025), (16, 2048), (8, 6085), (4, 6085), (1, 65536), (1, 6085), (1, 785),
        (1, 577), (4, 577), (1, 197), (192, 785),
    ):  # fmt: skip
        programs = batch * 384 // 32
        config = module._gluon_forward_config(16, torch.device("cuda"), programs, length)
        forward[batch, length] = config.warps, config.block, config.steps, config.spans
        config = module._gluon_backward_config(16, torch.device("cuda"), programs, length)
        plan = module._plan(batch, length, 1, 12, 16, torch.device("cuda"), config, False, 2)
        assert plan.span % 16 == 0 or plan.num_spans == 1, "border states are of its chunks"
        assert plan.programs == programs * plan.num_spans
        backward[batch, length] = plan.num_spans
    assert forward == {
        (192, 785): (1, 32, 8, 1), (128, 197): (1, 32, 8, 1),
        (96, 197): (4, 32, 16, 1), (32, 785): (4, 32, 32, 1), (64, 1025): (4, 32, 32, 1),
        (16, 2048): (4, 16, 32, 1), (8, 6085): (4, 16, 32, 1), (4, 6085): (4, 32, 32, 8), (1, 65536): (4, 32, 32, 44),
        (1, 6085): (4, 32, 32, 32), (1, 785): (4, 32, 32, 9), (1, 577): (4, 32, 32, 10), (4, 577): (4, 16, 32, 1),
        (1, 197): (4, 16, 32, 1),
    }  # fmt: skip
    # Of 1,056 programs that the device holds: a wave, two, or as many as there are without spans.
    assert backward == {
        (192, 785): 1, (128, 197): 1, (96, 197): 1, (32, 785): 5, (64, 1025): 1, (16, 2048): 11, (8, 6085): 11,
        (4, 6085): 22,
        (1, 65536): 171, (1, 6085): 77, (1, 785): 10, (1, 577): 8, (4, 577): 8, (1, 197): 3,
    }  # fmt: skip


COMPILE = """
import json
import torch
from benchmarks import scan
from tests.ops.test_triton import shared_config
from vision_mamba.ops.triton import selective_scan as module

for kernel, states in (
    ("forward", 8), ("forward", 16), ("backward", 8), ("backward", 16),
    ("16 32", 8), ("32 16", 8), ("32 32", 8), ("16 32", 16), ("32 16", 16), ("32 32", 16),
):
    config = module._gluon_forward_config(states, torch.device("meta"), 10**6, 197)
    if kernel == "backward":
        config = module._gluon_backward_config(states, torch.device("meta"), 10**6, 197)
    elif kernel != "forward":
        config = shared_config(module, states, *map(int, kernel.split()))
    direction = "backward" if kernel == "backward" else "forward"
    used = scan.compile_candidate((2, 64, 197, states, 1), "bfloat16", direction, config, *scan.H100)
    print("compiled", json.dumps([kernel, states, used["stack"], used["barriers"]]))
"""
# Bytes a thread that are spilled, and barriers, at most: with any Triton. Triton 3.6, with which times were measured,
# spills none of ("forward", 16) and 32 of ("backward", 8). More room would be fewer warps: 168 registers are twelve.
MOST = {
    ("forward", 8): (0, 2), ("forward", 16): (40, 2), ("backward", 8): (40, 11), ("backward", 16): (16, 11),
    ("16 32", 8): (0, 2), ("32 16", 8): (0, 2), ("32 32", 8): (0, 2),
    ("16 32", 16): (0, 2), ("32 16", 16): (0, 2), ("32 32", 16): (0, 2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles, and the interpreter has no compiler")
def test_gluon_scan_compiles_for_an_h100():
    """Numbers are checked in the interpreter; here, that layouts fit. Gluon changes from Triton to Triton.

    What is spilled matters: shared memory leaves the first cache no room for it. And so do barriers, of which Triton
    puts one between two stores into one piece of shared memory: a lone warp waits at each.
    """
    module = pytest.importorskip("vision_mamba.ops.triton.selective_scan")
    if not module.HAS_GLUON:
        pytest.skip("needs Triton 3.6 for NVIDIA GPUs")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=root, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.partition(" ")[2] for line in run.stdout.splitlines() if line.startswith("compiled ")]
    found = {(kernel, states): used for kernel, states, *used in map(json.loads, lines)}
    assert found.keys() == MOST.keys()
    for kernel, (stack, barriers) in MOST.items():
        assert found[kernel][0] <= stack and found[kernel][1] <= barriers, (kernel, found)


@gpu
@needs_gpu
@pytest.mark.parametrize("states", [8, 16])
def test_portable_scan_agrees_with_the_reference_on_a_gpu(states, monkeypatch):
    """As on devices without Gluon."""
    from vision_mamba.ops.triton import selective_scan as module

    monkeypatch.setattr(module, "HAS_GLUON", False)
    check_scan(Case(500, 96, states, 2, batch=2, merge="sum"), monkeypatch)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "images, length, dim, rank, states, paths",
    [
        (2, 37, 40, 3, 16, 2),  # channels that fill no tile
        (1, 65, 192, 12, 16, 2),
        (3, 33, 96, 6, 1, 4),
        (1, 1, 130, 17, 5, 3),
        (2, 64, 64, 4, 8, 1),
        (0, 9, 64, 4, 8, 2),
    ],
)
def test_scan_inputs_in_one_kernel(images, length, dim, rank, states, paths, dtype):
    """Against the products in float64, each path's with its own matrices."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter's products take bfloat16 numbers for integers")
    from vision_mamba.layers.mamba import _input_rows
    from vision_mamba.ops.selective_scan import block_diagonal
    from vision_mamba.ops.triton import scan_inputs

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, length, paths, dim, generator=generator).to(dtype)
    weight = (torch.randn(paths, rank + 2 * states, dim, generator=generator) / dim**0.5).to(dtype)
    step_weight = (torch.randn(paths, rank, dim, generator=generator) / rank**0.5).to(dtype)
    rows, steps = _input_rows(weight, states, rank, own_tokens=True), block_diagonal(step_weight)
    found = scan_inputs(x.to(DEVICE), rows.to(DEVICE), steps.to(DEVICE))
    for k in range(paths):
        product = x[:, :, k].double() @ weight[k].double().T
        low, B, C = product.split((rank, states, states), dim=-1)
        delta = low.to(dtype).double() @ step_weight[k].double()
        for name, ours, expected in zip(("delta", "B", "C"), found, (delta, B, C), strict=True):
            assert ours.dtype == dtype and ours[:, :, k].shape == expected.shape, name
            error = (ours[:, :, k].cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30)
            assert error <= TOLERANCE[dtype], (name, k, error)


@kernels
def test_scan_with_more_warps_where_the_batch_does_not_fill_the_device(monkeypatch):
    from vision_mamba.ops.triton import selective_scan as module

    launched = record_launches(module, monkeypatch)
    more = module._forward_config(32, fills=False)
    monkeypatch.setattr(module, "_wanted_programs", lambda device, config: 1 if config == more else 100)
    case = Case(37, num_states=32, merge="sum")
    given = inputs(case, DEVICE)
    assert_near(results(case, given, "triton"), results(case, given, "reference"), TOLERANCE[case.dtype])
    assert ("_scan_forward_kernel", more.warps) in [(name, warps) for name, _, warps in launched]


@kernels
@pytest.mark.parametrize("programs", [0, 100])
def test_backward_twice_gives_equal_bits(programs, monkeypatch):
    from vision_mamba.ops.triton import selective_scan as module

    as_if_programs_fill_the_device(module, programs, monkeypatch)
    case = Case(500, 96, 16, 4, batch=4, merge="sum") if CUDA else Case(33, num_states=4, merge="sum")
    given = inputs(case, DEVICE)
    first, second = results(case, given, "triton"), results(case, given, "triton")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@kernels
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 1, 4), (7, 70, 2, 4), (63, 5, 3, 3), (197, 5, 2, 2)])
def test_convolution_agrees_with_the_reference(shape, silu):
    length, dim, paths, width = shape
    check_convolution(length, dim, paths, width, silu, torch.float32)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(197, 384, 2, 4), (2049, 100, 4, 3), (1000, 97, 1, 4)])
def test_convolution_agrees_with_the_reference_at_size(shape, dtype):
    length, dim, paths, width = shape
    check_convolution(length, dim, paths, width, True, dtype)


def check_convolution(length, dim, paths, width, silu, dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    table = torch.stack([torch.randperm(length, generator=generator) for _ in range(paths)]).to(DEVICE)
    given = {
        "x": torch.randn(2, length, 2 * dim, generator=generator).to(DEVICE, dtype)[..., dim:],
        "weight": torch.randn(paths, dim, width, generator=generator).to(DEVICE),
        "bias": torch.randn(paths, dim, generator=generator).to(DEVICE) if silu else None,
    }
    found = {}
    for backend in ("triton", "reference"):
        tensors = {
            name: (tensor.double() if backend == "reference" else tensor).detach().requires_grad_()
            for name, tensor in given.items()
            if tensor is not None
        }
        y = causal_conv1d(**tensors, activation="silu" if silu else None, paths=table, backend=backend)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(y)
        grads = torch.autograd.grad(y, list(tensors.values()), dy)
        found[backend] = {"y": y.detach()} | {f"d{n}": g for n, g in zip(tensors, grads, strict=True)}
    assert_near(found["triton"], found["reference"], TOLERANCE[dtype])


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "paths"), [(20, None), (20, 1), (130, 2), (20, 3)])
def test_convolution_of_half_is_that_of_a_chunk(dim, paths, dtype):
    """And the gradient of the whole is one tensor, that of the other half behind that of the first one."""
    length = 7 if INTERPRETED else 197
    generator = torch.Generator().manual_seed(0)
    table = None
    if paths is not None:
        table = torch.stack([torch.randperm(length, generator=generator) for _ in range(paths)]).to(DEVICE)
    projected = torch.randn(2, length, 2 * dim, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(dim, 3, generator=generator).to(DEVICE)
    bias = torch.randn(dim, generator=generator).to(DEVICE)
    found = {}
    for name in ("ours", "expected"):
        tensors = [t.double() if name == "expected" else t for t in (projected, weight, bias)]
        whole, weight_, bias_ = (t.detach().requires_grad_() for t in tensors)
        options = dict(activation="silu", paths=table)
        if name == "ours":
            y, rest = causal_conv1d_of_half(whole, weight_, bias_, backend="triton", **options)
        else:
            x, rest = whole.chunk(2, dim=-1)
            y = causal_conv1d(x, weight_, bias_, backend="reference", **options)
        generator = torch.Generator().manual_seed(1)
        given = [torch.randn(t.shape, generator=generator).to(dtype).to(t) for t in (y, rest)]
        grads = torch.autograd.grad((y, rest), (whole, weight_, bias_), given)
        found[name] = dict(zip(("y", "rest", "dwhole", "dweight", "dbias"), (y, rest, *grads), strict=True))
    assert_near({name: t.detach() for name, t in found["ours"].items()}, found["expected"], TOLERANCE[dtype])
    # Where only one of both is used, the other one's gradient is zero.
    whole = projected.clone().requires_grad_()
    y, rest = causal_conv1d_of_half(whole, weight, bias, paths=table, backend="triton")
    (grad,) = torch.autograd.grad(rest.float().sum(), whole)
    assert torch.equal(grad[..., :dim], torch.zeros_like(grad[..., :dim]))
    assert torch.equal(grad[..., dim:], torch.ones_like(grad[..., dim:]))
    y, rest = causal_conv1d_of_half(whole, weight, bias, paths=table, backend="triton")
    (grad,) = torch.autograd.grad(y.float().sum() + rest.float().sum(), whole, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d has no second derivative"):
        grad.float().square().sum().backward()


@kernels
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("change", [{"warps": 1, "steps": 2, "tiles": 8}, {"warps": 4, "steps": 8}], ids=str)
@pytest.mark.parametrize("programs", [0, 100])
def test_other_launch_configurations_give_the_same(direction, change, programs, monkeypatch):
    """What ``benchmarks/scan.py --tune`` tries."""
    from vision_mamba.ops.triton import selective_scan as module

    config = getattr(module, f"_{direction}_config")(4)._replace(**change)
    monkeypatch.setattr(module, f"_{direction}_config", lambda num_states, fills=True: config)
    check_scan(Case(19, num_states=4, merge="sum", programs=programs), monkeypatch)


def test_chunks_are_whole_tiles_of_the_forward_pass():
    module = pytest.importorskip("vision_mamba.ops.triton.selective_scan")
    for num_states in range(1, module.MAX_STATES + 1):
        for fills in (True, False):
            assert module._chunk(num_states) % module._forward_config(num_states, fills).steps == 0, num_states
        assert not module._uses_gluon(num_states, torch.device("cuda")) or module._chunk(num_states) % 8 == 0


@kernels
def test_too_many_states_name_the_remedy():
    x = torch.zeros(1, 2, 4, device=DEVICE)
    wide = torch.zeros(1, 2, 257, device=DEVICE)
    with pytest.raises(RuntimeError, match="up to 256 states.*A has 257.*backend='reference'"):
        selective_scan(x, x, -torch.ones(4, 257, device=DEVICE), wide, wide, backend="triton")


@kernels
def test_float64_names_the_remedy():
    tensor = torch.zeros(1, 4, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="float64.*backend='reference'"):
        selective_scan(
            tensor,
            tensor,
            -torch.ones(8, 2, device=DEVICE),
            tensor[..., :2],
            tensor[..., :2],
            backend="triton",
        )
    with pytest.raises(RuntimeError, match="float64.*backend='reference'"):
        causal_conv1d(tensor, torch.ones(8, 4, device=DEVICE), backend="triton")


@kernels
def test_an_index_outside_the_image_touches_no_foreign_memory():
    x = torch.randn(1, 4, 8, device=DEVICE)
    paths = torch.tensor([0, 1, 2**30, -5], device=DEVICE)
    y = selective_scan(x, x, -torch.ones(8, 2, device=DEVICE), x[..., :2], x[..., :2], paths=paths, backend="triton")
    assert torch.isfinite(y[:, :2]).all()


@gpu
@needs_gpu
def test_offsets_beyond_32_bits():
    """More than 2**31 elements a tensor; the last image must be what it is alone."""
    batch, length, dim = 2, 131072, 8224
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    u = torch.randn(batch, length, dim, device=DEVICE, dtype=torch.bfloat16)
    delta = torch.randn_like(u)
    B = torch.randn(batch, length, 1, device=DEVICE)
    A = -torch.rand(dim, 1, device=DEVICE)
    found = []
    for image in (slice(None), slice(1, None)):
        leaves = [u[image].requires_grad_(), delta[image].requires_grad_(), B[image].requires_grad_()]
        y = selective_scan(*leaves[:2], A, leaves[2], leaves[2], delta_softplus=True, backend="triton")
        found.append([y[-1].detach(), *(g[-1] for g in torch.autograd.grad(y, leaves, u[image].detach()))])
        del y
    for whole, alone in zip(*found, strict=True):
        assert ((whole.float() - alone.float()).norm() / alone.float().norm()).item() < 4e-3


@gpu
@needs_gpu
def test_other_lengths_compile_nothing_new():
    from vision_mamba.ops.triton import selective_scan as module

    def compiled() -> int:
        gluon = module._uses_gluon(16, torch.device(DEVICE))
        kernels_used = module._kernels(gluon)
        return sum(len(cache[0]) for kernel in set(kernels_used) for cache in kernel.device_caches.values())

    counts = []
    for length in (192, 193, 195, 196, 197, 200, 208, 239):  # all cut into spans
        case = Case(length, 96, 16, 2, batch=2, merge="sum")
        results(case, inputs(case, DEVICE), "triton")
        counts.append(compiled())
    assert counts[-1] == counts[0]


@gpu
@needs_gpu
@pytest.mark.parametrize("states", [1, 16])
def test_kernels_of_spans_are_compiled_together(states, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip("this Triton compiles one kernel at a time")
    from triton.runtime import _async_compile
    from triton.runtime.jit import JITFunction

    from vision_mamba.ops.triton import runtime
    from vision_mamba.ops.triton import selective_scan as module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(runtime, "_compiled", set())
    gluon = module._uses_gluon(states, torch.device(DEVICE))
    used = {*module._kernels(gluon), module._link_spans_kernel}
    for kernel in {*used, module._add_partials_kernel}:  # as in a new process
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.device_caches.default_factory))
    together = []
    compile_one = JITFunction._do_compile

    def record(kernel, *args, **options):
        together.append(_async_compile.active_mode.get() is not None)
        return compile_one(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", record)
    case = Case(1000, 96, states, 2, merge="sum")
    given = inputs(case, DEVICE)
    assert_near(results(case, given, "triton"), results(case, given, "reference"), 1e-5)
    # Two or three of the forward pass, of which the Gluon kernel links the spans itself; four of the backward pass.
    assert len(together) == (6 if gluon else 7) and all(together)


@gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    case = Case(63, 32, 16, 2, merge="sum")
    given = inputs(case, "cuda:1")
    assert_near(results(case, given, "triton"), results(case, given, "reference"), 1e-5)
