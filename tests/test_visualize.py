"""Receptive fields and activation maps of models whose answer is known, and the tool on a real checkpoint."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.conftest import assert_close
from vision_mamba.engine import visualize
from vision_mamba.engine.checkpoint import FORMAT
from vision_mamba.models.vim import VisionMamba
from vision_mamba.paths import scan_paths

TOOL = Path(__file__).parents[1] / "tools" / "visualize.py"


class Convolution(torch.nn.Module):
    """Two 3x3 convolutions and a mean: the field is at most 5x5 pixels, and Grad-CAM has a closed form."""

    feature_info = [dict(module="features", num_chs=4, reduction=1)]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1))
        self.head = torch.nn.Linear(4, 5)

    def forward_intermediates(self, x, indices=None, intermediates_only=True):
        return [self.features(x)]

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def images(n=3, height=24, width=32):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_receptive_field_of_convolutions():
    model, x = Convolution(), images()
    field = visualize.receptive_field(model, x, batch_size=2)
    assert field.shape == (24, 32)
    inside = torch.zeros(24, 32, dtype=torch.bool)
    inside[10:15, 14:19] = True
    assert bool((field[inside] > 0).all()) and not field[~inside].any()
    # One pixel by finite differences, image by image.
    expected = 0.0
    for image in x.double():
        for channel in range(3):
            responses = []
            for step in (-1e-5, 1e-5):
                moved = image.clone()
                moved[channel, 11, 15] += step
                feature = model.double().features(moved[None])[0, :, 12, 16]
                responses.append(feature.clamp_min(0).sum())
            expected += abs(float(responses[1] - responses[0]) / 2e-5)
    assert float(field[11, 15]) == pytest.approx(expected / 3, rel=1e-4)


def test_central_share():
    field = torch.zeros(10, 20)
    field[4:6, 9:11] = 1.0
    assert visualize.central_share(field, 0.99) == 0.15  # 3 of 20 columns go with 2 of 10 rows
    assert visualize.central_share(torch.ones(10, 10), 0.5) == 0.8  # 64 of 100
    assert visualize.central_share(torch.ones(10, 10), 1.0) == 1.0


def test_grad_cam_in_closed_form():
    model, x = Convolution(), images()
    maps, classes, probabilities = visualize.grad_cam(model, x, torch.tensor([4, 0, 2]))
    features = model.features(x)
    for i, c in enumerate((4, 0, 2)):  # the mean makes each channel's gradient its weight over the number of pixels
        heat = torch.einsum("c,chw->hw", model.head.weight[c], features[i]).clamp_min(0)
        assert_close("map", maps[i], heat / heat.max(), 1e-5)
        assert float(probabilities[i]) == pytest.approx(float(model(x)[i].softmax(0)[c]), rel=1e-5)
    assert classes.tolist() == [4, 0, 2]
    assert torch.equal(visualize.grad_cam(model, x)[1], model(x).argmax(1))


OTHERS = {
    "vim_middle": lambda: VisionMamba(64, embed_dim=32, depth=3, num_classes=5),
    "vim_registers": lambda: VisionMamba(
        64, embed_dim=32, depth=3, num_classes=5, num_registers=3, cls_position="none"
    ),
    "vim_mean": lambda: VisionMamba(64, embed_dim=32, depth=3, num_classes=5, cls_position="none", global_pool="avg"),
    "vmamba": lambda: timm.create_model("test_vmamba", num_classes=5),
    "rsmamba": lambda: timm.create_model("test_rsmamba", num_classes=5),
    "vit": lambda: timm.create_model("test_vit", num_classes=5, img_size=64),
    "resnet": lambda: timm.create_model("test_resnet", num_classes=5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_grad_cam_of_every_kind_of_model(name):
    """A channel's weight is the slope of the score as the channel moves on all patches at once."""
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    x, target = images(2, 64, 64), torch.tensor([1, 3])
    maps, _, _ = visualize.grad_cam(model, x, target)
    class_tokens = dict(vim_middle=[8], vim_registers=[4, 9, 14], vit=[0]).get(name, [])
    level = len(model.feature_info) - (2 if class_tokens else 1)
    features = model.forward_intermediates(x, indices=[level], intermediates_only=True)[0]
    shift = torch.zeros(features.shape[1], requires_grad=True)

    def move(module, args, output):
        if output.shape == features.shape:
            return output + shift[:, None, None]
        moved = output + shift
        return torch.stack([(output if i in class_tokens else moved)[:, i] for i in range(output.shape[1])], 1)

    with model.get_submodule(model.feature_info[level]["module"]).register_forward_hook(move):
        scores = model(x)
        slopes = torch.stack(
            [torch.autograd.grad(scores[i, c], shift, retain_graph=True)[0] for i, c in enumerate(target)]
        )
    heat = torch.einsum("bc,bchw->bhw", slopes, features).clamp_min(0)
    heat = heat / heat.flatten(1).amax(1)[:, None, None]
    heat = torch.nn.functional.interpolate(heat[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    assert_close("maps", maps, heat, 1e-4)
    norms = visualize.feature_norm(model, x)
    assert norms.shape == (2, 64, 64) and float(norms.min()) >= 0 and float(norms.max()) <= 1


def test_pictures_are_what_was_normalised():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    tensor = torch.from_numpy(pixels / 255).permute(0, 3, 1, 2)
    normalised = (tensor - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(std).reshape(1, 3, 1, 1)
    assert np.abs(visualize.displayable(normalised, mean, std) - pixels / 255).max() < 1e-6
    bands = visualize.displayable(torch.randn(2, 2, 8, 9) * 100, (3000.0, 10.0), (50.0, 1.0))
    assert bands.shape == (2, 8, 9, 3) and bands.min() == 0 and bands.max() == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file as tools/train.py writes it, of a model with registers along a Hilbert curve."""
    args = dict(num_classes=2, in_chans=3, img_size=32, paths="hilbert", num_registers=2, cls_position="none")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "best.pth"
    data_config = dict(input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", crop_pct=1.0)
    torch.save(
        dict(
            format=FORMAT,
            arch="test_vim",
            model_args=args,
            classes=["car", "tree"],
            data_config=data_config,
            state_dict=timm.create_model("test_vim", **args).state_dict(),
        ),
        path,
    )
    return path


def run(*arguments, capsys):
    """Exit code, stdout and stderr of the tool."""
    argv, sys.argv = sys.argv, [str(TOOL), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = argv
    return ended.value.code, *capsys.readouterr()


def check_png(path, least):
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) >= least
        assert np.asarray(picture.convert("L")).std() > 5


def test_tool_draws_paths(tmp_path, capsys):
    out = tmp_path / "deep" / "paths.png"
    code, stdout, _ = run("paths", "--out", out, "--names", "snake", "local2_reverse", "--grid", 3, 5, capsys=capsys)
    assert code == 0 and f"wrote {out}: 2 paths over 3 x 5 tokens" in stdout
    check_png(out, 200)
    assert [p.name for p in out.parent.iterdir()] == ["paths.png"]
    code, _, stderr = run("paths", "--out", out, "--names", "snak", capsys=capsys)
    assert code == 2 and "error: unknown scan path 'snak'; known are raster" in stderr
    code, _, stderr = run("paths", "--out", out, "--image", tmp_path / "none.jpg", capsys=capsys)
    assert code == 2 and "none.jpg" in stderr


def test_tool_draws_a_line_through_the_path(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(visualize, "save_figure", lambda figure, path: drawn.append(figure))
    visualize.plot_paths(Image.new("RGB", (4, 4)), ("hilbert", "column"), (4, 3), tmp_path / "x.png")
    for axes, name in zip(drawn[0].axes, ("hilbert", "column"), strict=True):
        segments = np.array(axes.collections[0].get_segments())
        path = scan_paths((name,), 4, 3)[0].numpy()
        places = np.stack([path % 3, path // 3], 1)
        assert np.array_equal(segments[:, 0], places[:-1]) and np.array_equal(segments[:, 1], places[1:])
        steps = np.abs(np.diff(places, axis=0)).sum(1).mean()
        assert axes.get_title() == f"{name}\nmean step {steps:.2f}"


def test_tool_on_a_checkpoint(checkpoint, tmp_path, capsys):
    code, stdout, stderr = run("erf", checkpoint, "--device", "cpu", capsys=capsys)
    out = checkpoint.parent / "erf.png"
    assert (code, stderr) == (0, "") and f"wrote {out}: mean over 12 images" in stdout
    assert "random weights: share of the gradient" in stdout and "checkpoint: share of the gradient" in stdout
    check_png(out, 300)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(photo)
    for extra in ((), ("--class", "tree"), ("--norms",)):
        out = tmp_path / f"cam{len(extra)}.png"
        code, stdout, _ = run("cam", checkpoint, "--images", photo, photo, "--out", out, *extra, capsys=capsys)
        assert code == 0 and f"wrote {out}: 2 images" in stdout
        check_png(out, 200)
    wrong = {
        (
            "cam",
            checkpoint,
            "--class",
            "treee",
        ): "--class 'treee' is none of the model's 2 classes; did you mean 'tree'",
        ("cam", checkpoint, "--class", "tree", "--norms"): "--norms are of no class",
        ("cam", checkpoint, "--images", tmp_path / "none.png"): "none.png",
        ("erf", tmp_path / "none.pth"): "does not exist",
        ("erf", checkpoint, "--batch-size", 0): "--batch-size must be at least 1",
    }
    for arguments, message in wrong.items():
        code, _, stderr = run(*arguments, capsys=capsys)
        assert code == 2 and message in stderr
