"""MambaVision: official numbers, official checkpoint layouts, windows. The rest is in test_contract.py."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.golden.make_mambavision_options import BACKBONES, from_official_arguments
from tests.models.golden import FOLDER, check_case, load_case
from vision_mamba.layers import MambaVisionMixer
from vision_mamba.models.mambavision import MambaVision, join_windows, split_windows
from vision_mamba.ops import reference

CASE = "mambavision_tinycfg_64"
OPTIONS = json.loads((FOLDER / "mambavision_options.json").read_text())


def create(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_mambavision", **dict(dict(num_classes=10), **kwargs)).eval()


def official_state(case):
    return {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}


def test_agrees_with_official():
    check_case(load_case(CASE), create(), tolerance=1e-5)


def test_agrees_with_official_in_float64():
    check_case(load_case(CASE), create(), tolerance=1e-8, dtype=torch.float64)


@pytest.mark.gpu
def test_agrees_with_official_on_gpu():
    check_case(load_case(CASE), create(), tolerance=1e-4, device="cuda")


@pytest.mark.parametrize("case", OPTIONS["cases"], ids=[c["id"] for c in OPTIONS["cases"]])
def test_every_official_option_agrees(case):
    is_backbone = case["id"] in BACKBONES
    args = {**OPTIONS["common_args"], **case["args"]}
    model = from_official_arguments(args, feature_norms=(0, 1, 2, 3) if is_backbone else ()).double().eval()
    report = vision_mamba.load_checkpoint(model, official_state(case), strict=not is_backbone)
    # The backbone has neither the last norm nor a classifier.
    assert {name.split(".")[0] for name in report.missing} <= ({"norm", "head"} if is_backbone else set())
    x = torch.from_numpy(recipe.make_input(case["input"]["shape"], case["input"]["seed"])).double().requires_grad_()
    levels = model.forward_intermediates(x, intermediates_only=True) if is_backbone else [model(x)]
    sum((y * torch.from_numpy(recipe.loss_weights(i, y.shape))).sum() for i, y in enumerate(levels)).backward()
    for level, expected in zip(levels, case["out"], strict=True):
        actual = recipe.digest(level.detach())
        assert actual["shape"] == expected["shape"]
        assert_close("values", torch.tensor(actual["values"]), torch.tensor(expected["values"]), 1e-8)
        assert actual["std"] == pytest.approx(expected["std"], rel=1e-8)
    assert float(x.grad.norm()) == pytest.approx(case["input_grad_l2"], rel=1e-8)
    total = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    assert total == pytest.approx(case["all_params_grad_l2"], rel=1e-8)


def test_official_parameter_counts():
    sizes = {
        "tiny": "T", "tiny2": "T2", "small": "S", "base": "B", "large": "L", "large2": "L2", "large2_512": "L2_512_21k",
        "large3_256": "L3_256_21k", "large3_512": "L3_512_21k",
    }  # fmt: skip
    for name, official in sizes.items():
        with torch.device("meta"):
            model = timm.create_model(f"mambavision_{name}")
        assert sum(p.numel() for p in model.parameters()) == OPTIONS["num_params"][official], name
        # The released classifiers' windows are their whole maps.
        side = model.default_cfg["input_size"][1]
        assert [stage.window_size for stage in model.stages[2:]] == [side // 16, side // 32], name


def test_hub_file_loads(tmp_path):
    """The hub's safetensors: transformers' wrapper puts ``model.`` before every name."""
    state = official_state(load_case(CASE))
    save_file({f"model.{k}": v for k, v in state.items()}, tmp_path / "model.safetensors")
    model = create()
    assert not vision_mamba.load_checkpoint(model, tmp_path / "model.safetensors").problems()
    assert torch.equal(model.norm.bn.running_var, state["norm.running_var"])
    mixer, name = model.stages[2].blocks[0].mixer, "levels.2.blocks.0.mixer"
    assert torch.equal(mixer.conv.weight[:32, :, 0], state[f"{name}.conv1d_x.weight"])
    assert torch.equal(mixer.conv.weight[32:, :, 0], state[f"{name}.conv1d_z.weight"])
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=10)
    pretrained = timm.create_model("test_mambavision", True, overlay, num_classes=10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pretrained.parameters(), strict=True))


def test_training_file_loads(tmp_path):
    """The repository's ``.pth.tar`` files are timm's: options of the run and averaged weights beside the weights."""
    state = official_state(load_case(CASE))
    averaged = {k: v + 1 for k, v in state.items()}
    file = dict(arch="mamba_vision_T", args=argparse.Namespace(lr=0.005), state_dict=state, state_dict_ema=averaged)
    torch.save(file, tmp_path / "mambavision_tiny_1k.pth.tar")
    model = create()
    assert not vision_mamba.load_checkpoint(model, tmp_path / "mambavision_tiny_1k.pth.tar").problems()
    assert torch.equal(model.head.fc.weight, state["head.weight"])
    vision_mamba.load_checkpoint(model, tmp_path / "mambavision_tiny_1k.pth.tar", use_ema=True)
    assert torch.equal(model.head.fc.weight, averaged["head.weight"])


def test_backbone_of_a_detector(tmp_path):
    case = next(c for c in OPTIONS["cases"] if c["id"] in BACKBONES)
    state = official_state(case)
    file = {f"backbone.{k}": v for k, v in state.items()}
    file["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": file}, tmp_path / "epoch_36.pth")
    args = dict(features_only=True, feature_norms=(0, 1, 2, 3), layer_scale=1e-5)
    backbone = create(**args, num_heads=(2, 4))
    report = vision_mamba.load_checkpoint(backbone, tmp_path / "epoch_36.pth")
    assert not report.problems() and not report.unused and not report.adapted
    assert torch.equal(backbone.model.feature_norms["3"].weight, state["outnorm3.weight"])
    assert torch.equal(backbone.model.stages[3].blocks[1].scale2.gamma, state["levels.3.blocks.1.gamma_2"])
    with pytest.raises(ValueError, match=r"10 unexpected: stages\.2\.blocks\.0\.scale1\.gamma"):
        vision_mamba.load_checkpoint(create(**dict(args, layer_scale=None)), tmp_path / "epoch_36.pth")


def test_classifier_file_into_a_backbone():
    report = vision_mamba.load_checkpoint(create(features_only=True), official_state(load_case(CASE)))
    assert not report.problems() and {n.split(".")[0] for n in report.unused} == {"norm", "head"}


def test_half_a_convolution_is_an_error():
    state = official_state(load_case(CASE))
    del state["levels.3.blocks.0.mixer.conv1d_z.weight"]
    with pytest.raises(ValueError, match=r"1 misshapen: stages\.3\.blocks\.0\.mixer\.conv\.weight \(64, 1, 1, 3\) for"):
        vision_mamba.load_checkpoint(create(), state)


@pytest.mark.parametrize("height, width", [(8, 12), (7, 9), (3, 2), (4, 4)])
def test_windows(height, width):
    x = torch.randn(2, height, width, 3)
    windows = split_windows(x, 4)
    rows, columns = -(-height // 4), -(-width // 4)
    assert windows.shape == (2 * rows * columns, 16, 3)
    padded = torch.zeros(2, rows * 4, columns * 4, 3)
    padded[:, :height, :width] = x
    for image in range(2):
        for row in range(rows):
            for column in range(columns):
                expected = padded[image, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].reshape(16, 3)
                assert torch.equal(windows[(image * rows + row) * columns + column], expected)
    assert torch.equal(join_windows(windows, 4, height, width), x)


def test_a_window_of_the_whole_map_copies_nothing():
    x = torch.randn(2, 4, 4, 8)
    windows = split_windows(x, 4)
    assert windows.data_ptr() == x.data_ptr() == join_windows(windows, 4, 4, 4).data_ptr()


@pytest.mark.parametrize("size", [(64, 96), (50, 33), (4, 4), (1, 7)])
def test_levels_of_any_size(size):
    maps = create(features_only=True)(torch.randn(2, 3, *size))
    for channels, reduction, level in zip((16, 32, 64, 128), (4, 8, 16, 32), maps, strict=True):
        assert level.shape == (2, channels, -(-size[0] // reduction), -(-size[1] // reduction))


def test_windows_are_apart_and_the_size_is_free():
    """In stage 3, a token changes what its own window gives, and nothing else."""
    stage = create(window_size=(4, 2)).double().stages[2]
    stage.downsample = torch.nn.Identity()
    x = torch.randn(1, 8, 12, 64, dtype=torch.float64)
    other = x.clone()
    other[0, 5, 2] += 1
    changed = (stage(x) != stage(other)).any(-1)[0]
    assert changed[4:, :4].any() and not changed[:4].any() and not changed[4:, 4:].any()


def test_mixer_by_hand():
    """The convolution has a token before and one after it; the second half passes the scan by; the bias counts twice."""
    torch.manual_seed(0)
    mixer = MambaVisionMixer(6).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    tokens = torch.nn.functional.pad(x @ mixer.in_proj.weight.T, (0, 0, 1, 1))
    weight = mixer.conv.weight[:, 0, 0]
    tokens = torch.nn.functional.silu(sum(tokens[:, i : i + 9] * weight[:, i] for i in range(3)))
    u, z = tokens[..., :3], tokens[..., 3:]
    dt, B, C = (u @ mixer.x_proj.weight.T).split((1, 8, 8), dim=-1)
    delta = dt @ mixer.dt_proj.weight.T + 2 * mixer.dt_proj.bias
    y = reference.selective_scan(u, delta, -mixer.A_log.exp(), B, C, mixer.D, delta_softplus=True)
    assert_close("mixer", mixer(x), torch.cat((y, z), dim=-1) @ mixer.out_proj.weight.T, 1e-12)


def test_maps_stay_channels_last():
    """No layout copies between convolution, norm and scan: each map is dense in (batch, H, W, channels)."""
    model = create()
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, args, out, name=name: seen.append((name, args[0], out)))
    model(torch.randn(2, 3, 64, 64))
    assert len(seen) == 12
    for name, x, out in seen:
        assert x.is_contiguous(memory_format=torch.channels_last) or name == "stem.conv1", name
        assert out.is_contiguous(memory_format=torch.channels_last), name


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"depths=\(1, 2, 1\).*give four depths"):
        MambaVision(depths=(1, 2, 1))
    with pytest.raises(ValueError, match=r"window_size=\(4, 0\).*two positive sides"):
        MambaVision(window_size=(4, 0))
    with pytest.raises(ValueError, match=r"num_heads=\(3, 4\): 3 heads do not divide 64 channels"):
        MambaVision(embed_dim=16, num_heads=(3, 4))
    with pytest.raises(ValueError, match=r"feature_norms=\(4,\): stages are 0 to 3"):
        MambaVision(embed_dim=16, feature_norms=(4,))
    with pytest.raises(ValueError, match="dim=5, d_conv=3: dim must be even"):
        MambaVisionMixer(5)
