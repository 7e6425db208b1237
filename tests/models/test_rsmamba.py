"""RSMamba: official numbers, official checkpoint layout, the random path, timm's contract, compile, export."""

import functools
import json

import pytest
import timm
import torch

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.golden.make_rsmamba_options import from_official_arguments, pinned_paths
from tests.models.golden import FOLDER, check_case, load_case
from vision_mamba.layers import MultiPathMixer
from vision_mamba.models.rsmamba import RSMamba, checkpoint_filter_fn
from vision_mamba.ops import causal_conv1d, selective_scan
from vision_mamba.paths import check_paths, fixed_random_paths, random_paths, scan_paths


def small(**kwargs):
    torch.manual_seed(0)
    return RSMamba(**{**dict(img_size=64, embed_dim=32, depth=3, num_classes=10), **kwargs}).eval()


OFFICIAL = ("rsmamba_tinycfg_forward_reverse_mean", "rsmamba_tinycfg_forward_reverse_shuffle_gate")


def official_model(case):
    return from_official_arguments({"in_channels": 3, **case["args"]["backbone"]})


@pytest.mark.parametrize("name", OFFICIAL)
def test_agrees_with_official(name):
    case = load_case(name)
    check_case(case, official_model(case), tolerance=2e-5)


@pytest.mark.parametrize("name", OFFICIAL)
def test_agrees_with_official_in_float64(name):
    case = load_case(name)
    check_case(case, official_model(case), tolerance=1e-8, dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OFFICIAL)
def test_agrees_with_official_on_gpu(name):
    case = load_case(name)
    check_case(case, official_model(case), tolerance=1e-4, device="cuda")


OPTIONS = json.loads((FOLDER / "rsmamba_options.json").read_text())


@pytest.mark.parametrize("case", OPTIONS["cases"], ids=[c["id"] for c in OPTIONS["cases"]])
def test_every_official_option_agrees(case):
    args = {**OPTIONS["common_args"], **case["args"]}
    if case["id"] == "sine_positions":
        assert args["img_size"] == 64  # the official table of a non-square grid is transposed, ours is not
    model = from_official_arguments(args).double().eval()
    state = {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}
    report = vision_mamba.load_checkpoint(model, state)
    assert not report.adapted and not report.problems()
    x = torch.from_numpy(recipe.make_input(case["input"]["shape"], case["input"]["seed"])).double().requires_grad_()
    out = model(x)
    (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
    digest = recipe.digest(out.detach().numpy())
    assert digest["shape"] == case["out"]["shape"]
    # The official scan computes in float32 whatever it is given.
    expected = torch.tensor(case["out"]["values"], dtype=torch.float64)
    assert_close("logits", torch.tensor(digest["values"], dtype=torch.float64), expected, 2e-6)
    assert float(x.grad.norm()) == pytest.approx(case["input_grad_l2"], rel=1e-5)
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert total == pytest.approx(case["all_params_grad_l2"], rel=1e-5)


def test_published_parameter_counts():
    """Table I of the paper, which counts the 30 classes of AID."""
    for name, millions in {"rsmamba_base": 6.4, "rsmamba_large": 16.2, "rsmamba_huge": 33.1}.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=30)
            assert model(torch.empty(1, 3, 224, 224)).shape == (1, 30)
        assert model.patch_embed.grid_size == (28, 28)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions, name


@pytest.mark.parametrize(
    "names", [("forward",), ("reverse",), ("shuffle", "forward"), ("forward", "reverse", "shuffle")], ids="-".join
)
@pytest.mark.parametrize("merge", ["gate", "mean"])
def test_mixer_follows_the_paper(names, merge):
    """Permuted copies through the whole block one by one, output projection included, then the gate on their means."""
    torch.manual_seed(0)
    mixer = MultiPathMixer(16, num_paths=len(names), merge=merge).double()
    with torch.no_grad():
        mixer.A_log.add_(torch.randn_like(mixer.A_log) * 0.1)
    h = torch.randn(2, 9, 16, dtype=torch.float64)
    table = {"forward": torch.arange(9), "reverse": torch.arange(9).flip(0), "shuffle": torch.randperm(9)}
    outputs = []
    for name in names:
        x, z = mixer.in_proj(h[:, table[name]]).chunk(2, -1)
        x = causal_conv1d(x, mixer.conv_weight, mixer.conv_bias, activation="silu", backend="reference")
        dt, B, C = (x @ mixer.x_proj_weight.T).split((1, 16, 16), -1)
        y = selective_scan(
            x, dt @ mixer.dt_proj_weight.T, -mixer.A_log.exp(), B, C, mixer.D, z, mixer.dt_proj_bias,
            delta_softplus=True, backend="reference",
        )  # fmt: skip
        outputs.append(mixer.out_proj(y)[:, table[name].argsort()])
    if merge == "gate" and len(names) > 1:
        gate = mixer.gate(torch.cat([y.mean(1) for y in outputs], -1)).softmax(-1)
        expected = sum(gate[:, k, None, None] * y for k, y in enumerate(outputs))
    else:
        assert mixer.gate is None
        expected = torch.stack(outputs).mean(0)
    paths = torch.stack([table[name] for name in names])
    assert_close("mixer", mixer(h, paths), expected, 1e-12)


def test_fixed_random_paths_are_fixed_permutations():
    table = check_paths(fixed_random_paths(5, 50, seed=3))
    assert table.dtype == torch.int32 and len({tuple(row.tolist()) for row in table}) == 5
    # Written out: other numbers would change the scores of trained models.
    assert fixed_random_paths(2, 8).tolist() == [[2, 5, 4, 3, 0, 6, 7, 1], [0, 3, 7, 5, 4, 2, 6, 1]]
    assert torch.equal(fixed_random_paths(2, 50, seed=3), table[:2])
    assert not torch.equal(fixed_random_paths(5, 50, seed=4), table)
    # Like independent draws: mean positions and distances of neighbours of a uniform permutation.
    many = fixed_random_paths(1000, 100).double()
    assert float((many.mean(0) - 49.5).square().mean().sqrt()) == pytest.approx(100 / 12**0.5 / 1000**0.5, rel=0.25)
    assert float(many.diff(dim=1).abs().mean()) == pytest.approx(101 / 3, rel=0.02)


def test_random_path_is_fixed_in_evaluation_and_new_in_training():
    model, x = small(), torch.randn(2, 3, 64, 64)
    state = torch.get_rng_state()
    first = model(x)
    assert torch.equal(first, model(x))
    assert_close("in a batch and alone", model(x[:1]), first[:1], 1e-5)
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not draw"
    assert not torch.allclose(first, small(shuffle_seed=1)(x))
    tables = model._paths(torch.empty(1, 64, 32), (8, 8))
    assert tables.shape == (3, 3, 64)
    assert torch.equal(tables[:, :2], scan_paths(("raster", "reverse"), 1, 64).expand(3, 2, 64))
    assert len({tuple(row.tolist()) for row in tables[:, 2]}) == 3, "another permutation for each block"

    model.train()
    torch.manual_seed(5)
    drawn, again = model(x), model(x)
    assert not torch.allclose(drawn, again)
    torch.manual_seed(5)
    assert torch.equal(model(x), drawn), "the default generator decides"


def test_random_path_from_an_explicit_source():
    x = torch.randn(2, 3, 64, 64)
    outputs = []
    for _ in range(2):
        source = functools.partial(random_paths, generator=torch.Generator().manual_seed(3))
        model = small(shuffle_paths=source).train()
        state = torch.get_rng_state()
        outputs.append((model(x), model(x)))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outputs[0][0], outputs[1][0]) and not torch.allclose(outputs[0][0], outputs[0][1])
    model = small(shuffle_paths=pinned_paths)
    assert torch.equal(model._paths(torch.empty(1, 64, 32), (8, 8))[:, 2].long(), pinned_paths(3, 64))


def test_draws_are_averaged_in_evaluation():
    x = torch.randn(2, 3, 64, 64)
    model, averaged = small(), small(shuffle_draws=3)
    expected = torch.stack([small(shuffle_seed=seed)(x) for seed in range(3)]).mean(0)
    assert_close("mean of three draws", averaged(x), expected, 1e-6)
    torch.manual_seed(1)
    one = averaged.train()(x)
    torch.manual_seed(1)
    assert torch.equal(model.train()(x), one), "training draws once"
    without = small(paths=("forward", "reverse"), shuffle_draws=3)
    assert torch.equal(without(x), small(paths=("forward", "reverse"))(x))


@pytest.mark.parametrize("names", [("forward",), ("forward", "reverse"), ("reverse", "shuffle")], ids="-".join)
def test_fewer_paths_train(names):
    model = timm.create_model("test_rsmamba", paths=list(names), num_classes=3).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert (model.blocks[0].mixer.gate is None) == (len(names) == 1)


def test_gradient_checkpointing_recomputes_the_same_random_path():
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    torch.manual_seed(1)
    model(x).sum().backward()
    for (name, p), expected in zip(model.named_parameters(), plain, strict=True):
        assert torch.equal(p.grad, expected), name


def official_file(tmp_path, name=OFFICIAL[1]):
    case = load_case(name)
    state = {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}
    path = tmp_path / "official.pth"
    torch.save({"meta": {"epoch": 3}, "state_dict": state, "message_hub": {}}, path)
    return path, state


def test_official_file_loads(tmp_path):
    path, state = official_file(tmp_path)
    model = small()
    report = vision_mamba.load_checkpoint(model, path)
    assert not report.problems() and not report.adapted
    assert torch.equal(model.blocks[1].mixer.conv_weight, state["backbone.layers.1.conv1d.weight"].squeeze(1))
    assert torch.equal(model.blocks[2].mixer.gate.weight, state["backbone.gate_layers.2.0.weight"])
    assert torch.equal(model.fc_norm.bias, state["backbone.ln2.bias"])
    through_timm = timm.create_model(
        "test_rsmamba", pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10), stride=8, depth=3,
        num_classes=10,
    )  # fmt: skip
    assert torch.equal(through_timm.head.weight, state["head.fc.weight"])


def test_mamba_mixer_names_load():
    """The names of transformers' MambaMixer, without the prefixes of mmpretrain."""
    model = small()
    state = {
        key.removeprefix("backbone."): torch.from_numpy(v)
        for key, v in recipe.make_state(load_case(OFFICIAL[1])["state_dict"]).items()
    }
    vision_mamba.load_checkpoint(model, state)
    assert torch.equal(model.blocks[0].mixer.dt_proj_bias, state["layers.0.dt_proj.bias"])


def test_checkpoint_adapts_size_bands_and_head(tmp_path):
    path, state = official_file(tmp_path)
    model = small(img_size=(96, 64), in_chans=13, num_classes=3)
    with pytest.warns(UserWarning, match="head has another class count"):
        report = vision_mamba.load_checkpoint(model, path)
    assert set(report.adapted) == {"patch_embed.proj.weight", "head.weight", "head.bias"}
    # Grey images keep their response: 13 equal bands give what three gave.
    weight = state["backbone.patch_embed.projection.weight"]
    assert_close("13 bands", model.patch_embed.proj.weight[:, :12].sum(1), 12 / 13 * weight.sum(1), 1e-5)
    assert model.pos_embed.shape == (1, 96, 32)
    assert_close("mean position", model.pos_embed.mean(1), state["backbone.pos_embed"].mean(1), 0.05)
    assert model(torch.randn(1, 13, 96, 64)).shape == (1, 3)


def test_checkpoint_problems_are_all_named(tmp_path):
    path, _ = official_file(tmp_path)
    with pytest.raises(ValueError) as error:
        vision_mamba.load_checkpoint(small(depth=4, embed_dim=48, cls_position="head"), path)
    for fragment in ("missing: ", "cls_token", "blocks.3.mixer.D", "misshapen", "pre_norm.weight (32,) for (48,)"):
        assert fragment in str(error.value)


def test_any_size_and_bands():
    fixed, dynamic = small(), small(dynamic_img_size=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fixed(x), dynamic(x))
    assert dynamic(torch.randn(2, 3, 41, 112)).shape == (2, 10)
    for kwargs in (dict(img_size=(32, 75), in_chans=13), dict(pos_embed="sine", cls_position="tail", img_size=50)):
        model = small(**kwargs)
        assert model(torch.randn(1, kwargs.get("in_chans", 3), *model.patch_embed.img_size)).shape == (1, 10)
    fixed.set_input_size((96, 60))
    assert fixed(torch.randn(1, 3, 96, 60)).shape == (1, 10) and fixed.patch_embed.grid_size == (12, 8)
    with torch.device("meta"):
        big = timm.create_model("rsmamba_base", img_size=384)
    assert big.pos_embed.shape == (1, 48 * 48, 192)


def test_corner_padding_adds_zeros_at_the_bottom_and_right():
    model, x = small(img_size=(60, 43)), torch.randn(1, 3, 60, 43)
    padded = torch.zeros(1, 3, 72, 56)
    padded[:, :, :60, :43] = x
    proj = model.patch_embed.proj
    expected = torch.nn.functional.conv2d(padded, proj.weight, stride=8).permute(0, 2, 3, 1)
    assert expected.shape[1:3] == (8, 6) == model.patch_embed.grid_size
    assert torch.equal(model.patch_embed(x), expected)


@pytest.mark.parametrize("pool", ["avg", "token", ""])
@pytest.mark.parametrize(("position", "place"), [("head", 0), ("middle", 12), ("tail", 25)])
def test_class_token_positions(position, place, pool):
    """25 patches: the official code reads index 13 for the middle, which is a patch; the token is at 12."""
    model = small(cls_position=position, global_pool=pool, img_size=40, pos_embed="none")
    tokens = model.forward_features(torch.randn(2, 3, 40, 40))
    patches = torch.cat([tokens[:, :place], tokens[:, place + 1 :]], 1)
    expected = {"avg": lambda: model.fc_norm(patches.mean(1)), "token": lambda: tokens[:, place], "": lambda: tokens}
    assert_close(pool, model.forward_head(tokens, pre_logits=True), expected[pool](), 1e-6)
    with torch.no_grad():
        model.cls_token.fill_(7.0)
        embedded, _ = model._embed(torch.zeros(1, 3, 40, 40))
    assert bool((embedded[0, place] == 7).all()) and float(embedded.abs().sum()) == 7 * 32


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="image is 32x64, the model was built for 64x64.*dynamic_img_size=True"):
        small()(torch.randn(1, 3, 32, 64))
    with pytest.raises(ValueError, match="cls_position='double': allowed are 'none', 'head'"):
        small(cls_position="double")
    with pytest.raises(ValueError, match="paths='backward': allowed are 'forward', 'reverse', 'shuffle'"):
        small(paths=("forward", "backward"))
    with pytest.raises(ValueError, match="paths='forward': give a list"):
        small(paths="forward")
    with pytest.raises(ValueError, match="one or more different paths"):
        small(paths=("forward", "forward"))
    with pytest.raises(ValueError, match="merge='sum': allowed are 'gate', 'mean'"):
        small(merge="sum")
    with pytest.raises(ValueError, match="shuffle_draws=0: at least 1"):
        small(shuffle_draws=0)
    with pytest.raises(ValueError, match="global_pool='token' needs a class token"):
        small(global_pool="token")
    with pytest.raises(ValueError, match="pos_embed='fourier': allowed are 'learned', 'sine', 'none'"):
        small(pos_embed="fourier")
    with pytest.raises(ValueError, match="needs an embed_dim that 4 divides, not 30"):
        small(pos_embed="sine", embed_dim=30)
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"shuffle_paths gave a table \(3, 5\), expected \(3, 64\)"):
        small(shuffle_paths=lambda depth, length: torch.zeros(depth, 5, dtype=torch.int64))(x)
    with pytest.raises(ValueError, match=r"paths\[0\] is not a permutation of the 64"):
        small(shuffle_paths=lambda depth, length: torch.zeros(depth, length, dtype=torch.int64))(x)
    with pytest.raises(TypeError, match="positional"):
        RSMamba(64, 16, 8)


def test_features():
    model = small(depth=5, dynamic_img_size=True, cls_position="middle")
    final, maps = model.forward_intermediates(
        torch.randn(2, 3, 64, 96), indices=[1, 4], norm=True, return_prefix_tokens=True
    )
    assert [tuple(m.shape) for m, _ in maps] == [(2, 32, 8, 12)] * 2 and maps[0][1].shape == (2, 1, 32)
    patches = torch.cat([final[:, :48], final[:, 49:]], 1)
    assert_close("last map", maps[1][0].flatten(2).transpose(1, 2), patches, 1e-6)
    assert_close("class token", maps[1][1][:, 0], final[:, 48], 1e-6)
    backbone = timm.create_model("test_rsmamba", features_only=True, out_indices=(1, 3), dynamic_img_size=True)
    assert backbone.feature_info.reduction() == [16, 16] and backbone.feature_info.channels() == [32, 32]
    assert [tuple(m.shape) for m in backbone(torch.randn(1, 3, 80, 48))] == [(1, 32, 5, 3)] * 2
    x = torch.randn(1, 3, 64, 64)
    before = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1] and len(model.blocks) == 2
    after = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert torch.equal(before, after), "a block's random path does not depend on how many there are"


@pytest.mark.parametrize("pos_embed", ["learned", "none"])
def test_residual_stream_is_float32_under_autocast(pos_embed):
    model, seen = small(pos_embed=pos_embed), []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    model.blocks[1].mixer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)]
    assert_close("bf16 logits", out.float(), expected, 0.03)


def test_training_compiles_with_its_random_path():
    model, x = small(depth=2).train(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = model(x)
    torch.manual_seed(2)
    out = compiled(x)
    assert_close("logits", out, expected, 1e-6)
    assert not torch.allclose(out, compiled(x)), "a compiled model draws for each pass too"


def test_one_scan_a_block():
    model, x = small(depth=2), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    scans = [node for node in program.graph.nodes if "vision_mamba.selective_scan" in str(node.target)]
    assert len(scans) == 2


def test_pooling_changes_with_the_classifier():
    model, x = small(), torch.randn(2, 3, 64, 64)
    model.reset_classifier(5, "")
    assert model(x).shape == (2, 64, 5) and isinstance(model.fc_norm, torch.nn.Identity)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5) and isinstance(model.fc_norm, torch.nn.LayerNorm)
    assert "pre_norm" in str(timm.models.group_parameters(model, model.group_matcher())[0])
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
