"""Vim: official numbers, official checkpoint layout, timm's contract, AMP, compile, export."""

import argparse
import copy
import json

import pytest
import timm
import torch

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.golden.make_vim_options import from_official_arguments
from tests.models.golden import FOLDER, check_case, load_case
from tests.ops.backends import record_scans
from vision_mamba.models.vim import (
    VisionMamba,
    checkpoint_filter_fn,
    cls_positions,
    insert_tokens,
    remove_tokens,
    resample_pos_embed,
)


def small(**kwargs):
    torch.manual_seed(0)
    return VisionMamba(**{**dict(img_size=64, embed_dim=32, depth=4, num_classes=10), **kwargs}).eval()


OFFICIAL = {
    "vim_tiny_224": lambda: timm.create_model("vim_tiny_patch16_224"),
    "vim_tinycfg_v2_midcls": lambda: small(),
    "vim_tinycfg_v2_nocls_meanpool": lambda: small(cls_position="none", global_pool="avg"),
    "vim_tinycfg_none_bidirectional_pairs_meanpool": lambda: small(
        cls_position="none", global_pool="avg", bimamba_type="none", if_bidirectional=True
    ),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_agrees_with_official(case):
    check_case(load_case(case), OFFICIAL[case](), tolerance=2e-5)


@pytest.mark.parametrize("case", [c for c in OFFICIAL if c != "vim_tiny_224"])
def test_agrees_with_official_in_float64(case):
    check_case(load_case(case), OFFICIAL[case](), tolerance=1e-8, dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("case", OFFICIAL)
def test_agrees_with_official_on_gpu(case):
    check_case(load_case(case), OFFICIAL[case](), tolerance=1e-4, device="cuda")


OPTIONS = json.loads((FOLDER / "vim_options.json").read_text())


@pytest.mark.parametrize("case", OPTIONS["cases"], ids=[c["id"] for c in OPTIONS["cases"]])
def test_every_official_option_agrees(case):
    model = from_official_arguments({**OPTIONS["common_args"], **case["args"]}).double().eval()
    state = {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}
    vision_mamba.load_checkpoint(model, state)
    x = torch.from_numpy(recipe.make_input(case["input"]["shape"], case["input"]["seed"])).double().requires_grad_()
    out = model(x)
    (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
    # The official reference scan computes in float32 whatever it is given.
    assert_close("logits", out, torch.tensor(case["out"], dtype=torch.float64), 2e-6)
    assert float(x.grad.norm()) == pytest.approx(case["input_grad_l2"], rel=1e-5)
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert total == pytest.approx(case["all_params_grad_l2"], rel=1e-5)


def test_published_parameter_counts():
    counts = {"vim_tiny_patch16_224": 7.1, "vim_small_patch16_224": 25.8, "vim_base_patch16_224": 97.6}
    for name, millions in counts.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == pytest.approx(millions, abs=0.4), name


@pytest.mark.parametrize("position", ["middle", "head", "double", "none"])
def test_class_token_positions(position):
    model = small(cls_position=position, global_pool="avg")
    x = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    assert tokens.shape[1] == 16 + {"double": 2, "none": 0}.get(position, 1)
    places = cls_positions(position, 16)
    assert places == {"middle": (8,), "head": (0,), "double": (0, 17), "none": ()}[position]
    patches = remove_tokens(tokens, places)
    assert patches.shape[1] == 16
    assert_close("avg", model.forward_head(tokens, pre_logits=True), patches.mean(1), 1e-6)
    rebuilt = insert_tokens(patches, [tokens[:, i : i + 1] for i in places], places)
    assert torch.equal(rebuilt, tokens)
    if places:
        model.reset_classifier(10, "token")
        expected = tokens[:, list(places)].mean(1)
        assert_close("token", model.forward_head(tokens, pre_logits=True), expected, 1e-6)


@pytest.mark.parametrize("kind", ["v1", "none"])
def test_other_directions_follow_the_definition(kind):
    """v1 and one-directional mixers against the two scans written out, with flips, by the reference."""
    from vision_mamba.layers import MambaMixer
    from vision_mamba.ops import causal_conv1d, selective_scan
    from vision_mamba.paths import scan_paths

    torch.manual_seed(0)
    num_paths = 2 if kind == "v1" else 1
    mixer = MambaMixer(16, num_paths=num_paths, share_paths=kind == "v1").double()
    with torch.no_grad():
        mixer.A_log.add_(torch.randn_like(mixer.A_log) * 0.1)
    h = torch.randn(2, 9, 16, dtype=torch.float64)
    x, z = mixer.in_proj(h).chunk(2, -1)
    x = causal_conv1d(x, mixer.conv_weight[0], mixer.conv_bias[0], activation="silu", backend="reference")
    dt, B, C = (x @ mixer.x_proj_weight[0].T).split((1, 16, 16), -1)
    delta = dt @ mixer.dt_proj_weight[0].T
    total = 0
    for k in range(num_paths):

        def flip(t, k=k):
            return t.flip(1) if k else t

        y = selective_scan(
            flip(x), flip(delta), -mixer.A_log[k].exp(), flip(B), flip(C), mixer.D[0], flip(z), mixer.dt_proj_bias[0],
            delta_softplus=True, backend="reference",
        )  # fmt: skip
        total = total + flip(y)
    paths = scan_paths(("raster", "reverse")[:num_paths], 1, 9)
    assert_close(kind, mixer(h, paths), mixer.out_proj(total), 1e-12)


def official_file(tmp_path, model_name="vim_tinycfg_v2_midcls"):
    case = load_case(model_name)
    state = {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}
    path = tmp_path / "official.pth"
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, path)
    return path, state


def test_official_file_loads_with_its_namespace(tmp_path):
    path, state = official_file(tmp_path)
    model = small()
    report = vision_mamba.load_checkpoint(model, path)
    assert not report.problems() and not report.adapted
    assert torch.equal(model.blocks[1].mixer.A_log[1], state["layers.1.mixer.A_b_log"])
    assert torch.equal(model.blocks[2].mixer.conv_weight[1], state["layers.2.mixer.conv1d_b.weight"].squeeze(1))


def test_own_checkpoint_round_trip(tmp_path):
    from safetensors.torch import save_file

    model, other = small(), small(layer_scale=None)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    vision_mamba.load_checkpoint(other, tmp_path / "own.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "ddp.pth")
    vision_mamba.load_checkpoint(other, tmp_path / "ddp.pth")


def test_checkpoint_ema_is_a_choice(tmp_path):
    model = small()
    averaged = {k: v + 1 for k, v in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": averaged}, tmp_path / "both.pth")
    other = small()
    vision_mamba.load_checkpoint(other, tmp_path / "both.pth", use_ema=True)
    assert torch.equal(other.head.bias, averaged["head.bias"])
    vision_mamba.load_checkpoint(other, tmp_path / "both.pth")
    assert torch.equal(other.head.bias, model.head.bias)


def test_checkpoint_adapts_size_bands_and_head(tmp_path):
    path, state = official_file(tmp_path)
    model = small(img_size=(96, 64), in_chans=5, num_classes=3)
    own_head = copy.deepcopy(model.head.weight)
    with pytest.warns(UserWarning, match="head has another class count"):
        report = vision_mamba.load_checkpoint(model, path)
    assert set(report.adapted) == {"patch_embed.proj.weight", "head.weight", "head.bias"}
    assert torch.equal(model.head.weight, own_head)
    assert model(torch.randn(1, 5, 96, 64)).shape == (1, 3)
    # The class token's own row stays its own, in the middle of the new grid.
    assert torch.equal(model.pos_embed[0, 12], state["pos_embed"][0, 8])
    assert_close("first patch", model.pos_embed[0, :4].mean(0), state["pos_embed"][0, :4].mean(0), 0.5)


def test_checkpoint_problems_are_all_named(tmp_path):
    path, state = official_file(tmp_path)
    with pytest.raises(ValueError) as error:
        vision_mamba.load_checkpoint(small(depth=5, embed_dim=48), path)
    for fragment in (
        "missing: ",
        "blocks.4.norm.weight",
        "misshapen",
        "cls_token (1, 1, 32) for (1, 1, 48)",
        str(path),
    ):
        assert fragment in str(error.value)
    state["layers.0.mixer.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 unexpected: blocks\.0\.mixer\.extra"):
        vision_mamba.load_checkpoint(small(), {"model": state})
    report = vision_mamba.load_checkpoint(small(depth=5), path, strict=False)
    assert len(report.missing) == 10 and not report.unexpected
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        vision_mamba.load_checkpoint(small(), tmp_path / "none.pth")
    (tmp_path / "torn.pth").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        vision_mamba.load_checkpoint(small(), tmp_path / "torn.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        vision_mamba.load_checkpoint(small(), {"model": {}})


def test_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"model": {}, "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        vision_mamba.load_checkpoint(small(), tmp_path / "evil.pth")


def test_position_table_resampling_keeps_constant_and_size():
    table = torch.full((1, 17, 4), 2.0)
    table[:, 8] = 7.0

    out = resample_pos_embed(table, (4, 4), (6, 3), "middle")
    assert out.shape == (1, 19, 4) and bool((out[:, 9] == 7).all())
    assert_close("patches", remove_tokens(out, (9,)), torch.full((1, 18, 4), 2.0), 1e-6)


def test_any_size_and_bands():
    fixed, dynamic = small(), small(dynamic_img_size=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fixed(x), dynamic(x))
    assert dynamic(torch.randn(2, 3, 48, 112)).shape == (2, 10)
    assert small(img_size=(32, 80), in_chans=13)(torch.randn(1, 13, 32, 80)).shape == (1, 10)
    assert small(stride=8)(x).shape == (1, 10) and small(stride=8).patch_embed.grid_size == (7, 7)
    fixed.set_input_size((96, 64))
    assert fixed(torch.randn(1, 3, 96, 64)).shape == (1, 10)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="image is 32x64, the model was built for 64x64.*dynamic_img_size=True"):
        small()(torch.randn(1, 3, 32, 64))
    with pytest.raises(ValueError, match="height 70 is not tiled by patches of 16.*nearest sizes are 64 and 80"):
        small(img_size=70)
    with pytest.raises(ValueError, match="width 65 is not tiled"):
        small(dynamic_img_size=True)(torch.randn(1, 3, 64, 65))
    with pytest.raises(ValueError, match="cls_position='end': allowed are 'middle'"):
        small(cls_position="end")
    with pytest.raises(ValueError, match="global_pool='token' needs a class token"):
        small(cls_position="none")
    with pytest.raises(ValueError, match="if_bidirectional pairs layers"):
        small(if_bidirectional=True, depth=3)
    with pytest.raises(TypeError, match="positional"):
        VisionMamba(64, 16, 16)


def test_features():
    model = small(depth=6)
    x = torch.randn(2, 3, 64, 96)
    dynamic = small(depth=6, dynamic_img_size=True)
    final, maps = dynamic.forward_intermediates(x, indices=[1, 5], norm=True, return_prefix_tokens=True)
    assert [tuple(m.shape) for m, _ in maps] == [(2, 32, 4, 6)] * 2 and maps[0][1].shape == (2, 1, 32)
    assert_close("last map", maps[1][0].flatten(2).transpose(1, 2), remove_tokens(final, (12,)), 1e-6)
    assert_close("class token", maps[1][1][:, 0], final[:, 12], 1e-6)
    backbone = timm.create_model("test_vim", features_only=True, out_indices=(1, 3), dynamic_img_size=True)
    assert backbone.feature_info.reduction() == [16, 16] and backbone.feature_info.channels() == [32, 32]
    assert [tuple(m.shape) for m in backbone(torch.randn(1, 3, 80, 48))] == [(1, 32, 5, 3)] * 2
    assert model.prune_intermediate_layers([1]) == [1] and len(model.blocks) == 2


def test_checkpoint_filter_passes_own_names_unchanged():
    model = small()
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model).keys() == state.keys()


def test_pretrained_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        RuntimeError, match=r"vim_t_midclstok_76p1acc\.pth of hustvl/Vim-tiny-midclstok.*load_checkpoint"
    ):
        timm.create_model("vim_tiny_patch16_224", pretrained=True)


def test_pretrained_file_through_timm(tmp_path):
    """What ``pretrained=True`` does after the download: timm's loader on a file of the official layout."""
    case = load_case("vim_tiny_224")
    state = {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "vim_t.pth")
    model = timm.create_model(
        "vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "vim_t.pth"))
    )
    assert torch.equal(model.blocks[23].mixer.D[1], state["layers.23.mixer.D_b"])


@pytest.mark.slow
def test_bf16_autocast_trains_like_float32():
    """30 steps on real images: the loss within 2 % of float32's; the official Vim needs --no_amp."""
    from vision_mamba.data import build_transform, open_dataset

    transform = build_transform(split="val", img_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = open_dataset("builtin", "train")
    picks = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: 30 * 16].tolist()
    images, targets = zip(*((transform(image), target) for image, target in (dataset[i] for i in picks)), strict=True)
    images, targets = torch.stack(images), torch.tensor(targets)
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_vim", num_classes=len(dataset.classes)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        history = []
        for x, y in zip(images.split(16), targets.split(16), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses[enabled] = sum(history[-10:]) / 10
        first = sum(history[:5]) / 5
    assert losses[False] < first, "float32 did not learn: the comparison would say nothing"
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_residual_stream_and_states_are_float32_under_autocast():
    model = small()
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    model.blocks[1].mixer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(1, 3, 64, 64))
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)]


@pytest.mark.parametrize("training", [False, True])
def test_additions_within_norms(training):
    """Unobserved, a block's addition is part of the next norm's pass; with a hook on a block, its own: same numbers."""
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", img_size=32, depth=3, num_classes=5).double().train(training)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def run():
        model.zero_grad()
        logits = model(images)
        logits.square().mean().backward()
        return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}

    assert model._adds_within_norms(images)
    found = run()
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda block, given, output: seen.append(output.detach()))
    assert not model._adds_within_norms(images)
    expected = run()
    handle.remove()
    with torch.no_grad():
        (stream,) = model.forward_intermediates(images, [1], output_fmt="NLC", norm=False, intermediates_only=True)
    assert_close("what the hook saw", remove_tokens(seen[0], (2,)), stream, 1e-12)
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, 1e-12)
    for norm in (model.norm, model.blocks[0].norm):
        handle = norm.register_forward_pre_hook(lambda module, given: None)
        assert not model._adds_within_norms(images)
        handle.remove()
    model.set_grad_checkpointing()
    assert not model._adds_within_norms(images)


def test_selective_checkpointing_compiled(monkeypatch):
    """PyTorch's own then, which a compiler can trace; no scan is run a second time there either."""
    runs = record_scans("cpu", monkeypatch)
    model, images = timm.create_model("test_vim").train(), torch.randn(1, 3, 64, 64)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    runs.clear()
    model.set_grad_checkpointing("selective")
    compiled = torch.compile(model, backend="aot_eager")
    found = torch.autograd.grad(compiled(images).square().sum(), list(model.parameters()))
    assert len(runs) == len(model.blocks)
    for (name, _), gradient, wanted in zip(model.named_parameters(), found, expected, strict=True):
        assert_close(name, gradient, wanted, 1e-5)
