"""Numbers of the official MambaVision for each of its options: ``python -m tests.golden.make_mambavision_options CHECKOUT``.

CHECKOUT is a checkout of github.com/NVlabs/MambaVision; needs einops. Writes mambavision_options.json beside this file.
The official code runs as it is, in float64, but for the CUDA kernel of its scan, whose definition stands in.
"""

import functools
import importlib
import json
import sys
import types
import warnings
from pathlib import Path

import torch

from tests.golden import recipe
from vision_mamba.models import MambaVision
from vision_mamba.ops import reference

COMMON = dict(
    in_chans=3, num_classes=10, dim=16, in_dim=8, depths=[1, 1, 3, 2], num_heads=[1, 2, 2, 4], window_size=[8, 8, 4, 2],
    mlp_ratio=4,
)  # fmt: skip
# name -> constructor's arguments, height and width of the image
OPTIONS = {
    "layer_scale": (dict(layer_scale=1e-5), 64, 64),
    "odd": (dict(in_chans=5), 49, 83),
    "many_windows": (dict(), 128, 192),
    "windows_beyond_the_map": (dict(window_size=[8, 8, 7, 5]), 64, 48),
    "depths": (dict(depths=[2, 1, 4, 5], mlp_ratio=3), 64, 64),
    "depths_of_tiny": (dict(depths=[1, 3, 8, 4], window_size=[8, 8, 14, 7]), 64, 64),
    "backbone": (dict(layer_scale=1e-5, window_size=[8, 8, 8, 4]), 64, 96),
}
#: Levels instead of logits, of the class for detection and segmentation.
BACKBONES = ("backbone",)
SIZES = ("T", "T2", "S", "B", "B_21k", "L", "L_21k", "L2", "L2_512_21k", "L3_256_21k", "L3_512_21k")


def from_official_arguments(args: dict, **kwargs) -> MambaVision:
    """Our model for the official constructor's arguments."""
    args = dict(args)
    return MambaVision(
        embed_dim=args.pop("dim"),
        stem_dim=args.pop("in_dim"),
        num_heads=args.pop("num_heads")[2:],
        window_size=args.pop("window_size")[2:],
        **args,
        **kwargs,
    )


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """mamba_ssm's function, whose tensors are (batch, channels, L)."""
    assert z is None and not return_last_state
    u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
    return reference.selective_scan(
        u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus
    ).transpose(1, 2)


class Registry:
    def register_module(self):
        return lambda cls: cls


def load(checkout: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """The official ``mambavision/models/mamba_vision.py`` and ``object_detection/tools/mamba_vision.py``."""
    contents = {
        "mamba_ssm.ops.selective_scan_interface": dict(selective_scan_fn=scan),
        "mmengine.model": dict(BaseModule=None),
        "mmengine.runner": dict(load_checkpoint=None),
        "mmdet.registry": dict(MODELS=Registry()),
        "mmseg.registry": dict(MODELS=Registry()),
        "mmcv": {},
    }
    for name, content in contents.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        module = sys.modules[name] = types.ModuleType(name)
        module.__dict__.update(content)
    sys.path[:0] = [str(checkout), str(checkout / "object_detection" / "tools")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that parts of timm have moved
        return importlib.import_module("mambavision.models.mamba_vision"), importlib.import_module("mamba_vision")


def main(checkout: str) -> None:
    official, dense = load(Path(checkout))
    cases = []
    torch.Tensor.float = torch.Tensor.double  # the official code rounds A, D and the bias to float32
    for name, (options, *size) in OPTIONS.items():
        args = {**COMMON, **options}
        model = (dense.MM_mamba_vision if name in BACKBONES else official.MambaVision)(**args).double().eval()
        shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
        state = {k: torch.from_numpy(v) for k, v in recipe.make_state(shapes).items()}
        assert all(k.endswith("num_batches_tracked") for k in model.load_state_dict(state, strict=False).missing_keys)
        shape = [2, args["in_chans"], *size]
        x = torch.from_numpy(recipe.make_input(shape, 1)).double().requires_grad_()
        out = model(x)
        levels = out if isinstance(out, list) else [out]
        loss = sum((y * torch.from_numpy(recipe.loss_weights(i, y.shape))).sum() for i, y in enumerate(levels))
        loss.backward()
        cases.append(
            dict(
                id=name,
                args=options,
                state_dict=shapes,
                input=dict(shape=shape, seed=1),
                out=[recipe.digest(y.detach()) for y in levels],
                input_grad_l2=float(x.grad.norm()),
                all_params_grad_l2=sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5,
            )
        )
    torch.linspace = functools.partial(torch.linspace, device="cpu")  # of the drop path rates, which are read
    sizes = {}
    for size in SIZES:
        with torch.device("meta"):
            model = getattr(official, f"mamba_vision_{size}")()
        sizes[size] = sum(p.numel() for p in model.parameters())
    entry = "mambavision/models/mamba_vision.py:MambaVision, object_detection/tools/mamba_vision.py:MM_mamba_vision"
    text = json.dumps(dict(repo="NVlabs/MambaVision", entry=entry, common_args=COMMON, cases=cases, num_params=sizes))
    Path(__file__).with_name("mambavision_options.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
