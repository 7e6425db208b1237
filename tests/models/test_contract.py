"""What every family promises: timm's contract, any size, checkpointing, determinism, meta device, compile, export."""

import copy
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_weight_decay
from torchvision.models.feature_extraction import get_graph_node_names

import vision_mamba
from tests.conftest import assert_close

# A tiny model of each family, and what lets it take images of another size than its own.
MODELS = {
    "test_mambavision": dict(),
    "test_rsmamba": dict(dynamic_img_size=True),
    "test_samba": dict(),
    "test_videomamba": dict(dynamic_img_size=True),
    "test_vim": dict(dynamic_img_size=True),
    "test_vim2": dict(),
    "test_vmamba": dict(),
    "test_xt": dict(),
}
# In every family: parameters of a scan that are no matrices, biases, norms, embeddings, weights of averages.
NOT_DECAYED = ("A_log", ".D", "bias", "norm", "pos_embed", "cls_token", ".alpha", ".beta", ".theta", ".gamma")
# Scalars that weight maps which are normalised next: their gradients cancel, and float32 leaves them few digits.
CANCELLING = {"test_vim2"}

every_model = pytest.mark.parametrize("name", MODELS)


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def image(channels=3, height=64, width=64, batch=2):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@every_model
def test_head_and_features(name):
    model = create(name, num_classes=7, in_chans=4)
    x = image(4)
    assert (model.in_chans, model.num_classes) == (4, 7)
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 4
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x)) and model(x).shape == (2, 7)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity) and model(x).shape == (2, model.num_features)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("name", ["test_mambavision", "test_samba", "test_vim2", "test_vmamba"])
def test_pooling_of_two_widths(name):
    model = create(name, num_classes=5)
    model.reset_classifier(7, "catavgmax")
    features = model.forward_features(image())
    width = 2 * model.num_features
    assert model.head_hidden_size == model.forward_head(features, pre_logits=True).shape[1] == width
    assert model(image()).shape == (2, 7)
    model.reset_classifier(5, "avg")
    assert model.head_hidden_size == model.num_features and model(image()).shape == (2, 5)


@every_model
def test_new_head_is_of_the_models_device_type_and_mode(name):
    model = create(name).to(device="meta", dtype=torch.float64)
    pools = ("", "avg") if name != "test_xt" else ("avg", "token")
    for num_classes, pool in ((0, pools[0]), (2, pools[1]), (0, None), (3, None)):
        model.reset_classifier(num_classes, pool)
        tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.float64)}
        assert not any(module.training for module in model.modules())


@every_model
def test_what_is_changed_afterwards_can_be_built_again(name):
    """timm's record of a model's input and options, which its hub files carry, follows what was changed."""
    timm_input = pytest.importorskip("timm.models._input", reason="this timm keeps no such record")
    model = create(name, in_chans=4)
    height, width = 64, 64
    if hasattr(model, "set_input_size"):
        model.requires_grad_(False).set_input_size((96, 64))
        height = 96
        assert not any(p.requires_grad for p in model.parameters())
    model.reset_classifier(3, "avg")
    assert timm_input.get_model_input_config(model)["input_size"] == (4, height, width)
    again = create(name, **timm_input.get_model_args(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(image(4, height, width)), model(image(4, height, width)))
    assert create(name, in_chans=4, features_only=True).in_chans == 4


@every_model
def test_training_reaches_every_parameter(name):
    model = create(name, drop_path_rate=0.2, num_classes=5).train()
    model(image(batch=8)).square().sum().backward()  # stochastic depth may drop a block for two images
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_model
def test_decay_and_layers(name):
    model = create(name)
    decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())[1]["params"]
    decayed_ids = {id(p) for p in decayed}
    for n, p in model.named_parameters():
        assert (id(p) in decayed_ids) == (not any(part in n for part in NOT_DECAYED)), n
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse))
        assert sum(len(g) for g in groups.values()) == len(list(model.parameters())) and len(groups) > 2


@every_model
def test_features_of_any_size(name):
    model = create(name, **MODELS[name])
    backbone = create(name, features_only=True, out_indices=(0, 1), **MODELS[name])
    x = image(height=64, width=96, batch=1)
    final, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info)
    info = zip(backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True)
    sizes = [(1, chs, -(-64 // r), -(-96 // r)) for chs, r in info]
    assert [tuple(m.shape) for m in maps[:2]] == sizes
    vision_mamba.load_checkpoint(backbone, model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), maps[:2], strict=True))
    assert torch.equal(final, model.forward_features(x))
    assert model.prune_intermediate_layers([0]) == [0]
    assert torch.equal(model.forward_intermediates(x, indices=[0], intermediates_only=True)[0], maps[0])


@every_model
def test_pruned_model_ends_at_its_last_level(name):
    whole, x = create(name, drop_rate=0.5, **MODELS[name]), image(height=64, width=96)
    levels = whole.forward_intermediates(x, intermediates_only=True)
    for i, info in enumerate(whole.feature_info):
        final, early = whole.forward_intermediates(x, indices=[i], stop_early=True)
        assert torch.equal(early[0], levels[i])
        model = copy.deepcopy(whole)
        assert model.prune_intermediate_layers([i]) == [i]
        own_final, own = model.forward_intermediates(x)
        assert torch.equal(own[-1], levels[i]) and torch.equal(own_final, model.forward_features(x))
        assert torch.equal(own_final, final)
        model.reset_classifier(7, "avg")
        assert model.head_hidden_size == model.num_features == info["num_chs"]
        assert model.forward_head(own_final, pre_logits=True).shape == (2, model.num_features)
        model.train()(x).square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
    whole_again = copy.deepcopy(whole)
    whole_again.prune_intermediate_layers([len(levels) - 1], prune_head=False)
    assert torch.equal(whole_again(x), whole(x))


@every_model
def test_gradient_checkpointing_changes_nothing(name):
    gradients = []
    for enable in (False, True, "selective"):
        model = create(name).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(image()).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for n, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][n]), n
        assert torch.equal(gradient, gradients[2][n]), n
    with pytest.raises(ValueError, match="'everything': allowed are True, False and 'selective'"):
        model.set_grad_checkpointing("everything")


@every_model
def test_evaluation_is_deterministic(name):
    model = create(name, drop_path_rate=0.5, drop_rate=0.5)
    assert torch.equal(model(image()), model(image()))


@every_model
def test_builds_on_meta(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, model.num_classes)


@every_model
def test_own_checkpoint_round_trip(name, tmp_path):
    model, other = create(name), create(name)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    report = vision_mamba.load_checkpoint(other, tmp_path / "own.safetensors")
    assert not report.problems() and not report.adapted
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@every_model
def test_scan_stays_float32_under_autocast(name, monkeypatch):
    from vision_mamba import ops

    seen = []
    scan = ops.selective_scan

    def spy(u, delta, A, *args, **kwargs):
        seen.append((u.dtype, A.dtype))
        return scan(u, delta, A, *args, **kwargs)

    model = create(name)
    for module in {type(m).__module__ for m in model.modules() if type(m).__module__.startswith("vision_mamba.layers")}:
        monkeypatch.setattr(f"{module}.selective_scan", spy, raising=False)
    x = image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert seen and set(seen) == {(torch.bfloat16, torch.float32)}
    assert_close("bf16 logits", out.float(), model(x), 0.03)


# To generate code takes a minute and more a family, and is the compiler's affair once it has the graph.
COMPILES = [(name, "aot_eager") for name in MODELS]
COMPILES += [(name, "inductor") for name in ("test_vim", "test_videomamba")]


@pytest.mark.slow
@pytest.mark.parametrize("name, backend", COMPILES)
def test_compile_fullgraph(name, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch's inductor needs a C++ compiler on the CPU, and this machine has no g++")
    dtype = torch.float64 if name in CANCELLING else torch.float32
    model, x = create(name).to(dtype), image().to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_close("logits", compiled(x), model(x), 1e-6)
    parameters = dict(model.named_parameters())
    actual = torch.autograd.grad(compiled(x).square().sum(), parameters.values())
    expected = torch.autograd.grad(model(x).square().sum(), parameters.values())
    for n, a, b in zip(parameters, actual, expected, strict=True):
        assert_close(n, a, b, 1e-5)


@every_model
def test_fx(name):
    """timm's graph tracing: what looks at sizes is registered to be taken whole."""
    model, x = create(name), image()
    tracer = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    _, nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    graph = create_feature_extractor(model, return_nodes=[nodes[-1]])
    assert torch.equal(graph(x)[nodes[-1]], model(x))


@every_model
def test_export(name):
    model, x = create(name), image()
    program = torch.export.export(model, (x,))
    assert_close("exported", program.module()(x), model(x), 1e-6)
    assert any("vision_mamba.selective_scan" in str(node.target) for node in program.graph.nodes)
