"""Numbers of the official Vim for each of its options: ``python -m tests.golden.make_vim_options CHECKOUT``.

CHECKOUT is a checkout of github.com/hustvl/Vim; needs einops. Writes vim_options.json beside this file.
"""

import json
import sys
from pathlib import Path

import torch

from tests.golden import recipe
from vision_mamba import VisionMamba

COMMON = dict(
    img_size=64, patch_size=16, stride=16, depth=4, embed_dim=32, num_classes=10, rms_norm=True, residual_in_fp32=True,
    fused_add_norm=False, final_pool_type="mean", if_abs_pos_embed=True, bimamba_type="v2", if_cls_token=True,
    if_divide_out=True, use_middle_cls_token=True,
)  # fmt: skip
OPTIONS = {
    "head_token": dict(use_middle_cls_token=False),
    "double_token": dict(use_double_cls_token=True),
    "v1": dict(bimamba_type="v1"),
    "none": dict(bimamba_type="none"),
    "sum": dict(if_divide_out=False),
    "layer_norm": dict(rms_norm=False),
    "layer_scale": dict(init_layer_scale=0.1),
    "max_pool": dict(if_cls_token=False, final_pool_type="max"),
    "last_token": dict(if_cls_token=False, final_pool_type="none"),
    "stride8": dict(stride=8),
    "no_positions": dict(if_abs_pos_embed=False),
    "small_state": dict(d_state=8, embed_dim=48),
    "pairs_of_v2": dict(if_bidirectional=True),
    "pairs_with_token": dict(if_bidirectional=True, bimamba_type="none"),
    "non_square": dict(img_size=[64, 96]),
    "five_bands": dict(channels=5),
    "odd": dict(depth=3, img_size=80),
}


def from_official_arguments(args: dict) -> VisionMamba:
    """Our model for the official constructor's arguments."""
    args = {k: v for k, v in args.items() if k not in ("residual_in_fp32", "fused_add_norm")}
    has_token, middle = args.pop("if_cls_token"), args.pop("use_middle_cls_token")
    double = args.pop("use_double_cls_token", False)
    position = "none" if not has_token else "double" if double else "middle" if middle else "head"
    pool = {"mean": "avg", "max": "max", "none": "last"}[args.pop("final_pool_type")]
    return VisionMamba(
        args.pop("img_size"),
        args.pop("patch_size"),
        pos_embed=args.pop("if_abs_pos_embed"),
        cls_position=position,
        global_pool="token" if has_token else pool,
        in_chans=args.pop("channels", 3),
        layer_scale=args.pop("init_layer_scale", None),
        **args,
    )


def main(checkout: str) -> None:
    from benchmarks import official_vim

    official = official_vim.load(Path(checkout))
    cases = []
    for name, options in OPTIONS.items():
        args = {**COMMON, **options}
        model = official.VisionMamba(**args).eval()
        shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
        model.load_state_dict({k: torch.from_numpy(v) for k, v in recipe.make_state(shapes).items()})
        size = args["img_size"] if isinstance(args["img_size"], list) else [args["img_size"]] * 2
        shape = [2, args.get("channels", 3), *size]
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
    text = json.dumps(dict(repo="hustvl/Vim", entry="vim/models_mamba.py:VisionMamba", common_args=COMMON, cases=cases))
    Path(__file__).with_name("vim_options.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
