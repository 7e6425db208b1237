"""The cases of mamba_ssm's own test of its selective scan, on ours.

Grid, shapes, distributions, order of the random draws and tolerances are those of state-spaces/mamba,
tests/ops/test_selective_scan.py (commit e9594ce), for a real A and B, C that vary with the token. Theirs
compares with a float32 loop; here it is a float64 loop in their layout, (batch, channels, L).
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import assert_close
from tests.ops.backends import TOLERANCE, device_of, kernels, needs_gpu
from vision_mamba.ops import selective_scan

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH, DIM, STATES = 2, 4, 8


def draw(length, groups, dtype, *, D=True, z=True, delta_bias=True):
    torch.manual_seed(0)
    lead = (BATCH,) if groups == 1 else (BATCH, groups)
    return {
        "A": -0.5 * torch.rand(DIM, STATES),
        "B": torch.randn(*lead, STATES, length, dtype=dtype),
        "C": torch.randn(*lead, STATES, length, dtype=dtype),
        "D": torch.randn(DIM) if D else None,
        "z": torch.randn(BATCH, DIM, length, dtype=dtype) if z else None,
        "delta_bias": 0.5 * torch.rand(DIM) if delta_bias else None,
        "u": torch.randn(BATCH, DIM, length, dtype=dtype),
        "delta": 0.5 * torch.rand(BATCH, DIM, length, dtype=dtype),
    }


def loop_float64(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus):
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.log1p(torch.exp(delta))
    B, C = (t.unsqueeze(1) if t.ndim == 3 else t for t in (B, C))
    B, C = (t.repeat_interleave(DIM // t.shape[1], dim=1) for t in (B, C))  # (batch, channels, N, L)
    state = torch.zeros(u.shape[0], DIM, STATES, dtype=torch.float64, device=u.device)
    decays = torch.exp(delta.unsqueeze(2) * A[None, :, :, None]).unbind(-1)
    inputs = ((delta * u).unsqueeze(2) * B).unbind(-1)
    states = []
    for decay, x in zip(decays, inputs, strict=True):
        state = decay * state + x
        states.append(state)
    y = (torch.stack(states, dim=-1) * C).sum(2)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * z * torch.sigmoid(z)
    return y, state


def ours(u, delta, A, B, C, D=None, z=None, delta_bias=None, **options):
    """Their layout, as views of it."""
    B, C = (t.permute(0, 2, 1) if t.ndim == 3 else t.permute(0, 3, 1, 2) for t in (B, C))
    u, delta = u.transpose(1, 2), delta.transpose(1, 2)
    z = None if z is None else z.transpose(1, 2)
    y, state = selective_scan(u, delta, A, B, C, D, z, delta_bias, return_last_state=True, **options)
    return y.transpose(1, 2), state


def tolerances(dtype, has_z):
    """(rtol, atol) by tensor."""
    rtol, atol = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}[dtype]
    rtol_w, atol_w = (max(1e-3, rtol), max(1e-3, atol)) if has_z else (1e-3, 1e-3)
    return {
        "y": (rtol, atol), "state": (rtol, atol), "du": (rtol * 2, atol * 2), "ddelta": (rtol * 5, atol * 10),
        "dA": (rtol_w, atol_w * 5), "dB": (rtol, atol), "dC": (rtol, atol), "dD": (rtol_w, atol_w),
        "dz": (rtol_w, atol_w), "ddelta_bias": (rtol_w, atol_w),
    }  # fmt: skip


def check(backend, length, groups, dtype, *, delta_softplus=True, **options):
    given = {n: t.to(device_of(backend)) for n, t in draw(length, groups, dtype, **options).items() if t is not None}
    g = torch.randn(BATCH, DIM, length, dtype=dtype).to(device_of(backend))
    found = []
    for function, cast, choice in ((ours, False, {"backend": backend}), (loop_float64, True, {})):
        leaves = {n: (t.double() if cast else t.detach()).requires_grad_() for n, t in given.items()}
        y, state = function(**leaves, delta_softplus=delta_softplus, **choice)
        grads = torch.autograd.grad(y, list(leaves.values()), g.to(y))
        found.append({"y": y, "state": state} | {f"d{n}": grad for n, grad in zip(leaves, grads, strict=True)})
    allowed = tolerances(dtype, "z" in given)
    for name, expected in found[1].items():
        rtol, atol = allowed[name]
        torch.testing.assert_close(
            found[0][name].double(), expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert_close(name, found[0][name], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [128, 256, 512, 1024])
def test_their_active_grid_on_the_cpu(length, groups, dtype):
    check("cpu", length, groups, dtype)


OPTIONS = [
    dict(zip(("delta_softplus", "delta_bias", "z", "D"), on, strict=True))
    for on in itertools.product((False, True), repeat=4)
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(n for n, on in options.items() if on) or "none"
)
@pytest.mark.parametrize("groups", [1, 2])
def test_their_options_on_the_cpu(groups, options):
    check("cpu", 8, groups, torch.float32, **options)


@kernels
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 5, 10, 15)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_their_options_on_triton(groups, options):
    check("triton", 8, groups, torch.float32, **options)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 2048, 4096])
def test_their_whole_grid_on_triton(length, groups, dtype):
    check("triton", length, groups, dtype)
