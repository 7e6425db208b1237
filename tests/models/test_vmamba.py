"""VMamba: official numbers, official checkpoint layouts, image sizes. The rest is in test_contract.py."""

import json
import sys
import types

import numpy as np
import pytest
import timm
import torch

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.golden.make_vmamba_options import from_official_arguments
from tests.models.golden import FOLDER, check_case, load_case
from vision_mamba import VMamba
from vision_mamba.layers import SS2D

OFFICIAL = {
    "vmambav2v_tiny_224": lambda: timm.create_model("vmamba_tiny_s1l8"),
    "vmamba_tinycfg_v05_noz": lambda: timm.create_model("test_vmamba", num_classes=10),
    "vmamba_tinycfg_backbone_v05_noz_ln2d_64x96": lambda: timm.create_model(
        "test_vmamba", features_only=True, feature_norms=(0, 1, 2, 3)
    ),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_agrees_with_official(case):
    check_case(load_case(case), OFFICIAL[case](), tolerance=2e-5)


@pytest.mark.parametrize("case", [c for c in OFFICIAL if c != "vmambav2v_tiny_224"])
def test_agrees_with_official_in_float64(case):
    check_case(load_case(case), OFFICIAL[case](), tolerance=1e-8, dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("case", OFFICIAL)
def test_agrees_with_official_on_gpu(case):
    check_case(load_case(case), OFFICIAL[case](), tolerance=1e-4, device="cuda")


OPTIONS = json.loads((FOLDER / "vmamba_options.json").read_text())


def official_state(case):
    return {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}


@pytest.mark.parametrize("case", OPTIONS["cases"], ids=[c["id"] for c in OPTIONS["cases"]])
def test_every_official_option_agrees(case):
    model = from_official_arguments({**OPTIONS["common_args"], **case["args"]}).double().eval()
    vision_mamba.load_checkpoint(model, official_state(case))
    x = torch.from_numpy(recipe.make_input(case["input"]["shape"], case["input"]["seed"])).double().requires_grad_()
    out = model(x)
    (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
    # The official numbers are float32's.
    assert_close("logits", out, torch.tensor(case["out"], dtype=torch.float64), 3e-6)
    assert float(x.grad.norm()) == pytest.approx(case["input_grad_l2"], rel=1e-6)
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert total == pytest.approx(case["all_params_grad_l2"], rel=1e-6)


def test_published_parameter_counts():
    millions = {
        "vmamba_tiny_v0": 23, "vmamba_small_v0": 44, "vmamba_base_v0": 76, "vmamba_tiny_s2l5": 31, "vmamba_small_s2l15": 50,
        "vmamba_base_s2l15": 89, "vmamba_tiny_s1l8": 30, "vmamba_small_s1l20": 49, "vmamba_base_s1l20": 87,
    }  # fmt: skip
    for name, count in millions.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == count, name


def v0_model():
    return from_official_arguments({**OPTIONS["common_args"], **OPTIONS["cases"][0]["args"]})


def test_names_of_the_first_releases():
    """``#v0cls`` files say ``ln_1``, ``self_attention``, ``patch_embed.proj``, ``norm`` and ``head``."""
    state = official_state(OPTIONS["cases"][0])
    old = {}
    for key, value in state.items():
        for new, name in (
            ("patch_embed.0.", "patch_embed.proj."), ("patch_embed.2.", "patch_embed.norm."), ("classifier.", ""),
            (".op.", ".self_attention."),
        ):  # fmt: skip
            key = key.replace(new, name)
        if "blocks" in key:
            key = key.replace(".norm.", ".ln_1.")
        old[key] = value
    assert not old.keys() & {k for k in state if "downsample" not in k}
    a, b = v0_model(), v0_model()
    vision_mamba.load_checkpoint(a, state)
    vision_mamba.load_checkpoint(b, old)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_names_and_shapes_of_the_single_file_variant():
    """Projections as grouped convolutions, linear layers as 1x1 convolutions."""
    case = load_case("vmamba_tinycfg_v05_noz")
    state = official_state(case)
    other = {}
    for key, value in state.items():
        if key.endswith("x_proj_weight"):
            value = value.flatten(0, 1)
        elif key.endswith("dt_projs_weight"):
            value = value.flatten(0, 1).unsqueeze(-1)
        elif value.ndim == 2 and ("_proj." in key or ".mlp." in key):
            value = value[:, :, None, None]
        other[key.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight")] = value
    a, b = (timm.create_model("test_vmamba", num_classes=10) for _ in range(2))
    vision_mamba.load_checkpoint(a, state)
    vision_mamba.load_checkpoint(b, other)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_official_file_with_its_configuration(tmp_path, monkeypatch):
    """Classification files hold a yacs configuration and averaged weights beside the weights."""
    CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    config = CfgNode(MODEL=CfgNode(NAME="vssm1_tiny_0230s", VSSM=CfgNode(DEPTHS=[1, 1, 2, 1])))
    config.__dict__["__immutable__"] = True
    state = official_state(load_case("vmamba_tinycfg_v05_noz"))
    averaged = {k: v + 1 for k, v in state.items()}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        content = {"model": state, "model_ema": averaged, "config": config, "epoch": 264}
        torch.save(content, tmp_path / "ckpt.pth")
        torch.save({"model": state, "config": config}, tmp_path / "plain.pth")
    assert "yacs" not in sys.modules
    model = timm.create_model("test_vmamba", num_classes=10)
    assert not vision_mamba.load_checkpoint(model, tmp_path / "ckpt.pth").problems()
    assert torch.equal(model.norm.weight, state["classifier.norm.weight"])
    vision_mamba.load_checkpoint(model, tmp_path / "ckpt.pth", use_ema=True)
    assert torch.equal(model.norm.weight, averaged["classifier.norm.weight"])
    overlay = dict(file=str(tmp_path / "plain.pth"), num_classes=10)
    pretrained = timm.create_model("test_vmamba", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)
    assert torch.equal(pretrained.stages[1].downsample.conv.weight, state["layers.0.downsample.1.weight"])


def test_backbone_of_a_detector(tmp_path, monkeypatch):
    """mmengine's files: ``backbone.`` among other parts, and the runner's logs with numpy arrays in them."""

    class HistoryBuffer:
        def mean(self):
            return 0

    for item, name in ((HistoryBuffer, "HistoryBuffer"), (HistoryBuffer.mean, "HistoryBuffer.mean")):
        item.__module__, item.__qualname__ = "mmengine.logging.history_buffer", name
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    log = HistoryBuffer()
    log.history = np.array([1.5, 2.5])
    log.count = np.int64(2)
    log.methods = {"mean": HistoryBuffer.mean}  # pickled as getattr(HistoryBuffer, "mean")
    state = official_state(load_case("vmamba_tinycfg_backbone_v05_noz_ln2d_64x96"))
    file = {f"backbone.{k}": v for k, v in state.items()}
    file["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, "mmengine.logging.history_buffer", module)
        torch.save({"state_dict": file, "message_hub": {"log_scalars": {"train/loss": log}}}, tmp_path / "epoch_12.pth")
    backbone = timm.create_model("test_vmamba", features_only=True, feature_norms=(0, 1, 2, 3))
    assert not vision_mamba.load_checkpoint(backbone, tmp_path / "epoch_12.pth").problems()
    assert torch.equal(backbone.model.feature_norms["3"].weight, state["outnorm3.weight"])
    with pytest.raises(ValueError, match=r"8 unexpected: feature_norms\.0\.weight"):
        plain = timm.create_model("test_vmamba", features_only=True)
        vision_mamba.load_checkpoint(plain, tmp_path / "epoch_12.pth")
    with pytest.raises(ValueError, match=r"4 missing: norm\.weight, norm\.bias, head\.fc\.weight, head\.fc\.bias"):
        vision_mamba.load_checkpoint(
            timm.create_model("test_vmamba", feature_norms=(0, 1, 2, 3)), tmp_path / "epoch_12.pth"
        )


def test_classifier_file_into_a_backbone():
    """What ``features_only`` leaves out is reported as unused; everything else still has to fit."""
    state = official_state(load_case("vmamba_tinycfg_v05_noz"))
    backbone = timm.create_model("test_vmamba", features_only=True, out_indices=(0, 1))
    report = vision_mamba.load_checkpoint(backbone, state)
    assert not report.problems() and {n.split(".")[0] for n in report.unused} == {"stages", "norm", "head"}
    assert all(n.startswith(("stages.2.", "stages.3.", "norm.", "head.")) for n in report.unused)
    with pytest.raises(ValueError, match=r"1 unexpected: stages\.0\.blocks\.0\.mixer\.extra"):
        vision_mamba.load_checkpoint(backbone, {**state, "layers.0.blocks.0.op.extra": torch.zeros(1)})


@pytest.mark.parametrize("stem, downsample", [("overlap", "conv3"), ("patch", "merging"), ("overlap", "conv2")])
@pytest.mark.parametrize("size", [(64, 96), (49, 83), (224, 32)])
def test_pyramid_of_any_size(stem, downsample, size):
    kwargs = dict(stem=stem, downsample=downsample, embed_dim=8, depths=(1, 1, 1, 1))
    maps = VMamba(**kwargs).eval().forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)

    def shrink(sides, up):
        return tuple(-(-side // 2) if up else side // 2 for side in sides)

    sides = tuple(-(-side // 4) if stem == "overlap" else side // 4 for side in size)
    for i, level in enumerate(maps):
        assert level.shape == (1, 8 * 2**i, *sides) and level.is_contiguous()
        sides = shrink(sides, downsample != "conv2")


def test_ss2d_along_other_paths_is_what_turning_the_map_gives():
    """The reversed paths see what the plain ones see on the map turned by 180 degrees."""
    torch.manual_seed(0)
    plain, turned = (
        SS2D(8, d_state=3, paths=p).double() for p in (("raster", "column"), ("reverse", "column_reverse"))
    )
    turned.load_state_dict(plain.state_dict())
    with torch.no_grad():  # a convolution that does not know which side is up
        for ss2d in (plain, turned):
            ss2d.conv2d.weight.copy_((plain.conv2d.weight + plain.conv2d.weight.flip(2, 3)) / 2)
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    assert_close("turned", turned(x.flip(1, 2)).flip(1, 2), plain(x), 1e-12)
    assert (plain(x) - turned(x)).abs().max() > 1e-3


def test_maps_stay_channels_last():
    """No layout copies between convolution, norm and scan: each map is dense in (batch, H, W, channels)."""
    model = timm.create_model("test_vmamba").eval()
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, args, out: seen.append((args[0].permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)))
            )
    model(torch.randn(2, 3, 64, 96))
    assert len(seen) == 10 and all(t.is_contiguous() for pair in seen for t in pair)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="stem='conv': allowed are 'overlap', 'patch'"):
        VMamba(stem="conv")
    with pytest.raises(ValueError, match="downsample='v3': allowed are 'conv3', 'conv2', 'merging'"):
        VMamba(downsample="v3")
    with pytest.raises(ValueError, match="feature_norms=.4,.: stages are 0 to 3"):
        VMamba(feature_norms=(4,))
    with pytest.raises(ValueError, match="d_conv=4"):
        VMamba(d_conv=4)
    with pytest.raises(ValueError, match="unknown scan path 'spiral'"):
        VMamba(embed_dim=8, paths=("spiral",))(torch.randn(1, 3, 32, 32))


def test_pretrained_without_network_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", offline)
    with pytest.raises(RuntimeError, match=r"vssm1_tiny_0230s_ckpt_epoch_264\.pth.*load_checkpoint"):
        timm.create_model("vmamba_tiny_s1l8", pretrained=True)
