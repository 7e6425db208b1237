"""FLOPs: the operators' formulas, and whole models beside the authors' figures."""

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vision_mamba  # noqa: F401  # registers models and formulas
from vision_mamba.layers import SS2D
from vision_mamba.ops import add_norm, causal_conv1d, selective_scan

OPS = torch.ops.vision_mamba


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts().get("Global", {})


@pytest.mark.parametrize("skip_and_gate", [0, 1])
def test_scan(skip_and_gate):
    B, L, K, D, N = 2, 5, 3, 4, 6
    u, delta = torch.randn(B, L, D), torch.randn(B, L, K, D, requires_grad=True)
    more = dict(D=torch.randn(K, D), z=torch.randn(B, L, D)) if skip_and_gate else {}
    args = (u, delta, -torch.rand(K, D, N), torch.randn(B, L, K, N), torch.randn(B, L, K, N))
    forward = B * L * K * D * (9 * N + 2 * skip_and_gate)

    def inference():
        with torch.no_grad():
            selective_scan(*args, **more)

    assert counted(inference) == {OPS.selective_scan: forward}
    training = counted(lambda: selective_scan(*args, **more).sum().backward())
    assert training == {OPS.selective_scan: forward, OPS.selective_scan_backward: 2 * forward}


def test_convolution_counts_as_torch_counts_it():
    B, L, K, D, width = 2, 7, 3, 4, 4
    x, weight = torch.randn(B, L, D), torch.randn(K, D, width, requires_grad=True)
    conv = torch.nn.Conv1d(D, D, width, groups=D, padding=width - 1)
    of_torch = sum(counted(lambda: conv(x.mT)).values()) * L // (L + width - 1)  # which also computes beyond the end
    ours = counted(lambda: causal_conv1d(x, weight).sum().backward())
    assert ours == {OPS.causal_conv1d: K * of_torch, OPS.causal_conv1d_backward: 2 * K * of_torch}


def test_norms_count_nothing_as_in_torch():
    x, norm = torch.randn(3, 8), torch.nn.LayerNorm(8)
    assert counted(lambda: norm(x)) == counted(lambda: add_norm(x, x, norm.weight, norm.bias, norm="layer")) == {}


def test_layers_with_and_without_gradients_agree():
    model, x = timm.create_model("test_vim").eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        inference = counted(lambda: model(x))
    assert inference[OPS.selective_scan] and inference[OPS.causal_conv1d]
    assert counted(lambda: model(x)) == inference
    training = counted(lambda: model(x).sum().backward())
    assert training[OPS.selective_scan_backward] == 2 * inference[OPS.selective_scan]


# assets/performance.md of MzeroMiko/VMamba: GFLOPs at 224 pixels.
PUBLISHED = {"vmamba_tiny_s2l5": 4.9, "vmamba_small_s1l20": 8.6, "vmamba_base_s2l15": 15.4, "vmamba_tiny_v0": 5.6}


class CountNorms(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (OPS.add_norm.default, torch.ops.aten.native_layer_norm.default):
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flops_of_vmamba(name, monkeypatch):
    """The authors count, with fvcore, 1 FLOP a multiply-accumulate, 5 a normalised element, and 9 as here in the scan."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    zeros, scan = [], SS2D.scan

    def spy(self, u, height, width):
        K, D, R = self.dt_proj_weight.shape  # K products, which ours runs as one with a block-diagonal matrix
        zeros.append(u.shape[1] * (K - 1) * K * R * D)
        return scan(self, u, height, width)

    monkeypatch.setattr(SS2D, "scan", spy)
    with torch.no_grad(), CountNorms() as norms:
        found = counted(lambda: model(torch.empty(1, 3, 224, 224, device="meta")))
    of_scan = found.pop(OPS.selective_scan)
    total = sum(found.values()) / 2 - sum(zeros) + 5 * norms.elements + of_scan
    assert round(total / 1e9, 1) == PUBLISHED[name]
