"""Models of mmsegmentation and mmdetection on scenes: the same numbers as through their own pipelines."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rasterio", reason="needs the extra geo (rasterio)")
pytest.importorskip("mmseg", reason="needs the extra mm (mmsegmentation)")
pytest.importorskip("mmdet", reason="needs the extra mm (mmdet)")

from tests.conftest import assert_close
from vision_mamba.errors import UserError
from vision_mamba.geo import load_exported, load_mmdet, load_mmseg

TOOL = Path(__file__).parents[2] / "tools" / "detect.py"
CONFIGS = Path(__file__).parents[2] / "configs"
BACKBONE = 'backbone=dict(model_name="test_vmamba", pretrained=False)'
SEGMENTOR = f"""
_base_ = "{CONFIGS}/segmentation/vmamba_tiny_aerial_roads.py"
model = dict({BACKBONE}, decode_head=dict(in_channels=[16, 32, 64, 128], channels=16),
    auxiliary_head=dict(in_channels=64, channels=16))
"""
DETECTOR = f"""
_base_ = "{CONFIGS}/detection/faster_rcnn_vmamba_tiny_aerial_cars.py"
model = dict({BACKBONE}, neck=dict(in_channels=[16, 32, 64, 128]))
"""


def saved(tmp_path, task, text):
    from vision_mamba.mm import run

    config, checkpoint = tmp_path / f"{task}.py", tmp_path / f"{task}.pth"
    config.write_text(text)
    cfg = run.load_config(str(config), task, {})
    run._without_initial_weights(cfg)
    torch.manual_seed(0)
    model = run._build_model(cfg)
    model.init_weights()
    torch.save({"state_dict": model.state_dict(), "meta": {}}, checkpoint)
    return config, checkpoint, model.eval()


def picture():
    return torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def normalised(model, rgb):
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
    return ((rgb - mean) / std)[None]


def test_segmentor(tmp_path):
    config, checkpoint, model = saved(tmp_path, "seg", SEGMENTOR)
    from mmseg.structures import SegDataSample

    segmentor = load_mmseg(config, checkpoint)
    assert list(segmentor.classes) == ["background", "road"] and len(segmentor.palette) == 2
    rgb = picture()
    sample = SegDataSample(metainfo=dict(ori_shape=(96, 128), img_shape=(96, 128)))
    with torch.no_grad():
        expected = model.test_step(dict(inputs=[rgb.flip(0)], data_samples=[sample]))[0]  # they read BGR
        found = segmentor.probabilities(normalised(segmentor, rgb.float()))[0]
    assert_close("probabilities", found, expected.seg_logits.data.softmax(0), 1e-5)


def test_detector(tmp_path):
    config, checkpoint, model = saved(tmp_path, "det", DETECTOR)
    from mmdet.structures import DetDataSample

    detector = load_mmdet(config, checkpoint)
    assert list(detector.classes)[:2] == ["car", "truck"]
    rgb = picture()
    meta = dict(ori_shape=(96, 128), img_shape=(96, 128), scale_factor=(1.0, 1.0))
    with torch.no_grad():
        expected = model.test_step(dict(inputs=[rgb.flip(0)], data_samples=[DetDataSample(metainfo=meta)]))[0]
        boxes, scores, labels = detector.model(normalised(detector, rgb.float()))[0]
    assert len(boxes) > 0 and torch.equal(labels, expected.pred_instances.labels)
    assert_close("boxes", boxes, expected.pred_instances.bboxes, 1e-5)
    assert_close("scores", scores, expected.pred_instances.scores, 1e-5)


def test_detect_tool(tmp_path, monkeypatch, capsys):
    from PIL import Image

    config, checkpoint, _ = saved(tmp_path, "det", DETECTOR)
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")

    def call(scene):
        options = ["--out", str(tmp_path), "--window", "64", "--score", "0", "--resume", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["detect.py", str(config), str(checkpoint), str(scene), *options])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(TOOL), run_name="__main__")
        return done.value.code, capsys.readouterr()

    status, said = call(tmp_path / "none.png")
    assert status == 2 and said.err == f"error: no raster {tmp_path / 'none.png'}\n"
    status, said = call(tmp_path / "photo.png")
    assert status == 0 and " objects; 6 windows in " in said.out
    found = json.loads((tmp_path / "photo_objects.json").read_text())
    assert found and {r["image_id"] for r in found} == {"photo.png"}


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(UserError, match="none.py"):
        load_mmseg(tmp_path / "none.py", tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"aerial_cars\.py is for mmdet, this tool for mmseg"):
        load_mmseg(CONFIGS / "detection" / "faster_rcnn_vmamba_tiny_aerial_cars.py", tmp_path / "none.pth")
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"must end in \.pt2 or \.onnx"):
        load_exported(tmp_path / "model.bin", ["a", "b"], [0.0], [1.0])
