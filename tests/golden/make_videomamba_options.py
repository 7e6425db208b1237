"""Numbers of the official VideoMamba for clips: ``python -m tests.golden.make_videomamba_options CHECKOUT``.

CHECKOUT is a checkout of github.com/OpenGVLab/VideoMamba; needs einops. Writes videomamba_options.json beside this file. The CUDA
scan and convolution are replaced by their definition, the Triton norm by torch's, and the conversions to float32 are left out, so that
all numbers are float64's. Nothing of the official code is copied here.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.golden import recipe
from vision_mamba.models.videomamba import VideoMamba

COMMON = dict(
    img_size=64, patch_size=16, depth=4, embed_dim=32, channels=3, num_classes=10, num_frames=4, kernel_size=1, rms_norm=True,
    residual_in_fp32=False, fused_add_norm=False, drop_path_rate=0.0,
)  # fmt: skip
OPTIONS = {
    "clip": {},
    "tubelets": dict(num_frames=6, kernel_size=2, channels=5, img_size=32),
    "one_step": dict(num_frames=3, kernel_size=3, depth=3, rms_norm=False),
    "non_square": dict(img_size=[32, 48], ssm_cfg=dict(d_state=8, d_conv=3)),
}
#: The official start from image weights.
INFLATED = dict(num_frames=6, kernel_size=3)


def from_official_arguments(args: dict) -> VideoMamba:
    """Our model for the official constructor's arguments."""
    args = {k: v for k, v in args.items() if k not in ("residual_in_fp32", "fused_add_norm")}
    return VideoMamba(
        args.pop("img_size"),
        args.pop("patch_size"),
        in_chans=args.pop("channels"),
        tubelet_size=args.pop("kernel_size"),
        **args.pop("ssm_cfg", {}),
        **args,
    )


def load(checkout: Path) -> types.ModuleType:
    """The official ``videomamba`` module of the video models, runnable on a CPU in float64."""
    sys.path.insert(0, str(checkout / "mamba"))

    def stub(name: str, **attributes) -> None:
        module = sys.modules[name] = types.ModuleType(name)
        module.__dict__.update(attributes)

    stub("selective_scan_cuda")
    stub("causal_conv1d_cuda")
    stub("causal_conv1d", causal_conv1d_fn=None, causal_conv1d_update=None)
    stub("mamba_ssm.models.mixer_seq_simple", MambaLMHeadModel=None)
    stub("mamba_ssm.ops.triton.layernorm", RMSNorm=torch.nn.RMSNorm, layer_norm_fn=None, rms_norm_fn=None)
    torch.Tensor.float = lambda tensor: tensor

    def no_out_proj(xz, conv_weight, conv_bias, x_proj, dt_proj, A, B, C, D, delta_bias, delta_softplus):
        """Convolution, projections and scan (Gu & Dao 2023, equation 2 with the exact A and the Euler B), step by step."""
        assert B is None and C is None and delta_softplus
        x, z = xz.chunk(2, dim=1)
        x = F.silu(F.conv1d(F.pad(x, (conv_weight.shape[-1] - 1, 0)), conv_weight, conv_bias, groups=x.shape[1]))
        dt, B, C = (x.transpose(1, 2) @ x_proj.T).split((dt_proj.shape[1], A.shape[1], A.shape[1]), dim=-1)
        delta = F.softplus(dt @ dt_proj.T + delta_bias)
        state, ys = x.new_zeros(*x.shape[:2], A.shape[1]), []
        for t in range(x.shape[-1]):
            step = delta[:, t, :, None]
            state = torch.exp(step * A) * state + step * B[:, t, None] * x[:, :, t, None]
            ys.append((state * C[:, t, None]).sum(-1) + D * x[:, :, t])
        return torch.stack(ys, dim=-1) * F.silu(z)

    mixer = importlib.import_module("mamba_ssm.modules.mamba_simple")
    mixer.mamba_inner_fn_no_out_proj = no_out_proj
    # By its file: the package would import CLIP and a dozen other models.
    file = checkout / "videomamba" / "video_sm" / "models" / "videomamba.py"
    spec = importlib.util.spec_from_file_location("official_videomamba", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state_of(model: torch.nn.Module) -> tuple[list, dict]:
    shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
    return shapes, {k: torch.from_numpy(v) for k, v in recipe.make_state(shapes).items()}


def run(model: torch.nn.Module, args: dict) -> tuple[dict, torch.Tensor, torch.Tensor]:
    size = args["img_size"] if isinstance(args["img_size"], list) else [args["img_size"]] * 2
    given = dict(shape=[2, args["channels"], args["num_frames"], *size], seed=1)
    x = torch.from_numpy(recipe.make_input(given["shape"], given["seed"])).double().requires_grad_()
    out = model.double().eval()(x)
    (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
    return given, x, out


def main(checkout: str) -> None:
    official = load(Path(checkout))
    cases = []
    for name, options in OPTIONS.items():
        args = {**COMMON, **options}
        model = official.VisionMamba(**args)
        shapes, state = state_of(model)
        model.load_state_dict(state)
        given, x, out = run(model, args)
        grads = {k: recipe.grad_digest(k, p.grad) for k, p in model.named_parameters()}
        cases.append(
            dict(
                id=name,
                args=options,
                state_dict=shapes,
                num_params=sum(p.numel() for p in model.parameters()),
                input=given,
                float64=dict(
                    outputs=dict(out=dict(full=out.flatten().tolist())),
                    grad=dict(input=recipe.digest(x.grad), params=grads),
                ),
            )
        )
    args = {**COMMON, **INFLATED}
    model = official.VisionMamba(**args)
    shapes, _ = state_of(model)
    shapes = [(k, s[:2] + s[3:] if len(s) == 5 else s) for k, s in shapes if k != "temporal_pos_embedding"]
    state = {k: torch.from_numpy(v) for k, v in recipe.make_state(shapes).items()}
    official.load_state_dict(model, dict(state))  # leaves the head as it was
    model.load_state_dict({k: v for k, v in state.items() if k.startswith("head.")}, strict=False)
    given, _, out = run(model, args)
    inflated = dict(args=INFLATED, state_dict=shapes, input=given, out=out.tolist())
    repository = dict(repo="OpenGVLab/VideoMamba", entry="videomamba/video_sm/models/videomamba.py:VisionMamba")
    text = json.dumps(dict(**repository, common_args=COMMON, cases=cases, inflated=inflated))
    Path(__file__).with_name("videomamba_options.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
