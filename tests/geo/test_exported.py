"""Exported segmentation models on scenes: .pt2 and .onnx give what the model itself gives."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vision_mamba  # noqa: F401  # registers the models

pytest.importorskip("rasterio", reason="needs the extra geo (rasterio)")

from tests.conftest import assert_close
from vision_mamba.data import open_dataset
from vision_mamba.engine.export import export_model
from vision_mamba.errors import UserError
from vision_mamba.geo import Segmentor, load_exported, segment_raster

ROOT = Path(__file__).parents[2]
ABOUT = dict(classes=["field", "forest", "water"], mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])


class Network(torch.nn.Module):
    """A backbone of ours and one convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = timm.create_model("test_vmamba", features_only=True, out_indices=(0,), depths=(1, 1, 1, 1))
        self.head = torch.nn.Conv2d(self.backbone.feature_info.channels()[0], 3, 1)

    def forward(self, x):
        return self.head(self.backbone(x)[0])


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_same_probabilities(kind, tmp_path):
    if kind == "onnx":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs the extra export ({package})")
    network, path = Network().eval(), tmp_path / f"m.{kind}"
    export_model(network, path, input_size=(3, 64, 96), about=ABOUT)
    found = load_exported(path)
    assert found.classes == ABOUT["classes"]
    assert found.mean == pytest.approx([102, 127.5, 153]) and found.std == pytest.approx([51, 63.75, 76.5])
    windows = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = Segmentor(model=network, classes=["a", "b", "c"], mean=[0.0] * 3, std=[1.0] * 3).probabilities(
            windows
        )
        assert_close("probabilities", found.probabilities(windows), expected, 1e-5)
        with pytest.raises(UserError, match="does not take images of shape"):
            found.probabilities(windows[..., :64])
    given = load_exported(path, ["x", "y", "z"], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert given.classes == ["x", "y", "z"] and given.mean == [1.0, 2.0, 3.0] and given.std == [4.0, 5.0, 6.0]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    from PIL import Image

    data, path = open_dataset("builtin", "val"), tmp_path_factory.mktemp("scene") / "scene.png"
    picture = Image.new("RGB", (192, 144))
    for i in range(12):
        picture.paste(data[40 * i][0], (48 * (i % 4), 48 * (i // 4)))
    picture.save(path)
    return path


def tool(*arguments):
    call = [sys.executable, str(ROOT / "tools" / "segment.py"), *map(str, arguments), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(call, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_scene_by_the_tool(kind, scene, tmp_path):
    """A file for any size, windows of another size than its example, views and scales: the map of the model itself."""
    if kind == "onnx":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs the extra export ({package})")
    import rasterio

    network, path = Network().eval(), tmp_path / f"m.{kind}"
    export_model(network, path, input_size=(3, 64, 64), dynamic_size=True, about=ABOUT)
    found = tool(path, "-", scene, "--out", tmp_path, "--window", 96, "--tta", "flips", "--scales", 1, 1.5)
    assert found.returncode == 0, found.stderr
    own = Segmentor(
        model=network,
        classes=ABOUT["classes"],
        mean=[255 * m for m in ABOUT["mean"]],
        std=[255 * s for s in ABOUT["std"]],
    )
    options = dict(window=96, tta="flips", scales=(1, 1.5), progress=False)
    expected = segment_raster(scene, tmp_path / "own", own, **options).files
    for name in ("classes", "confidence"):
        with rasterio.open(tmp_path / f"scene_{name}.tif") as a, rasterio.open(getattr(expected, name)) as b:
            a, b = a.read().astype(int), b.read().astype(int)
        if name == "classes":
            assert len(np.unique(b)) > 1 and (a == b).mean() > 0.9999
        else:
            assert abs(a - b).max() <= 1  # a step of 1 / 254, where rounding differs
    done = tool(path, "weights.pth", scene, "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("give - for the checkpoint, not weights.pth\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx_of_other_programs(dtype, scene, tmp_path):
    """Plain torch's own export, half precision too; what does not fit is one line."""
    onnxscript = pytest.importorskip("onnxscript", reason="needs the extra export (onnxscript)")
    pytest.importorskip("onnxruntime", reason="needs the extra export (onnxruntime)")
    assert onnxscript
    torch.manual_seed(0)
    network, path = torch.nn.Conv2d(3, 2, 3, padding=1).eval(), tmp_path / "m.onnx"
    x = torch.randn(2, 3, 16, 16)
    expected = network(x).softmax(1)
    torch.onnx.export(network.to(dtype), (x.to(dtype),), path, dynamo=True, external_data=False, verbose=False)
    given = dict(classes=["a", "b"], mean=[128.0] * 3, std=[50.0] * 3)
    assert_close(
        "probabilities", load_exported(path, **given).probabilities(x), expected, 1e-6 if dtype.itemsize == 4 else 1e-3
    )
    with pytest.raises(UserError, match=r"m\.onnx does not take images of shape \(4, 3, 16, 16\)"):
        segment_raster(scene, tmp_path, load_exported(path, **given), window=16, batch_size=4, progress=False)
    report = segment_raster(
        scene, tmp_path / "two", load_exported(path, **given), window=16, batch_size=2, progress=False
    )
    assert sum(report.pixels.values()) == 192 * 144


def test_models_that_do_not_see_pixels(tmp_path):
    network, path = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).eval(), tmp_path / "m.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3, 8, 8),)), path)
    segmentor = load_exported(path, ["a", "b"], [0.0] * 3, [1.0] * 3)
    with pytest.raises(UserError, match=r"the model gives shape \(1, 2\), not scores of pixels"):
        segmentor.probabilities(torch.zeros(1, 3, 8, 8))
    segmentor.model = lambda x: {"out": x}
    with pytest.raises(UserError, match="the model gives dict, not scores of pixels"):
        segmentor.probabilities(torch.zeros(1, 3, 8, 8))


def test_a_file_that_does_not_say_its_classes(tmp_path):
    network, path = torch.nn.Conv2d(3, 2, 1).eval(), tmp_path / "m.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3, 8, 8),)), path)
    with pytest.raises(UserError, match="m.pt2 does not say its classes and std; give --classes, --std"):
        load_exported(path, mean=[0.0] * 3)
    assert load_exported(path, ["a", "b"], [0.0] * 3, [1.0] * 3).probabilities(torch.zeros(1, 3, 8, 8)).shape[1] == 2
