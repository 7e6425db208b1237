"""Vim's options beyond the official Vim: scan paths, registers (against the official Mamba-R), attention."""

import json

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import get_graph_node_names

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.models.golden import FOLDER
from vision_mamba.layers import SS2D
from vision_mamba.models.vim import AttentionMixer, VisionMamba, cls_positions
from vision_mamba.paths import scan_paths

ALL_OPTIONS = dict(paths="hilbert", num_registers=3, cls_position="none", register_reduction=2, attn_every=2)


def small(**kwargs):
    torch.manual_seed(0)
    return VisionMamba(**{**dict(img_size=64, embed_dim=32, depth=4, num_classes=10), **kwargs}).eval()


def image(height=64, width=64):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [dict(), dict(cls_position="head"), dict(cls_position="double"), dict(img_size=80)])
def test_default_tables_are_those_of_the_sequence(options):
    model = small(**options)
    x, grid = model._embed(image(*model.patch_embed.img_size))
    forward = torch.arange(x.shape[1], dtype=torch.int32)
    for table in model._paths(x, grid):
        assert table.dtype == torch.int32 and torch.equal(table, torch.stack([forward, forward.flip(0)]))


#  A 3 x 4 grid:  0  1  2  3
#                 4  5  6  7
#                 8  9 10 11
ORDERS = {
    "snake": [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11],
    "local2_column": [0, 4, 1, 5, 8, 9, 2, 6, 3, 7, 10, 11],
    "antidiagonal": [0, 1, 4, 2, 5, 8, 3, 6, 9, 7, 10, 11],
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("position, tokens", [("middle", [6]), ("double", [0, 13]), ("none", []), (3, [3, 7, 11])])
def test_a_path_is_raster_order_of_permuted_tokens(name, position, tokens):
    registers = position if isinstance(position, int) else 0
    options = dict(img_size=(48, 64), num_registers=registers, cls_position="none" if registers else position)
    options["global_pool"] = "token" if tokens else "avg"
    model, raster = small(paths=name, **options), small(**options)
    raster.load_state_dict(model.state_dict())
    # The order of the sequence by hand: patches in the path's order, class tokens in their own places.
    patches = iter(ORDERS[name])
    places = [i for i in range(12 + len(tokens)) if i not in tokens]
    order = torch.tensor([i if i in tokens else places[next(patches)] for i in range(12 + len(tokens))])
    x, grid = model._embed(image(48, 64))
    permuted = raster._walk(x[:, order], raster._paths(x, grid))
    expected = torch.empty_like(permuted)
    expected[:, order] = permuted
    assert_close("tokens", model.forward_features(image(48, 64)), expected, 1e-6)
    assert not torch.allclose(raster.forward_features(image(48, 64)), expected, atol=1e-3)


@pytest.mark.parametrize("name", ORDERS)
def test_ss2d_along_a_path_is_raster_order_of_permuted_tokens(name):
    torch.manual_seed(0)
    mixer, raster = SS2D(8, d_state=4, paths=(name, f"{name}_reverse")), SS2D(8, d_state=4, paths=("raster", "reverse"))
    raster.load_state_dict(mixer.state_dict())
    tokens, order = torch.randn(2, 12, 8), torch.tensor(ORDERS[name])
    expected = torch.empty_like(tokens)
    expected[:, order] = raster.scan(tokens[:, order], 3, 4)
    assert_close("tokens", mixer.scan(tokens, 3, 4), expected, 1e-6)


def test_one_name_expands():
    assert small(paths="snake").path_names == ("snake", "snake_reverse")
    assert small(paths="snake", bimamba_type="none").path_names == ("snake",)
    model = small(paths=["hilbert", "local2_column", "diagonal_reverse"])
    assert model.blocks[0].mixer.A_log.shape[0] == 3 and model(image()).shape == (2, 10)
    names = ("snake", "snake_column", "snake_reverse", "snake_column_reverse")
    assert timm.create_model("test_vmamba", paths="snake").stages[0].blocks[0].mixer.path_names == names
    model = timm.create_model("test_vmamba", paths=("hilbert", "morton")).eval()
    assert model.num_paths == 2 and model(image()).shape == (2, 1000)


def test_pairs_walk_the_named_path_and_back():
    model, raster = small(paths="snake", if_bidirectional=True), small(if_bidirectional=True)
    raster.load_state_dict(model.state_dict())
    order = scan_paths(("snake",), 4, 4, inserted=(8,))[0].long()
    x, grid = model._embed(image())
    expected = torch.empty_like(x)
    expected[:, order] = raster._walk(x[:, order], raster._paths(x, grid))
    assert_close("tokens", model.forward_features(image()), expected, 1e-6)


REGISTERS = json.loads((FOLDER / "vim_registers.json").read_text())


@pytest.mark.parametrize("case", REGISTERS["cases"], ids=[c["id"] for c in REGISTERS["cases"]])
def test_registers_agree_with_official(case):
    args = {**REGISTERS["common_args"], **case["args"]}
    model = VisionMamba(
        **{k: v for k, v in args.items() if k not in ("num_cls_tokens", "cls_reduce")},
        num_registers=args["num_cls_tokens"],
        register_reduction=args.get("cls_reduce", 1),
        cls_position="none",
    )
    model = model.double().eval()
    state = {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}
    vision_mamba.load_checkpoint(model, state)
    x = torch.from_numpy(recipe.make_input(case["input"]["shape"], case["input"]["seed"])).double().requires_grad_()
    out = model(x)
    (out * torch.from_numpy(recipe.loss_weights(0, out.shape))).sum().backward()
    assert_close("logits", out, torch.tensor(case["out"], dtype=torch.float64), 2e-6)
    assert float(x.grad.norm()) == pytest.approx(case["input_grad_l2"], rel=1e-5)
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert total == pytest.approx(case["all_params_grad_l2"], rel=1e-5)


def test_registers_stand_evenly():
    assert cls_positions(12, 196) == tuple(15 + 16 * i for i in range(12))
    assert cls_positions(3, 16) == (4, 9, 14) and cls_positions(1, 16) == (8,)
    assert cls_positions(5, 3) == (0, 1, 2, 3, 4)


def test_pooling_of_registers_can_change():
    model = small(num_registers=4, cls_position="none", register_reduction=2, in_chans=5)
    x = torch.randn(2, 5, 64, 64)
    assert model.head_hidden_size == model.head.in_features == 64 and model.num_features == 32
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 64)
    model.reset_classifier(3, "avg")
    assert model.head_hidden_size == 32 and model(x).shape == (2, 3)
    assert not any("neck" in name for name in model.state_dict())
    model.reset_classifier(7, "token")
    assert model(x).shape == (2, 7) and model.neck.weight.shape == (16, 32)
    features, maps = model.forward_intermediates(x, indices=[3], norm=True, return_prefix_tokens=True)
    assert features.shape == (2, 20, 32) and maps[0][0].shape == (2, 32, 4, 4) and maps[0][1].shape == (2, 4, 32)
    assert torch.equal(maps[0][1], features[:, [3, 7, 11, 15]])
    model.set_input_size((96, 64))
    assert model.pos_embed.shape == (1, 28, 32) and model(torch.randn(1, 5, 96, 64)).shape == (1, 7)


def test_attention_sees_all_tokens_in_its_place():
    model = small(embed_dim=128, depth=5, attn_every=2)
    assert [isinstance(block.mixer, AttentionMixer) for block in model.blocks] == [False, True, False, True, False]
    mixer = model.blocks[1].mixer
    x = torch.randn(2, 17, 128)
    q, k, v = (t.unflatten(-1, (2, 64)).transpose(1, 2) for t in mixer.qkv(x).chunk(3, -1))
    expected = mixer.proj(((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2))
    table = scan_paths(("raster", "reverse"), 1, 17)
    assert_close("attention", mixer(x, table), expected, 1e-5)
    assert_close("block", model.blocks[1](x, table), x + mixer(model.blocks[1].norm(x), table), 1e-6)
    kinds = [isinstance(block.mixer, AttentionMixer) for block in small(depth=16, attn_every=8).blocks]
    assert [i for i, attends in enumerate(kinds) if attends] == [4, 12]


@pytest.mark.parametrize("options", [dict(paths="hilbert"), ALL_OPTIONS], ids=["path", "all"])
def test_contract(options):
    model, x = small(**options), image()
    tracer = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    _, nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    graph = create_feature_extractor(model, return_nodes=[nodes[-1]])
    assert torch.equal(graph(x)[nodes[-1]], model(x))
    assert_close("exported", torch.export.export(model, (x,)).module()(x), model(x), 1e-6)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    model.train()(x).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="unknown scan path 'snak'; known are raster"):
        small(paths="snak")
    with pytest.raises(ValueError, match="unknown scan path 'snak'; known are raster"):
        timm.create_model("test_vmamba", paths="snak")
    with pytest.raises(ValueError, match=r"paths=\('snake', 'hilbert'\): bimamba_type='none'.*takes 1 of them"):
        small(paths=("snake", "hilbert"), bimamba_type="none")
    with pytest.raises(ValueError, match="num_registers=3 replace the class token: set cls_position='none'"):
        small(num_registers=3)
    with pytest.raises(ValueError, match="register_reduction=2 needs registers"):
        small(register_reduction=2)
    with pytest.raises(ValueError, match="attn_every and if_bidirectional exclude"):
        small(attn_every=2, if_bidirectional=True)
    with pytest.raises(ValueError, match="embed_dim=200 is no multiple of 3"):
        small(attn_every=2, embed_dim=200)
