"""The backbone wrapper, the pyramid neck and the optimiser constructor."""

import numpy as np
import pytest
import timm
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.models.golden import _check_digest, load_case
from vision_mamba.checkpoint import official_globals
from vision_mamba.mm import SimpleFeaturePyramid, VisionMambaBackbone

FAMILIES = {"test_vim": 4, "test_vmamba": 4, "test_rsmamba": 4, "test_samba": 4}
CASE = "vmamba_tinycfg_backbone_v05_noz_ln2d_64x96"


def official_backbone():
    case = load_case(CASE)
    return case, {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}


def check_golden(case, maps):
    for i, level in enumerate(maps):
        _check_digest(f"level{i}", level, case["float64"]["outputs"][f"level{i}"], 2e-5)


def golden_input(case):
    return torch.from_numpy(recipe.make_input(case["input"]["shape"], case["input"]["seed"])).float()


@pytest.mark.parametrize("scope", ["mmseg", "mmdet"])
def test_registered_once_for_both(scope):
    init_default_scope(scope)
    with DefaultScope.overwrite_default_scope(scope):
        backbone = MODELS.build(dict(type="VisionMambaBackbone", model_name="test_vim"))
    assert isinstance(backbone, VisionMambaBackbone)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_the_models_own(name):
    torch.manual_seed(0)
    backbone = VisionMambaBackbone(name, (1, 3)).eval()
    x = torch.randn(2, 3, 64, 96)
    maps = backbone(x)
    expected = backbone.model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    for level, channels, stride in zip(maps, backbone.out_channels, backbone.strides, strict=True):
        assert level.shape == (2, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(50, 71), (97, 33)])
def test_any_image_size(name, size):
    backbone = VisionMambaBackbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, *size))
    for level, stride in zip(maps, backbone.strides, strict=True):
        assert level.shape[2:] == tuple(-(-side // stride) for side in size)


def test_padding_is_zeros_at_the_bottom_right():
    backbone = VisionMambaBackbone("test_vim").eval()
    x = torch.randn(1, 3, 50, 71)
    padded = nn.functional.pad(x, (0, 9, 0, 14))
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), backbone(padded), strict=True))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_official_detection_backbone(prefix, tmp_path):
    """By init_cfg: outnorm{i} go to the norms of the outputs; features as the official code's."""
    case, state = official_backbone()
    file = {prefix + name: tensor for name, tensor in state.items()}
    if prefix:
        file["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": file}, tmp_path / "official.pth")
    backbone = VisionMambaBackbone(
        "test_vmamba", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "official.pth"))
    )
    backbone.init_weights()
    check_golden(case, backbone.eval()(golden_input(case)))


def test_whole_official_detector_loads():
    """A detector's file of the official repository, as mmengine loads it: names under ``backbone.`` become ours."""
    from mmengine.runner.checkpoint import load_state_dict

    case, state = official_backbone()
    neck = nn.Conv2d(16, 4, 1)
    file = {f"backbone.{name}": t for name, t in state.items()} | {f"neck.{n}": t for n, t in neck.state_dict().items()}
    for load in (load_state_dict, lambda model, s, strict: model.load_state_dict(s, strict=strict)):
        detector = nn.ModuleDict(dict(backbone=VisionMambaBackbone("test_vmamba"), neck=nn.Conv2d(16, 4, 1)))
        load(detector, dict(file), strict=True)
        check_golden(case, detector["backbone"].eval()(golden_input(case)))
        again = VisionMambaBackbone("test_vmamba")
        again.load_state_dict(detector["backbone"].state_dict())  # our own names pass
        check_golden(case, again.eval()(golden_input(case)))


def test_init_from_a_classifier(tmp_path):
    classifier = timm.create_model("test_vmamba")
    torch.save({"model": classifier.state_dict()}, tmp_path / "cls.pth")
    backbone = VisionMambaBackbone("test_vmamba", pretrained=str(tmp_path / "cls.pth"))
    backbone.init_weights()
    assert torch.equal(backbone.model.stages[2].blocks[0].mixer.A_log, classifier.stages[2].blocks[0].mixer.A_log)
    assert float(backbone.model.feature_norms["0"].weight.detach().min()) == 1.0
    other = VisionMambaBackbone("test_vim", pretrained=str(tmp_path / "cls.pth"))
    with pytest.raises(ValueError, match=r"cls\.pth does not fit the backbone test_vim: .*missing"):
        other.init_weights()
    gone = VisionMambaBackbone("test_vim", pretrained=str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        gone.init_weights()


def test_mmengine_checkpoint_reads_with_weights_only(tmp_path):
    """Log history, numpy arrays and scalars, after another reader came and went with the same permissions."""
    log = HistoryBuffer([1.0, 3.0], [1, 1])
    saved = dict(
        state_dict=timm.create_model("test_vmamba").state_dict(),
        meta=dict(seed=1, best=np.float64(0.5), hook=dict(n=np.int64(3))),
        message_hub=dict(log_scalars={"train/loss": log}),
    )
    torch.save(saved, tmp_path / "epoch_1.pth")
    vision_mamba.load_checkpoint(timm.create_model("test_vmamba"), tmp_path / "epoch_1.pth")
    loaded = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
    assert loaded["message_hub"]["log_scalars"]["train/loss"].statistics("mean") == 2.0
    assert loaded["meta"]["best"] == 0.5 and loaded["meta"]["hook"]["n"] == 3


def test_every_name_in_a_checkpoint_has_one_meaning():
    """torch keeps what is allowed in a set: of two entries for one name, either may be taken, and one of them broke
    mmengine's log class for the rest of the process."""
    before = set(torch.serialization.get_safe_globals())
    with official_globals():
        names = [
            entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
            for entry in torch.serialization.get_safe_globals()
        ]
        assert "mmengine.logging.history_buffer.HistoryBuffer" in names
        assert len(names) == len(set(names))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "owner, name", [(HistoryBuffer, "__init__"), (torch.load, "__globals__"), (nn.Module, "forward")]
)
def test_getattr_in_a_checkpoint_gives_nothing_else(owner, name, tmp_path):
    class Reach:
        def __reduce__(self):
            return getattr, (owner, name)

    torch.save({"state_dict": {}, "x": Reach()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"Unsupported global|not an allowed"):
        torch.load(tmp_path / "evil.pth", weights_only=True)


@pytest.mark.parametrize("name, part", [("test_vim", "blocks"), ("test_vmamba", "stages"), ("test_samba", "stages")])
def test_frozen_stages(name, part):
    def free(backbone):
        return {n.split(".")[1] for n, p in backbone.model.named_parameters() if p.requires_grad and n.startswith(part)}

    assert free(VisionMambaBackbone(name)) == {"0", "1", "2", "3"}
    backbone = VisionMambaBackbone(name, (0, 1, 2, 3), frozen_stages=2, drop_path_rate=0.2).train()
    assert free(backbone) == {"2", "3"}
    stem = getattr(backbone.model, "patch_embed", None) or backbone.model.stem
    assert not any(p.requires_grad for p in stem.parameters())
    fixed = getattr(backbone.model, part)
    assert not fixed[1].training and fixed[2].training and backbone.training
    sum(m.sum() for m in backbone(torch.randn(1, 3, 64, 64))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    with pytest.raises(ValueError, match=rf"frozen_stages=5: {name} has 4 stages"):
        VisionMambaBackbone(name, (0, 1, 2, 3), frozen_stages=5)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_cp_gives_the_same_gradients(name):
    plain, x = VisionMambaBackbone(name).eval(), torch.randn(1, 3, 64, 64)
    sum((m * m).sum() for m in plain(x)).backward()
    for with_cp in (True, "selective"):
        saving = VisionMambaBackbone(name, with_cp=with_cp).eval()
        saving.load_state_dict(plain.state_dict())
        sum((m * m).sum() for m in saving(x)).backward()
        for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
            assert_close(key, b.grad, a.grad, 1e-5)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            dict(model_name="vmamba_tiny_s1l9"),
            r"unknown backbone model_name 'vmamba_tiny_s1l9'; did you mean 'vmamba_tiny_s1l8'",
        ),
        (dict(model_name="test_vmamba", img_size=64), "test_vmamba has no argument 'img_size'"),
        (dict(model_name="test_vim", depht=3), "test_vim has no argument 'depht'"),
        (dict(model_name="test_vmamba", out_indices=(0, 4)), r"out_indices=\(0, 4\) is not within its stages"),
        (dict(model_name="test_vim", init_cfg=dict(type="Kaiming")), "only dict\\(type='Pretrained'"),
        (dict(model_name="test_vim", pretrained="a.pth", init_cfg=dict(type="Pretrained")), "not as both"),
    ],
)
def test_mistakes(args, message):
    with pytest.raises(ValueError, match=message):
        VisionMambaBackbone(**args)


def test_layer_decay_and_weight_decay():
    class Segmentor(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.backbone = VisionMambaBackbone(name, (0, 1, 2, 3), frozen_stages=0)
            self.head = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def groups(model, **paramwise):
        wrapper = build_optim_wrapper(
            model,
            dict(
                constructor="VisionMambaOptimConstructor",
                paramwise_cfg=dict(norm_decay_mult=0.0, **paramwise),
                optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1),
            ),
        )
        names = {p: n for n, p in model.named_parameters()}
        return {names[p]: (g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups for p in g["params"]}

    model = Segmentor("test_vim")
    found = groups(model, layer_decay=0.5)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    prefix = "backbone.net.model.blocks"
    # Four blocks: the last has one factor, the first four.
    assert found[f"{prefix}.3.mixer.in_proj.weight"] == (0.5, 0.1)
    assert found[f"{prefix}.0.mixer.in_proj.weight"] == (0.5**4, 0.1)
    for special in ("mixer.A_log", "mixer.D", "norm.weight", "mixer.conv_bias"):
        assert found[f"{prefix}.1.{special}"] == (0.5**3, 0.0)
    assert found["head.0.weight"] == (1.0, 0.1) and found["head.1.weight"] == (1.0, 0.0)
    assert not any("patch_embed" in name or "pos_embed" in name for name in found)
    assert {lr for lr, _ in groups(model).values()} == {1.0}

    found = groups(Segmentor("test_vmamba"), layer_decay=0.5)
    assert found["backbone.net.model.feature_norms.0.weight"] == (1.0, 0.0)
    assert found["backbone.net.model.stages.3.blocks.0.mlp.fc1.weight"] == (0.5, 0.1)
    assert found["backbone.net.model.stages.0.blocks.0.mlp.fc1.weight"][0] == 0.5**5  # five blocks in all
    with pytest.raises(ValueError, match="layer_decay=0"):
        groups(model, layer_decay=0.0)


def test_simple_feature_pyramid():
    torch.manual_seed(0)
    neck = SimpleFeaturePyramid(32, 16, num_outs=6).eval()
    maps = torch.randn(3, 2, 32, 6, 10)
    levels = neck(list(maps))
    sides = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    assert [tuple(level.shape) for level in levels] == [(2, 16, *side) for side in sides]
    assert torch.equal(levels[5], levels[3][:, :, ::4, ::4])
    # The branch at scale 1 by hand: 1x1, LayerNorm over channels, 3x3, LayerNorm over channels.
    first, second = neck.branches[2]
    x = nn.functional.conv2d(maps[-1], first.conv.weight)
    x = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (16,), eps=1e-5).permute(0, 3, 1, 2)
    x = nn.functional.conv2d(x, second.conv.weight, padding=1)
    x = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (16,), eps=1e-5).permute(0, 3, 1, 2)
    assert_close("level", levels[2], x, 1e-5)
    sum(level.sum() for level in neck.train()(list(maps))).backward()
    assert all(p.grad is not None for p in neck.parameters())
    with pytest.raises(ValueError, match="scale factor 3"):
        SimpleFeaturePyramid(32, scale_factors=(3,))
    with pytest.raises(ValueError, match="num_outs=2"):
        SimpleFeaturePyramid(32, num_outs=2)
