"""Numbers of the official xT with its Mamba context encoder: ``python -m tests.golden.make_xt_options CHECKOUT MAMBA``.

CHECKOUT is a checkout of github.com/bair-climate-initiative/xT, MAMBA one of github.com/state-spaces/mamba; needs einops.
Writes xt_options.json beside this file. Nothing of the official code is copied here: its ``build_model``, region
encoders (timm's Swin V2), context encoder and mixer run as they are. Replaced are the CUDA scan, by its definition; the
download of ImageNet weights, by nothing; and in the float64 run the places that round to float32 (position table, A).
"""

import contextlib
import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from tests.golden import recipe
from vision_mamba.models.xt import XT
from vision_mamba.ops import reference

#: A Swin V2 with the stride of the published ones and next to no channels.
SWIN = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4), window_size=4)
#: A model of ours with three levels.
VMAMBA = dict(embed_dim=16, depths=(1, 1, 2))
COMMON = dict(encoder="vmamba", image=64, region=32, hidden_size=32, n_layer=4, num_classes=10, batch=2)
OPTIONS = {
    "four_regions": dict(),
    "nine_regions": dict(image=96, batch=1),
    "one_region": dict(region=64),
    "odd_depth": dict(n_layer=3, hidden_size=48),
    "swin": dict(encoder="swin", image=128, region=64),
    "swin_tiny_mamba_512_256": dict(
        encoder="swinv2_tiny_window16_256", image=512, region=256, hidden_size=768, num_classes=284, batch=1
    ),
}


class Config(dict):
    """Stands for OmegaConf's: items are attributes too."""

    __getattr__ = dict.__getitem__


class Levels(nn.Module):
    """A model of ours as the official code wants a region encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_vmamba", num_classes=0, **VMAMBA)
        self.model.prune_intermediate_layers(1, prune_norm=True)
        self.feature_info = self.model.feature_info

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.model.forward_intermediates(x, intermediates_only=True)


def from_official_arguments(args: dict) -> XT:
    """Our model for the arguments of a case."""
    known = {"swin": ("swinv2_tiny_window16_256", SWIN), "vmamba": ("test_vmamba", VMAMBA)}
    encoder, encoder_args = known.get(args["encoder"], (args["encoder"], {}))
    return XT(
        num_classes=args["num_classes"],
        encoder=encoder,
        encoder_args=encoder_args,
        region_size=args["region"],
        embed_dim=args["hidden_size"],
        depth=args["n_layer"],
    )


def load_official(checkout: Path, mamba: Path) -> types.ModuleType:
    """The official ``xt.models``, runnable on a CPU."""

    def stub(name: str, **attributes) -> None:
        module = sys.modules[name] = types.ModuleType(name)
        module.__dict__.update(attributes)

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert not return_last_state
        u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
        options = dict(delta_softplus=delta_softplus, chunk=64)
        return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, **options).transpose(1, 2)

    # The packages' __init__ files, which need the compiled operators, do not run.
    for name in ("mamba_ssm", "mamba_ssm.modules"):
        stub(name, __path__=[str(mamba.joinpath(*name.split(".")))])
    stub("mamba_ssm.ops")
    stub("mamba_ssm.ops.triton")
    stub("mamba_ssm.ops.triton.layernorm", RMSNorm=nn.RMSNorm)
    stub("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=scan, mamba_inner_fn=None)
    sys.modules["mamba_ssm"].Mamba = importlib.import_module("mamba_ssm.modules.mamba_simple").Mamba
    stub("hiera")  # another region encoder's package, imported, not called
    sys.path.insert(0, str(checkout))
    return importlib.import_module("xt.models")


def build_official(models: types.ModuleType, args: dict) -> nn.Module:
    def create_model(name: str, *, pretrained: bool, input_size: tuple, **options) -> nn.Module:
        small = SWIN if args["encoder"] == "swin" else {}
        return timm.create_model(name, img_size=input_size, **small, **options)

    backbone_class = "swinv2_tiny_window16_256_timm"
    backbones = importlib.import_module("xt.models.backbones")
    sys.modules["xt.models.backbones.swin"].timm = types.SimpleNamespace(create_model=create_model)
    if args["encoder"] == "vmamba":
        backbone_class = "ours"
        backbones.ours = lambda **_: Levels()
    context = Config(
        hidden_size=args["hidden_size"], n_layer=args["n_layer"], attention_method="mamba", in_context_patches=-1,
        grad_ratio=1.0,
    )  # fmt: skip
    config = models.ModelConfig(
        backbone_class=backbone_class,
        num_classes=args["num_classes"],
        cls_head="xl",
        backbone=Config(input_size=args["region"], channel_last=True),
        context=context,
    )
    return models.build_model(config).eval()


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """What the official code rounds to float32 stays float64."""
    utils = sys.modules["xt.models.decoders.utils"]
    to_float = torch.Tensor.float
    utils.np = types.SimpleNamespace(**{**vars(np), "float32": np.float64})
    torch.Tensor.float = lambda t: t if t.dtype == torch.float64 else to_float(t)
    utils.get_2d_sincos_pos_embed.cache_clear()
    try:
        yield
    finally:
        utils.np, torch.Tensor.float = np, to_float
        utils.get_2d_sincos_pos_embed.cache_clear()


def run(model: nn.Module, x: torch.Tensor) -> dict:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)["label"]
    (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
    gradients = {name: recipe.grad_digest(name, p.grad) for name, p in model.named_parameters()}
    full = dict(shape=list(out.shape), full=out.detach().double().flatten().tolist())
    return dict(outputs=dict(out=full), grad=dict(input=recipe.digest(x.grad), params=gradients))


def main(checkout: str, mamba: str) -> None:
    models = load_official(Path(checkout), Path(mamba))
    cases = []
    for name, options in OPTIONS.items():
        args = {**COMMON, **options}
        model = build_official(models, args)
        shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
        model.load_state_dict({k: torch.from_numpy(v) for k, v in recipe.make_state(shapes).items()})
        shape = [args["batch"], 3, args["image"], args["image"]]
        x = torch.from_numpy(recipe.make_input(shape, 1))
        single = run(model, x)
        with exact():
            double = run(model.double(), x.double())
        a, b = (np.array(r["outputs"]["out"]["full"]) for r in (single, double))
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        print(name, f"float32 against float64: {error:.1e}")
        cases.append(
            dict(
                id=name,
                args=options,
                num_params=sum(p.numel() for p in model.parameters()),
                state_dict=shapes,
                input=dict(shape=shape, seed=1),
                rel_err_float32_vs_float64=error,
                float64=double,
            )
        )
    text = json.dumps(
        dict(
            repo="bair-climate-initiative/xT",
            entry="xt/models/build.py:build_model",
            timm=timm.__version__,
            common_args=COMMON,
            cases=cases,
        )
    )
    Path(__file__).with_name("xt_options.json").write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
