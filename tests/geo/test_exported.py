"""Exported segmentation models on scenes: .pt2 and .onnx give what the model itself gives."""

import pytest
import timm
import torch

import vision_mamba  # noqa: F401  # registers the models

pytest.importorskip("rasterio", reason="needs the extra geo (rasterio)")

from tests.conftest import assert_close
from vision_mamba.engine.export import export_model
from vision_mamba.errors import UserError
from vision_mamba.geo import Segmentor, load_exported

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


def test_a_file_that_does_not_say_its_classes(tmp_path):
    network, path = torch.nn.Conv2d(3, 2, 1).eval(), tmp_path / "m.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3, 8, 8),)), path)
    with pytest.raises(UserError, match="m.pt2 does not say its classes and std; give --classes, --std"):
        load_exported(path, mean=[0.0] * 3)
    assert load_exported(path, ["a", "b"], [0.0] * 3, [1.0] * 3).probabilities(torch.zeros(1, 3, 8, 8)).shape[1] == 2
