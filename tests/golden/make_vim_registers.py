"""Numbers of the official Mamba-R: ``python -m tests.golden.make_vim_registers CHECKOUT``.

CHECKOUT is a checkout of github.com/wangf3014/Mamba-Reg; needs einops. Its model runs as it is, except for the fused
kernel, which needs CUDA: a convolution of torch and the reference scan stand for it. Writes vim_registers.json beside
this file.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.golden import recipe
from vision_mamba.ops import selective_scan

COMMON = dict(img_size=64, patch_size=8, depth=3, embed_dim=32, num_classes=10, rms_norm=True, drop_path_rate=0.0)
CASES = {
    "concatenated": dict(num_cls_tokens=12),
    "reduced": dict(num_cls_tokens=12, cls_reduce=4),
    "layer_norm": dict(num_cls_tokens=6, cls_reduce=2, rms_norm=False),
    "non_square": dict(num_cls_tokens=5, img_size=(64, 40)),
}


def load(checkout: Path) -> types.ModuleType:
    """The official ``models_mamba`` module, runnable on a CPU."""
    sys.path.insert(0, str(checkout))

    def stub(name: str, **attributes) -> None:
        module = sys.modules[name] = types.ModuleType(name)
        module.__dict__.update(attributes)

    def inner(xz, conv_weight, conv_bias, x_proj, dt_proj, A, B, C, D, delta_bias, delta_softplus):
        rank, states = dt_proj.shape[1], A.shape[-1]
        x, z = xz.chunk(2, dim=1)
        x = F.silu(F.conv1d(F.pad(x, (conv_weight.shape[-1] - 1, 0)), conv_weight, conv_bias, groups=x.shape[1]))
        x, z = x.transpose(1, 2), z.transpose(1, 2)
        dt, B, C = (x @ x_proj.T).split((rank, states, states), dim=-1)
        y = selective_scan(
            x, dt @ dt_proj.T, A.to(x), B, C, D.to(x), z, delta_bias.to(x), delta_softplus=True, backend="reference"
        )
        return y.transpose(1, 2)

    stub("selective_scan_cuda")
    stub("causal_conv1d_cuda")
    stub("causal_conv1d", causal_conv1d_fn=None, causal_conv1d_update=None)
    stub("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=None, mamba_inner_fn=None)
    stub("mamba_ssm.ops.triton.layernorm", RMSNorm=torch.nn.RMSNorm, layer_norm_fn=None, rms_norm_fn=None)
    for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        stub(package, __path__=[])
    importlib.import_module("mamba_custom").mamba_inner_fn_no_out_proj = inner
    return importlib.import_module("models_mamba")


def main(checkout: str) -> None:
    official = load(Path(checkout))
    cases = []
    for name, options in CASES.items():
        args = {**COMMON, **options}
        model = official.VisionMamba(**args).eval()
        shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
        model.load_state_dict({k: torch.from_numpy(v) for k, v in recipe.make_state(shapes).items()})
        size = args["img_size"] if isinstance(args["img_size"], tuple) else [args["img_size"]] * 2
        shape = [2, 3, *size]
        x = torch.from_numpy(recipe.make_input(shape, 1)).double().requires_grad_()
        out = model.double()(x)
        (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
        cases.append(
            dict(
                id=name,
                args=options,
                state_dict=shapes,
                input=dict(shape=shape, seed=1),
                out=out.tolist(),
                input_grad_l2=float(x.grad.norm()),
                all_params_grad_l2=sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5,
            )
        )
    commit = "0f7c2da"
    text = json.dumps(dict(repo=f"wangf3014/Mamba-Reg@{commit}", common_args=COMMON, cases=cases))
    Path(__file__).with_name("vim_registers.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
