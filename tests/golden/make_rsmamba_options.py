"""Numbers of the official RSMamba for each of its options: ``python -m tests.golden.make_rsmamba_options CHECKOUT``.

CHECKOUT is a checkout of github.com/KyanChen/RSMamba; needs transformers 4.39.2 (its MambaMixer runs on a CPU as it
is), mmengine and mmcv-lite. Writes rsmamba_options.json beside this file. Nothing of the official code is
copied here.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

from tests.golden import recipe
from vision_mamba.models.rsmamba import RSMamba

COMMON = dict(
    arch=dict(embed_dims=32, num_layers=3, feedforward_channels=64), pe_type="learnable",
    path_type="forward_reverse_shuffle_gate", cls_position="none", out_type="avg_featmap", img_size=64, patch_size=16,
    in_channels=3, patch_cfg=dict(stride=8),
)  # fmt: skip
OPTIONS = {
    "forward": dict(path_type="forward"),
    "forward_reverse_gate": dict(path_type="forward_reverse_gate"),
    "forward_reverse_shuffle_mean": dict(path_type="forward_reverse_shuffle_mean"),
    "head_token": dict(cls_position="head", out_type="cls_token"),
    "tail_token": dict(cls_position="tail", out_type="cls_token"),
    "middle_token": dict(cls_position="middle", out_type="cls_token"),
    "head_token_averaged_patches": dict(cls_position="head"),
    "tail_token_averaged_patches": dict(cls_position="tail", path_type="forward_reverse_gate"),
    "middle_token_averaged_patches": dict(cls_position="middle"),
    "all_tokens": dict(out_type="raw", path_type="forward_reverse_mean"),
    "sine_positions": dict(pe_type="sine"),
    "no_positions": dict(pe_type="none"),
    "stride16": dict(patch_cfg=dict(stride=16)),
    "non_square": dict(img_size=[64, 96]),
    "padded_odd": dict(img_size=[60, 43]),
    "five_bands": dict(in_channels=5),
}


def pinned_paths(depth: int, length: int) -> torch.Tensor:
    """The permutations that stand in for the official code's ``torch.randperm``: call c gives RandomState(c)'s."""
    return torch.stack([torch.from_numpy(np.random.RandomState(c).permutation(length)) for c in range(depth)])


def from_official_arguments(args: dict, num_classes: int = 10) -> RSMamba:
    """Our model for the official backbone's arguments."""
    names = args["path_type"].split("_")
    merge = names.pop() if names[-1] in ("gate", "mean") else "mean"
    return RSMamba(
        args["img_size"],
        args["patch_size"],
        stride=args["patch_cfg"]["stride"],
        in_chans=args.get("in_channels", 3),
        num_classes=num_classes,
        global_pool={"avg_featmap": "avg", "cls_token": "token", "raw": ""}[args["out_type"]],
        embed_dim=args["arch"]["embed_dims"],
        depth=args["arch"]["num_layers"],
        expand=args["arch"]["feedforward_channels"] // args["arch"]["embed_dims"],
        paths=names,
        merge=merge,
        shuffle_paths=pinned_paths,
        cls_position=args["cls_position"],
        pos_embed={"learnable": "learned"}.get(args["pe_type"], args["pe_type"]),
    )


def load_official(checkout: Path) -> type[torch.nn.Module]:
    """The official backbone class. The packages' ``__init__`` files, which import all of mmpretrain, do not run."""
    for name in ("mmpretrain", "mmpretrain.models", "mmpretrain.models.utils", "mmpretrain.models.backbones"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(checkout.joinpath(*name.split(".")))]
    utils = sys.modules["mmpretrain.models.utils"]
    utils.to_2tuple = importlib.import_module("mmpretrain.models.utils.helpers").to_2tuple
    utils.build_norm_layer = importlib.import_module("mmpretrain.models.utils.norm").build_norm_layer
    utils.resize_pos_embed = None  # imported, never called
    encoding = importlib.import_module("mmpretrain.models.utils.position_encoding")
    sys.modules["mmpretrain.models"].build_2d_sincos_position_embedding = encoding.build_2d_sincos_position_embedding
    sys.path.insert(0, str(checkout / "mmpretrain" / "rsmamba" / "models"))
    return importlib.import_module("models").RSMamba


def main(checkout: str) -> None:
    official_class = load_official(Path(checkout))
    cases = []
    for name, options in OPTIONS.items():
        args = {**COMMON, **options}
        backbone = official_class(**json.loads(json.dumps(args)))
        fc = torch.nn.Linear(args["arch"]["embed_dims"], 10)
        model = torch.nn.ModuleDict(dict(backbone=backbone, head=torch.nn.ModuleDict(dict(fc=fc)))).eval()
        shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
        model.load_state_dict({k: torch.from_numpy(v) for k, v in recipe.make_state(shapes).items()})
        model.double()
        size = args["img_size"] if isinstance(args["img_size"], list) else [args["img_size"]] * 2
        shape = [2, args["in_channels"], *size]
        x = torch.from_numpy(recipe.make_input(shape, 1)).double().requires_grad_()
        calls = iter(range(1000))
        randperm = torch.randperm
        torch.randperm = lambda n: torch.from_numpy(np.random.RandomState(next(calls)).permutation(n))  # noqa: B023
        try:
            out = fc(backbone(x)[0])
        finally:
            torch.randperm = randperm
        (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
        cases.append(
            dict(
                id=name,
                args=options,
                state_dict=shapes,
                input=dict(shape=shape, seed=1),
                out=recipe.digest(out.detach().numpy()),
                input_grad_l2=float(x.grad.norm()),
                all_params_grad_l2=sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5,
            )
        )
    entry = "mmpretrain/rsmamba/models/models.py:RSMamba and a linear layer"
    text = json.dumps(dict(repo="KyanChen/RSMamba", entry=entry, common_args=COMMON, cases=cases))
    Path(__file__).with_name("rsmamba_options.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
