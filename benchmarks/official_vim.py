"""The official Vim, from a checkout of github.com/hustvl/Vim, to measure and to compare with.

Nothing of it is copied here: its modules are imported from the checkout. With its CUDA extensions
(``selective_scan_cuda`` and ``causal_conv1d_cuda``, built from the checkout) it runs as it is; without them, on a CPU,
only what needs CUDA is replaced: the fused kernels by its own ``selective_scan_ref`` and torch's conv1d, its Triton
norm by torch's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F


@functools.cache  # asked before the modules are replaced
def has_kernels() -> bool:
    """Whether the official CUDA extensions are installed."""
    return all(importlib.util.find_spec(name) for name in ("selective_scan_cuda", "causal_conv1d_cuda"))


def load(checkout: Path) -> types.ModuleType:
    """The official ``models_mamba`` module, runnable on a CPU where its extensions are missing. Needs einops."""
    if not (checkout / "vim" / "models_mamba.py").is_file():
        raise SystemExit(f"{checkout} is no checkout of hustvl/Vim: it has no vim/models_mamba.py")
    sys.path[:0] = [str(checkout / folder) for folder in ("vim", "mamba-1p1p1", "causal-conv1d")]

    def stub(name: str, **attributes) -> None:
        module = sys.modules[name] = types.ModuleType(name)
        module.__dict__.update(attributes)

    stub("mamba_ssm.utils.generation", GenerationMixin=object)
    stub("mamba_ssm.utils.hf", load_config_hf=None, load_state_dict_hf=None)
    stub("mamba_ssm.models.mixer_seq_simple", MambaLMHeadModel=None)
    if has_kernels():
        return importlib.import_module("models_mamba")
    stub("selective_scan_cuda")
    stub("causal_conv1d_cuda")
    stub("causal_conv1d", causal_conv1d_fn=None, causal_conv1d_update=None)
    stub("mamba_ssm.ops.triton.layer_norm", RMSNorm=torch.nn.RMSNorm, layer_norm_fn=None, rms_norm_fn=None)
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")

    def inner(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, delta_bias, A_reverse=None):
        rank, states = dt_proj.shape[1], A.shape[-1]
        x, z = xz.chunk(2, dim=1)
        padded = F.pad(x, (conv_weight.shape[-1] - 1, 0))
        x = F.silu(F.conv1d(padded, conv_weight, conv_bias, groups=x.shape[1]))
        dt, B, C = (x.transpose(1, 2) @ x_proj.T).split((rank, states, states), dim=-1)
        tensors = (x, (dt @ dt_proj.T).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2), z)

        def scan(A, x, delta, B, C, z):
            return interface.selective_scan_ref(x, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True)

        y = scan(A, *tensors)
        if A_reverse is not None:
            y = y + scan(A_reverse, *(t.flip(-1) for t in tensors)).flip(-1)
        return y

    def no_out_proj(xz, cw, cb, xp, dp, A, B, C, D, delta_bias, delta_softplus):
        return inner(xz, cw, cb, xp, dp, A, D, delta_bias)

    def one_way(xz, cw, cb, xp, dp, op, ob, A, B, C, D, delta_bias, delta_softplus):
        return F.linear(inner(xz, cw, cb, xp, dp, A, D, delta_bias).transpose(1, 2), op, ob)

    def both_ways(xz, cw, cb, xp, dp, op, ob, A, A_b, B, C, D, delta_bias, delta_softplus):
        return F.linear(inner(xz, cw, cb, xp, dp, A, D, delta_bias, A_b).transpose(1, 2), op, ob)

    mixer = importlib.import_module("mamba_ssm.modules.mamba_simple")
    mixer.mamba_inner_fn_no_out_proj = no_out_proj
    mixer.mamba_inner_fn = one_way
    mixer.bimamba_inner_fn = both_ways
    # The mixer asks whether the fused convolution is there before it takes the path replaced above.
    mixer.causal_conv1d_fn = no_out_proj
    return importlib.import_module("models_mamba")


def vim_tiny(checkout: Path, size: int) -> torch.nn.Module:
    """What the official factory vim_tiny_patch16_224_..._midclstok_div2 makes; its norm fused if it has extensions."""
    fused = has_kernels()
    return load(checkout).VisionMamba(
        img_size=size, patch_size=16, embed_dim=192, depth=24, rms_norm=True, residual_in_fp32=True,
        fused_add_norm=fused, final_pool_type="mean", if_abs_pos_embed=True, bimamba_type="v2", if_cls_token=True,
        if_divide_out=True, use_middle_cls_token=True,
    )  # fmt: skip
