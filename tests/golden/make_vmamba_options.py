"""Numbers of the official VMamba for each of its options: ``python -m tests.golden.make_vmamba_options CHECKOUT``.

CHECKOUT is a checkout of github.com/MzeroMiko/VMamba; needs einops. Writes vmamba_options.json beside this file. Its scan computes in
float32 only, so the numbers are float32's.
"""

import json
import sys
from pathlib import Path

import torch

from tests.golden import recipe
from vision_mamba import VMamba

COMMON = dict(
    in_chans=3, num_classes=10, depths=[1, 1, 2, 1], dims=16, ssm_d_state=1, ssm_ratio=1.0, ssm_conv=3, ssm_conv_bias=False,
    forward_type="v05_noz", mlp_ratio=4.0, norm_layer="ln2d", downsample_version="v3", patchembed_version="v2",
)  # fmt: skip
V0 = dict(
    ssm_d_state=16, ssm_ratio=2.0, ssm_conv_bias=True, forward_type="v0", mlp_ratio=0.0, norm_layer="ln",
    downsample_version="v1", patchembed_version="v1",
)  # fmt: skip
# name -> constructor's arguments, height and width of the image
OPTIONS = {
    "v0": (V0, 64, 64),
    "v0_odd": (V0, 71, 54),
    "s2": (dict(ssm_ratio=2.0), 64, 64),
    "odd": (dict(in_chans=5), 49, 83),
    "channels_last": (dict(norm_layer="ln"), 64, 64),
    "gate": (dict(forward_type="v05", ssm_conv_bias=True), 64, 64),
    "conv2": (dict(downsample_version="v2"), 76, 64),
    "patches": (dict(patchembed_version="v1"), 64, 64),
    "no_convolution": (dict(ssm_conv=1), 64, 64),
    "wide_convolution": (dict(ssm_conv=5), 64, 64),
    "states": (dict(ssm_d_state=4, ssm_dt_rank=3), 64, 64),
    "one_direction": (dict(forward_type="v051d_noz"), 64, 64),
    "two_directions": (dict(forward_type="v052d_noz"), 64, 64),
}
DIRECTIONS = {"v051d": ("raster",) * 4, "v052d": ("raster", "raster", "reverse", "reverse")}


def from_official_arguments(args: dict) -> VMamba:
    """Our model for the official constructor's arguments."""
    args = {k: v for k, v in args.items() if k != "norm_layer"}  # the same mathematics in another memory layout
    kind, _, no_gate = args.pop("forward_type").partition("_")
    if kind in DIRECTIONS:
        args["paths"] = DIRECTIONS[kind]
    if "ssm_dt_rank" in args:
        args["dt_rank"] = args.pop("ssm_dt_rank")
    return VMamba(
        embed_dim=args.pop("dims"),
        d_state=args.pop("ssm_d_state"),
        expand=args.pop("ssm_ratio"),
        d_conv=args.pop("ssm_conv"),
        conv_bias=args.pop("ssm_conv_bias"),
        gate=not no_gate,
        stem={"v1": "patch", "v2": "overlap"}[args.pop("patchembed_version")],
        downsample={"v1": "merging", "v2": "conv2", "v3": "conv3"}[args.pop("downsample_version")],
        **args,
    )


def main(checkout: str) -> None:
    from benchmarks import official_vmamba

    official = official_vmamba.load(Path(checkout))
    cases = []
    for name, (options, *size) in OPTIONS.items():
        args = {**COMMON, **options}
        model = official.VSSM(**args).eval()
        shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
        model.load_state_dict({k: torch.from_numpy(v) for k, v in recipe.make_state(shapes).items()})
        shape = [2, args["in_chans"], *size]
        x = torch.from_numpy(recipe.make_input(shape, 1)).requires_grad_()
        out = model(x)
        (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
        cases.append(
            dict(
                id=name,
                args=options,
                state_dict=shapes,
                input=dict(shape=shape, seed=1),
                out=out.tolist(),
                input_grad_l2=float(x.grad.double().norm()),
                all_params_grad_l2=sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5,
            )
        )
    entry = "classification/models/vmamba.py:VSSM"
    text = json.dumps(dict(repo="MzeroMiko/VMamba", entry=entry, common_args=COMMON, cases=cases))
    Path(__file__).with_name("vmamba_options.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
