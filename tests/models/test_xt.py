"""xT: official numbers, regions and chunks, levels, files of the region encoder. timm's contract is in test_contract.py."""

import json
import warnings

import pytest
import timm
import torch

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.golden.make_xt_options import SWIN, VMAMBA, from_official_arguments
from tests.models.golden import FOLDER, check_case
from vision_mamba.models.xt import XT, position_table

OFFICIAL = json.loads((FOLDER / "xt_options.json").read_text())
CASES = {case["id"]: case for case in OFFICIAL["cases"]}
FULL = "swin_tiny_mamba_512_256"
SMALL = [name for name in CASES if name != FULL]


def official_model(case):
    return from_official_arguments({**OFFICIAL["common_args"], **case["args"]})


@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_official(name):
    check_case(CASES[name], official_model(CASES[name]), tolerance=2e-5)


@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_official_in_float64(name):
    check_case(CASES[name], official_model(CASES[name]), tolerance=1e-9, dtype=torch.float64)


@pytest.mark.slow
def test_full_size_agrees_with_official():
    check_case(CASES[FULL], timm.create_model("xt_swinv2_tiny_512_256"), tolerance=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_official_on_gpu(name):
    check_case(CASES[name], official_model(CASES[name]), tolerance=1e-4, device="cuda")


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_xt", **{**dict(num_classes=10), **kwargs}).eval()


def small_swin(**kwargs):
    torch.manual_seed(0)
    args = dict(encoder="swinv2_tiny_window16_256", encoder_args=SWIN, region_size=64, embed_dim=32, depth=2)
    return XT(**{**dict(num_classes=10), **args, **kwargs}).eval()


def image(height=64, width=96, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_a_region_is_encoded_alone_and_lies_where_it_was():
    model = small()
    x = image(96, 64)
    maps = model.encoder(x, range(3))
    for row in range(3):
        for column in range(2):
            region = x[:, :, 32 * row : 32 * (row + 1), 32 * column : 32 * (column + 1)]
            alone = model.encoder.model.forward_intermediates(region, intermediates_only=True)
            for of_image, of_region in zip(maps, alone, strict=True):
                side = of_region.shape[-1]
                place = of_image[:, side * row : side * (row + 1), side * column : side * (column + 1)]
                assert_close("region", place.permute(0, 3, 1, 2), of_region, 1e-6)


def test_context_reaches_across_regions():
    """A changed region changes the context encoder's level everywhere, and the region encoder's own nowhere else."""
    model = small()
    x, changed = image(96, 96, 1), image(96, 96, 1)
    changed[..., 32:64, 32:64] += 1
    moved = [
        (a - b).abs().amax(1) > 0
        for a, b in zip(*(model.forward_intermediates(i, intermediates_only=True) for i in (x, changed)), strict=True)
    ]
    own = torch.zeros(3, 3, dtype=torch.bool)
    own[1, 1] = True
    own = own.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(moved[2][0], own) and bool(moved[3].all())


def test_non_square_positions_follow_row_and_column():
    """Officially square only; the rows of a wider table are those of the square one."""
    like = torch.zeros(1, dtype=torch.float64)
    table = position_table(2, 5, 24, like=like).reshape(2, 5, 24)
    square = position_table(5, 5, 24, like=like).reshape(5, 5, 24)
    assert torch.equal(table, square[:2])
    for row, column in ((0, 3), (1, 4)):
        angles = [
            torch.arange(6, dtype=torch.float64).neg().div(6).mul(9.210340371976184).exp() * p for p in (column, row)
        ]
        expected = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)])
        assert_close("position", table[row, column], expected, 1e-12)


@pytest.mark.parametrize("create", [small, small_swin])
@pytest.mark.parametrize("training", [False, True])
def test_chunks_bound_what_the_region_encoder_sees(create, training):
    size = 32 if create is small else 64
    x = image(2 * size, 3 * size)  # 12 regions
    results = {}
    for chunk in (None, 1, 5, 12, 100):
        model = create(region_chunk=chunk)
        if training:
            model.set_grad_checkpointing()
        seen = []
        model.encoder.model.get_submodule(
            "patch_embed.proj" if create is small_swin else "stem.conv1"
        ).register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0].shape[0]))
        with torch.set_grad_enabled(training):
            out = model(x)
        assert max(seen) == min(chunk or 12, 12) and sum(seen) == 12
        gradients = []
        if training:
            out.square().sum().backward()
            # Recomputed in backward, again a chunk at a time; without chunks blocks are recomputed, not the stem.
            assert max(seen) == min(chunk or 12, 12) and sum(seen) == (12 if chunk is None else 24)
            gradients = [p.grad for p in model.parameters()]
        results[chunk] = [out, *gradients]
    for chunk in (1, 5, 12, 100):
        for a, b in zip(results[chunk], results[None], strict=True):
            assert_close(f"region_chunk={chunk}", a, b, 2e-5)


def saved_bytes(model, x):
    """Bytes that autograd keeps for backward of the region encoder, each storage once, parameters excepted."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.encoder(x, (2,))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in kept.items() if place not in parameters)


def test_checkpointed_chunks_keep_no_activations():
    """What training keeps of the region encoder: nothing but the pixels, however many regions there are."""
    x = image(128, 128, 1)
    everything = saved_bytes(small(), x)
    model = small(region_chunk=2)
    assert saved_bytes(model, x) > 0.9 * everything
    model.set_grad_checkpointing()
    assert saved_bytes(model, x) <= 1.05 * x.numel() * 4 < 0.1 * everything
    # All regions at once: the region encoder's own checkpointing, of its blocks.
    model = small()
    model.set_grad_checkpointing()
    assert saved_bytes(model, x) < 0.5 * everything


def test_levels():
    backbone = timm.create_model("test_xt", features_only=True)
    assert backbone.feature_info.reduction() == [4, 8, 16, 16]
    maps = backbone(image())
    model = small()
    final, levels = model.forward_intermediates(image())
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels() == [16, 32, 64, 32]
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (4, 6)]
    # The last level is the tokens less the class token, row by row.
    _, normed = model.forward_intermediates(image(), norm=True, output_fmt="NHWC")
    assert torch.equal(normed[-1].flatten(1, 2), final[:, :-1])
    only_regions, levels_early = model.forward_intermediates(image(), indices=[0, 2], stop_early=True)
    assert torch.equal(only_regions.permute(0, 3, 1, 2), levels[2]) and torch.equal(levels_early[0], levels[0])
    with pytest.raises(ValueError, match="output_fmt='NLC': allowed are 'NCHW', 'NHWC'"):
        model.forward_intermediates(image(), output_fmt="NLC")


def test_levels_train_every_parameter_but_head_and_norm():
    backbone = timm.create_model("test_xt", features_only=True, out_indices=(2, 3)).train()
    sum(level.square().sum() for level in backbone(image())).backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert without == []


def official_weights(case):
    return {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}


def test_official_training_checkpoint_loads(tmp_path):
    """As the official trainer writes it, of DistributedDataParallel, with the masks that timm 0.9 stored."""
    weights = {f"module.{name}": tensor for name, tensor in official_weights(CASES["swin"]).items()}
    weights["module.encoder.model.layers_0.blocks.0.attn_mask"] = torch.zeros(1)
    file = dict(epoch=99, state_dict=weights, optimizer_state_dict={"state": {}}, metrics={"top1": 61.97})
    torch.save(file, tmp_path / "official.ckpt")
    model = small_swin(depth=4)
    report = vision_mamba.load_checkpoint(model, tmp_path / "official.ckpt")
    assert not report.problems() and not report.adapted
    official = weights["module.decoder.layers.3.mixer.conv1d.weight"]
    assert torch.equal(model.blocks[3].mixer.conv_weight[0], official.squeeze(1))
    assert torch.equal(model.head.bias, weights["module.decoder.cls.1.bias"])
    backbone = timm.create_model("test_xt", features_only=True, out_indices=(0,))
    report = vision_mamba.load_checkpoint(backbone, small().state_dict())
    assert "head.weight" in report.unused and not report.problems()


def test_a_region_encoders_own_file_fills_it(tmp_path):
    swin = timm.create_model("swinv2_tiny_window16_256", img_size=64, num_classes=5, **SWIN)
    encoders = {small_swin: swin, small: timm.create_model("test_vmamba", num_classes=5, **VMAMBA)}
    for create, encoder in encoders.items():
        model, before = create(), create().state_dict()
        with pytest.warns(UserWarning, match="of the region encoder only"):
            vision_mamba.load_checkpoint(model, encoder.state_dict())
        loaded = encoder.state_dict()
        for name, tensor in model.state_dict().items():
            inside = name.removeprefix("encoder.model.")
            assert torch.equal(tensor, loaded[inside] if inside != name else before[name]), name
    with warnings.catch_warnings(), pytest.raises(ValueError, match="missing: .*encoder.model.stem.conv1.weight"):
        warnings.simplefilter("error")  # a file of something else is not taken for the region encoder's
        vision_mamba.load_checkpoint(small(), {"blocks.0.norm.bias": torch.zeros(32)})
    with pytest.warns(UserWarning, match="region encoder only"), pytest.raises(ValueError, match="1 missing"):
        state = encoders[small].state_dict()
        vision_mamba.load_checkpoint(small(), {k: v for k, v in state.items() if k != "stages.0.blocks.0.norm1.bias"})


def test_published_encoder_weights_come_with_pretrained(tmp_path):
    """``pretrained`` of the entries *.encoder_in1k, with the file in place of the download."""
    encoder = timm.create_model("test_vmamba", num_classes=1000, **VMAMBA)
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    overlay = dict(file=str(tmp_path / "encoder.pth"))
    with pytest.warns(UserWarning, match="region encoder only"):
        model = timm.create_model("test_xt", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=5)
    assert torch.equal(model.encoder.model.stages[2].blocks[0].norm1.weight, encoder.stages[2].blocks[0].norm1.weight)
    assert model(torch.randn(1, 5, 32, 32)).shape == (1, 3)


def test_layer_decay_goes_from_region_encoder_to_context_encoder():
    for model, stem in ((small(), "stem.conv1"), (small_swin(), "patch_embed.proj")):
        layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
        order = [
            f"encoder.model.{stem}.weight",
            "cls_token",
            "blocks.0.norm.weight",
            "blocks.1.norm.weight",
            "head.bias",
        ]
        depths = [layers[name] for name in order]
        assert depths[0] == 0 and depths == sorted(set(depths)), depths
        inside = [depth for name, depth in layers.items() if name.startswith("encoder.")]
        assert max(inside) < layers["cls_token"] and len(set(inside)) > 3
        assert (
            layers["input_proj.weight"] == layers["cls_token"] and layers["norm.weight"] == layers["blocks.1.norm.bias"]
        )
    assert any(name.endswith("logit_scale") for name in small_swin().no_weight_decay())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="image width 80 is not tiled by regions of 32; nearest sizes are 64 and 96"):
        small()(torch.randn(1, 3, 64, 80))
    with pytest.raises(ValueError, match="image height 16 is not tiled by regions of 32; nearest sizes are 32 and 64"):
        small()(torch.randn(1, 3, 16, 64))
    with pytest.raises(ValueError, match="region_size=40: test_vmamba needs a multiple of its stride 16"):
        small(region_size=40)
    with pytest.raises(ValueError, match="region_chunk=0: give the number of regions"):
        small(region_chunk=0)
    with pytest.raises(ValueError, match="depth=1: the first block runs backwards"):
        small(depth=1)
    with pytest.raises(ValueError, match="embed_dim=30: the position table needs a multiple of 4"):
        small(embed_dim=30)
    with pytest.raises(ValueError, match="global_pool='max': allowed are 'token', 'avg', ''"):
        small(global_pool="max")
    with pytest.raises(ValueError, match="unknown encoder 'test_vmambo'; did you mean 'test_vmamba'"):
        small(encoder="test_vmambo")


def test_average_leaves_the_class_token_out():
    model = small(global_pool="avg")
    tokens = model.forward_features(image())
    assert_close("avg", model.forward_head(tokens, pre_logits=True), tokens[:, :24].mean(1), 1e-6)


def test_named_entries():
    sizes = {
        "xt_swinv2_tiny_512_256": (512, 44), "xt_swinv2_base_512_256": (512, 103), "xt_swinv2_large_512_256": (512, 212),
        "xt_swinv2_tiny_4096_512": (4096, 44), "xt_vmamba_tiny_512_256": (512, 46),
    }  # fmt: skip
    for name, (size, millions) in sizes.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        # The official table counts 284 classes.
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=1), name
        assert model.default_cfg["input_size"] == (3, size, size)
    with torch.device("meta"):
        model = timm.create_model("xt_swinv2_tiny_4096_512", num_classes=7)
    assert model(torch.empty(1, 3, 4096, 2048, device="meta")).shape == (1, 7)
