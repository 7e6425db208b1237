"""Samba: official numbers and checkpoint layout, levels, image sizes. The rest is in test_contract.py."""

import pytest
import timm
import torch

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.models.golden import check_case, load_case
from vision_mamba.models.samba import ConvMlp, Samba

CASE = "samba_tinycfg_64"


def backbone(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_samba", features_only=True, **kwargs).eval()


def official_state():
    return {k: torch.from_numpy(v) for k, v in recipe.make_state(load_case(CASE)["state_dict"]).items()}


def test_agrees_with_official():
    check_case(load_case(CASE), backbone(), tolerance=2e-5)


def test_agrees_with_official_in_float64():
    check_case(load_case(CASE), backbone(), tolerance=1e-8, dtype=torch.float64)


@pytest.mark.gpu
def test_agrees_with_official_on_gpu():
    check_case(load_case(CASE), backbone(), tolerance=1e-4, device="cuda")


def test_segmentor_file_loads(tmp_path):
    """A file of mmsegmentation: the backbone under its prefix, beside heads that are not ours."""
    state = official_state()
    counters = {f"patch_embed1.conv.{i}.num_batches_tracked": torch.tensor(7) for i in (1, 4, 7)}
    segmentor = {f"backbone.{k}": v for k, v in {**state, **counters}.items()}
    segmentor["decode_head.conv_seg.weight"] = torch.zeros(7, 512, 1, 1)
    torch.save({"meta": {}, "state_dict": segmentor}, tmp_path / "official.pth")
    for model in (backbone(), timm.create_model("test_samba", num_classes=0)):
        report = vision_mamba.load_checkpoint(model, tmp_path / "official.pth")
        assert not report.problems() and not report.adapted and not report.unused
        samba = getattr(model, "model", model)
        assert torch.equal(samba.stages[2].blocks[1].mixer.A_log[0], state["block3.1.attn.mamba.A_log"])
        assert torch.equal(samba.stages[0].norm.weight, state["norm1.weight"])
        assert int(samba.stem.norm2.num_batches_tracked) == 7
    with pytest.raises(ValueError, match=r"2 missing: head\.fc\.weight, head\.fc\.bias"):
        vision_mamba.load_checkpoint(timm.create_model("test_samba"), tmp_path / "official.pth")


def test_bands_of_official_weights_are_adapted():
    model = timm.create_model("test_samba", num_classes=0, in_chans=4).eval()
    report = vision_mamba.load_checkpoint(model, official_state())
    assert report.adapted == ["stem.conv1.weight"] and model(torch.randn(1, 4, 40, 40)).shape == (1, 64)


def test_parameters_of_the_paper_size():
    """Counted in the official configuration (configs/_base_/models/samba_upernet.py) by hand."""

    def mixer(d, n=64):
        e, r = 2 * d, -(-d // 16)
        return d * 2 * e + 4 * e + e + e * (r + 2 * n) + r * e + e + e * n + e + e * d

    total = 3 * 32 * 49 + 2 * 32 * 32 * 9 + 3 * 2 * 32
    before = 32
    for d, depth, ratio in zip((64, 128, 320, 448), (3, 4, 6, 3), (8, 8, 4, 4), strict=True):
        h = d * ratio
        mlp = d * h + h + 9 * h + h + h * d + d
        total += before * d * 9 + d + 2 * d + depth * (4 * d + mixer(d) + mlp) + 2 * d
        before = d
    with torch.device("meta"):
        model = timm.create_model("samba", num_classes=0)
    assert sum(p.numel() for p in model.parameters()) == total
    assert [info["num_chs"] for info in model.feature_info] == [64, 128, 320, 448]


@pytest.mark.parametrize("size", [(64, 96), (50, 33), (4, 4), (1, 7)])
def test_levels_of_any_size(size):
    maps = backbone()(torch.randn(2, 3, *size))
    for channels, reduction, level in zip((16, 32, 48, 64), (4, 8, 16, 32), maps, strict=True):
        assert level.shape == (2, channels, -(-size[0] // reduction), -(-size[1] // reduction))


def test_each_level_is_normalised_and_feeds_the_next():
    model = timm.create_model("test_samba").eval()
    seen = []
    model.stages[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    final, maps = model.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NHWC")
    for level in maps:  # norms start as the identity on what they normalise
        assert_close("mean", level.mean(-1), torch.zeros_like(level[..., 0]), 1e-5)
        assert_close("variance", level.var(-1, unbiased=False), torch.ones_like(level[..., 0]), 1e-3)
    assert torch.equal(seen[0], maps[0]) and torch.equal(final, maps[3])
    pooled = final.mean((1, 2))
    assert_close("pooled", model.forward_head(final, pre_logits=True), pooled, 1e-6)


def test_convolution_of_the_mlp_stands_before_its_gelu():
    torch.manual_seed(0)
    mlp, x = ConvMlp(4, 8).double(), torch.randn(1, 3, 5, 4, dtype=torch.float64)
    hidden = torch.nn.functional.pad(x @ mlp.fc1.weight.T + mlp.fc1.bias, (0, 0, 1, 1, 1, 1))
    expected = mlp.dwconv.bias + sum(
        hidden[:, i : i + 3, j : j + 5] * mlp.dwconv.weight[:, 0, i, j] for i in range(3) for j in range(3)
    )
    expected = torch.nn.functional.gelu(expected) @ mlp.fc2.weight.T + mlp.fc2.bias
    assert_close("mlp", mlp(x), expected, 1e-12)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"depths=\(1, 2\).*give one number a stage"):
        Samba(dims=(8, 16, 32), depths=(1, 2), mlp_ratios=(1, 1, 1))
    with pytest.raises(ValueError, match="output_fmt='NLC': allowed are 'NCHW', 'NHWC'"):
        timm.create_model("test_samba").forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NLC")
