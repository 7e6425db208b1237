"""VideoMamba: official numbers of images and clips, scan orders, official weights, timm's contract for clips."""

import json

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import get_graph_node_names

import vision_mamba
from tests.conftest import assert_close
from tests.golden import recipe
from tests.golden.make_videomamba_options import from_official_arguments
from tests.models.golden import FOLDER, check_case, load_case
from vision_mamba import checkpoint
from vision_mamba.models.videomamba import SCANS, VideoMamba, VideoMambaImage

OPTIONS = json.loads((FOLDER / "videomamba_options.json").read_text())


def image_model(**kwargs):
    torch.manual_seed(0)
    return VideoMambaImage(**{**dict(img_size=64, embed_dim=32, depth=4, num_classes=10), **kwargs}).eval()


def clip_model(**kwargs):
    torch.manual_seed(0)
    args = dict(img_size=64, num_frames=4, embed_dim=32, depth=4, num_classes=10)
    return VideoMamba(**{**args, **kwargs}).eval()


def clip(frames=4, height=64, width=64, channels=3):
    return torch.randn(2, channels, frames, height, width, generator=torch.Generator().manual_seed(1))


def official(case):
    return {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}


def of_case(case):
    return from_official_arguments({**OPTIONS["common_args"], **case["args"]})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_images_agree_with_official(dtype, tolerance):
    check_case(load_case("videomamba_image_tinycfg"), image_model(), tolerance=tolerance, dtype=dtype)


@pytest.mark.parametrize("case", OPTIONS["cases"], ids=[c["id"] for c in OPTIONS["cases"]])
def test_clips_agree_with_official(case):
    check_case(case, of_case(case), tolerance=1e-8, dtype=torch.float64)


def test_clips_agree_with_official_in_float32():
    check_case(OPTIONS["cases"][0], of_case(OPTIONS["cases"][0]), tolerance=1e-5)


@pytest.mark.gpu
def test_agrees_with_official_on_gpu():
    check_case(load_case("videomamba_image_tinycfg"), image_model(), tolerance=1e-4, device="cuda")
    check_case(OPTIONS["cases"][0], of_case(OPTIONS["cases"][0]), tolerance=1e-4, device="cuda")


def test_image_weights_inflate_as_officially():
    case = OPTIONS["inflated"]
    model = of_case(case).double().eval()
    report = vision_mamba.load_checkpoint(model, {"model": official(case)})
    assert not report.problems() and not report.adapted
    x = torch.from_numpy(recipe.make_input(case["input"]["shape"], case["input"]["seed"])).double()
    assert_close("logits", model(x), torch.tensor(case["out"], dtype=torch.float64), 1e-10)


def test_published_parameter_counts():
    counts = {"videomamba_tiny": 7, "videomamba_small": 26, "videomamba_middle": 74, "videomamba_base": 98}
    for name, millions in counts.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions, name


@pytest.mark.parametrize("scan", SCANS)
def test_scan_orders(scan):
    steps, rows, columns = 3, 2, 4
    tokens = [(t, n) for t in range(steps) for n in range(rows * columns)]  # token i is 1 + its place here
    orders = {"spatial": sorted(tokens), "temporal": sorted(tokens, key=lambda token: token[::-1])}
    # The class token comes first, and last on the way back.
    spatial, temporal = ([0, *(1 + tokens.index(token) for token in orders[k])] for k in ("spatial", "temporal"))
    expected = {
        "spatial": [spatial, spatial[::-1]],
        "temporal": [temporal, temporal[::-1]],
        "spatiotemporal_v1": [spatial, temporal[::-1]],
        "spatiotemporal_v2": [spatial, spatial[::-1], temporal, temporal[::-1]],
    }[scan]
    model = clip_model(scan=scan, num_frames=steps, img_size=(32, 64))
    x, grid = model._embed(clip(frames=steps, height=32))
    tables = model._paths(x, grid)
    assert len(tables) == len(model.blocks) and grid == (steps, rows, columns)
    assert all(table.tolist() == expected for table in tables)


def test_temporal_first_is_the_spatial_scan_of_reordered_tokens():
    """The same mixers along other paths: what the authors call another order of the tensor (their issue 105)."""
    spatial, temporal = clip_model().double(), clip_model(scan="temporal").double()
    x, grid = temporal._embed(clip().double())
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(64).view(4, 16).t().flatten()])
    # Sixteen steps of four tokens each.
    reordered = spatial._walk(x[:, order], spatial._paths(x, (16, 2, 2)))
    assert_close("tokens", temporal._walk(x, temporal._paths(x, grid))[:, order], reordered, 1e-12)


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_trains_every_parameter(scan):
    model = clip_model(scan=scan, tubelet_size=2, layer_scale=0.5, drop_path_rate=0.1).train()
    model(clip()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.blocks[0].mixer.A_log.shape[0] == len(SCANS[scan])


def test_time_steps_matter_only_by_position_and_order():
    """Equal frames without temporal positions give every time step the same embedding; with them, not."""
    model = clip_model()
    still = clip(frames=1).expand(-1, -1, 4, -1, -1)
    tokens, grid = model._embed(still)
    assert grid == (4, 4, 4)
    steps = tokens[:, 1:].unflatten(1, (4, 16))
    assert_close("steps", steps, steps[:, :1].expand_as(steps), 1e-6)
    torch.nn.init.normal_(model.temporal_pos_embedding)
    with_positions = model._embed(still)[0]
    added = with_positions[:, 1:].unflatten(1, (4, 16)) - steps
    assert_close("positions", added[0, :, 3], model.temporal_pos_embedding[0], 1e-5)
    assert torch.equal(with_positions[:, 0], tokens[:, 0])  # the class token has no time


def test_heads_of_teachers_are_left_out():
    model = image_model()
    extra = {"distill_head.1.weight": torch.zeros(8, 32), "clip_decoder.0.head.bias": torch.zeros(4)}
    report = vision_mamba.load_checkpoint(
        model, {"model": {**official(load_case("videomamba_image_tinycfg")), **extra}}
    )
    assert not report.problems()


def test_image_weights_in_a_clip_model_of_another_task():
    state = official(load_case("videomamba_image_tinycfg"))
    model = clip_model(tubelet_size=2, num_classes=3, in_chans=5, img_size=(64, 96))
    with pytest.warns(UserWarning, match="head has another class count"):
        report = vision_mamba.load_checkpoint(model, state)
    assert set(report.adapted) == {"patch_embed.proj.weight", "head.weight", "head.bias"}
    kernel = model.patch_embed.proj.weight
    assert kernel.shape == (32, 5, 2, 16, 16) and not kernel[:, :, 0].any()
    assert_close("middle", kernel[:, :2, 1], state["patch_embed.proj.weight"][:, :2] * 3 / 5, 1e-6)
    assert not model.temporal_pos_embedding.any()
    assert model(clip(channels=5, width=96)).shape == (2, 3)


def test_temporal_positions_are_resampled():
    source, target = clip_model(num_frames=2), clip_model(num_frames=4, img_size=32)
    with torch.no_grad():
        source.temporal_pos_embedding.copy_(torch.tensor([1.0, 3.0]).view(1, 2, 1))
    vision_mamba.load_checkpoint(target, source.state_dict())
    assert target.temporal_pos_embedding[0, :, 0].tolist() == [1.0, 1.5, 2.5, 3.0]
    assert target(clip(height=32, width=32)).shape == (2, 10)


def test_released_models_are_of_the_official_files():
    names = timm.list_models("videomamba*", pretrained=True)
    assert len(names) == 56
    for name in names:
        cfg = timm.models.get_pretrained_cfg(name)
        file = cfg.hf_hub_filename or cfg.url.rsplit("/")[-1]
        size, _, rest = name.removeprefix("videomamba_").partition(".opengvlab_")
        size, _, frames = size.partition("_f")
        assert file.startswith(f"videomamba_{size[0]}16_") and ("mask" in file) == ("mask" in rest)
        assert (f"_f{frames}_" in file) if frames else ("in1k" in file and "in1k" in rest)
        assert file.endswith(f"{cfg.input_size[-1]}.pth") and len(cfg.input_size) == 3


def test_clip_contract():
    model = timm.create_model("test_videomamba_f4", num_classes=7, in_chans=4, dynamic_img_size=True).eval()
    x = clip(channels=4, width=96)
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 4
    features = model.forward_features(x)
    assert features.shape == (2, 1 + 4 * 4 * 6, 32) and torch.equal(model.forward_head(features), model(x))
    final, maps = model.forward_intermediates(x, indices=[1, 3], norm=True, return_prefix_tokens=True)
    assert torch.equal(final, features) and [tuple(m.shape) for m, _ in maps] == [(2, 32, 4, 4, 6)] * 2
    assert torch.equal(maps[1][0].flatten(2).transpose(1, 2), final[:, 1:])
    assert torch.equal(maps[1][1], final[:, :1])
    backbone = timm.create_model("test_videomamba_f4", features_only=True, out_indices=(0, 2))
    assert [tuple(m.shape) for m in backbone(clip())] == [(2, 32, 4, 4, 4)] * 2
    assert "temporal_pos_embedding" in model.no_weight_decay()
    layers = timm.models.group_parameters(model, model.group_matcher())
    assert "temporal_pos_embedding" in layers[0]
    model.reset_classifier(5, "avg")
    assert_close("avg", model.forward_head(features, pre_logits=True), features[:, 1:].mean(1), 1e-6)
    model.set_input_size(32)
    assert model(clip(channels=4, height=32, width=32)).shape == (2, 5)


def test_clip_gradient_checkpointing_changes_nothing():
    gradients = []
    for enable in (False, True):
        model = clip_model().train()
        model.set_grad_checkpointing(enable)
        model(clip()).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_clip_fx_export_and_meta():
    model, x = clip_model(scan="spatiotemporal_v2"), clip()
    tracer = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    _, nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    graph = create_feature_extractor(model, return_nodes=[nodes[-1]])
    assert torch.equal(graph(x)[nodes[-1]], model(x))
    program = torch.export.export(model, (x,))
    assert_close("exported", program.module()(x), model(x), 1e-6)
    with torch.device("meta"):
        assert clip_model()(torch.empty(1, 3, 4, 64, 64)).shape == (1, 10)


def test_official_initialisation():
    for model in (image_model(embed_dim=64), clip_model(embed_dim=64, scan="spatiotemporal_v2")):
        mixer = model.blocks[1].mixer
        assert not mixer.dt_proj_bias.any() and not model.cls_token.any() and model.pos_embed.any()
        for weight in (mixer.in_proj.weight, mixer.x_proj_weight, mixer.dt_proj_weight):
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        bound = (
            64**-0.5 / 2**0.5 / 4**0.5
        )  # kaiming_uniform with a = sqrt(5) is 1 / sqrt(fan_in = 128), over sqrt(depth)
        assert float(mixer.out_proj.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"input is \(2, 3, 64, 64\), the model takes clips .*4 frames"):
        clip_model()(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"input is \(2, 3, 5, 64, 64\).*num_frames="):
        clip_model()(clip(frames=5))
    with pytest.raises(ValueError, match="image is 64x96, the model was built for 64x64"):
        clip_model()(clip(width=96))
    with pytest.raises(ValueError, match="num_frames=4 is no multiple of tubelet_size=3"):
        clip_model(tubelet_size=3)
    with pytest.raises(ValueError, match="scan='time': allowed are 'spatial'"):
        clip_model(scan="time")
    with pytest.raises(TypeError, match="bimamba_type"):
        clip_model(bimamba_type="none")


def test_checkpoint_of_another_tubelet_is_refused():
    with pytest.raises(ValueError, match=r"misshapen: patch_embed\.proj\.weight \(32, 3, 1, 16, 16\) for"):
        checkpoint.load_checkpoint(clip_model(tubelet_size=2, num_frames=8), clip_model().state_dict())
