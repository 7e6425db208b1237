"""One training step, evaluation, test and prediction of every config family, by the tools' own code, on real pictures."""

import argparse
import functools
import glob
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.config import utils as config_utils
from PIL import Image

from vision_mamba.errors import UserError
from vision_mamba.mm import VisionMambaBackbone
from vision_mamba.mm.run import _build_model, load_config, main_predict, main_test, main_train

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "vision_mamba/data/builtin/examples").glob("*.jpg"))
SIDE = (96, 64)  # width, height

TINY_VMAMBA = ["model.backbone.model_name=test_vmamba", "model.backbone.pretrained=False"]
TINY_VIM = ["model.backbone.model_name=test_vim", "model.backbone.pretrained=False", "model.backbone.img_size=64"]
SEGMENTATION = {
    "vmamba_tiny_loveda": ([16, 32, 64, 128], TINY_VMAMBA),
    "vim_tiny_potsdam": (
        [32] * 4,
        [
            *TINY_VIM,
            "model.backbone.out_indices=(0,1,2,3)",
            "model.neck.embed_dim=32",
            "model.test_cfg.crop_size=(64,64)",
            "model.test_cfg.stride=(42,42)",
        ],
    ),
    "rsmamba_base_vaihingen": (
        [32] * 4,
        [
            "model.backbone.model_name=test_rsmamba",
            "model.backbone.img_size=64",
            "model.backbone.out_indices=(0,1,2,3)",
            "model.neck.embed_dim=32",
        ],
    ),
    "samba_loveda": ([16, 32, 48, 64], ["model.backbone.model_name=test_samba"]),
}
SMALL_FPN = ["model.neck.in_channels=[16,32,64,128]"]
TWO_STAGE = [
    "model.test_cfg.rcnn.score_thr=0.0",  # after one step no class is likelier than the limit of 0.05
    "model.test_cfg.rpn.max_per_img=20",
    "model.train_cfg.rpn_proposal.max_per_img=40",
]
DETECTION = {
    "mask_rcnn_vmamba_tiny_1x_coco": [
        *TINY_VMAMBA,
        *SMALL_FPN,
        *TWO_STAGE,
        "model.roi_head.bbox_head.fc_out_channels=32",
    ],
    "retinanet_vmamba_tiny_1x_coco": [
        *TINY_VMAMBA,
        "model.neck.in_channels=[32,64,128]",
        "model.test_cfg.score_thr=0.0",
    ],
    "cascade_mask_rcnn_vim_tiny_100e_coco": [
        *TINY_VIM,
        *TWO_STAGE,
        *(f"model.roi_head.bbox_head.{i}.fc_out_channels=32" for i in range(3)),
        "model.neck.in_channels=32",
        "model.data_preprocessor.batch_augments.0.size=(64,64)",
        "train_dataloader.dataset.times=1",
        "train_dataloader.dataset.dataset.pipeline.2.scale=(96,64)",
        "train_dataloader.dataset.dataset.pipeline.2.ratio_range=(0.9,1.1)",
        "train_dataloader.dataset.dataset.pipeline.3.crop_size=(64,64)",
    ],
}


def segmentation_options(name):
    channels, options = SEGMENTATION[name]
    return [
        *options,
        f"model.decode_head.in_channels={channels}".replace(" ", ""),
        "model.decode_head.channels=16",
        f"model.auxiliary_head.in_channels={channels[2]}",
        "model.auxiliary_head.channels=8",
        "model.data_preprocessor.size=(64,64)",
        "train_dataloader.dataset.pipeline.2.scale=(96,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "train_dataloader.batch_size=2",
        "val_dataloader.dataset.pipeline.1.scale=(96,64)",
        "test_dataloader.dataset.pipeline.1.scale=(96,64)",
        "train_cfg.max_iters=1",
        "train_cfg.val_interval=1",
        "default_hooks.checkpoint.interval=1",
    ]


def detection_options(name):
    pipeline = ["train_dataloader.dataset.pipeline.2.scale=(96,64)"] if "cascade" not in name else []
    return [
        *DETECTION[name],
        *pipeline,
        "val_dataloader.dataset.pipeline.1.scale=(96,64)",
        "test_dataloader.dataset.pipeline.1.scale=(96,64)",
        "train_dataloader.batch_size=2",
        "train_cfg.max_epochs=1",
        "train_cfg.val_interval=1",
    ]


def pictures(folder, names):
    folder.mkdir(parents=True)
    for name, source in zip(names, EXAMPLES, strict=False):
        Image.open(source).convert("RGB").resize(SIDE).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def mmseg_root(tmp_path_factory):
    """img_dir, ann_dir / train, val: the labels are four steps of brightness; 0 is ignored by the three data sets."""
    root = tmp_path_factory.mktemp("seg")
    for split, names in (("train", "ab"), ("val", "c")):
        pictures(root / "img_dir" / split, names)
        (root / "ann_dir" / split).mkdir(parents=True)
        for name in names:
            grey = np.asarray(Image.open(root / "img_dir" / split / f"{name}.png").convert("L"))
            Image.fromarray((grey // 64 + 1).astype(np.uint8)).save(root / "ann_dir" / split / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory):
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    categories = [{"id": i, "name": name} for i, name in enumerate(CocoDataset.METAINFO["classes"], 1)]
    for split, names in (("train2017", "ab"), ("val2017", "c")):
        pictures(root / split, names)
        images = [dict(id=i, file_name=f"{n}.png", width=SIDE[0], height=SIDE[1]) for i, n in enumerate(names, 1)]
        annotations = [
            dict(
                id=10 * image["id"] + k,
                image_id=image["id"],
                category_id=k + 1,
                bbox=[x, y, 40, 36],
                area=40 * 36,
                iscrowd=0,
                segmentation=[[x, y, x + 40, y, x + 40, y + 36, x, y + 36]],
            )
            for image in images
            for k, (x, y) in enumerate(((4, 6), (48, 20)))
        ]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def run(main, task, config, *arguments, options=()):
    main(task, "", [str(config), *map(str, arguments), *(["--cfg-options", *options] if options else [])])


def config_path(kind, name):
    return ROOT / "configs" / kind / f"{name}.py"


@pytest.fixture
def quick_configs(monkeypatch):
    """mmengine reads the same hundred YAML files of a package for every base config."""
    monkeypatch.setattr(config_utils, "load", functools.cache(config_utils.load))


def tiny_model(task, kind, name, options):
    parser = argparse.ArgumentParser()
    parser.add_argument("options", nargs="+", action=DictAction)
    return _build_model(load_config(str(config_path(kind, name)), task, parser.parse_args(options).options))


def check_loss(model, batch):
    """Finite, with a gradient for every trained parameter: without one, distributed training stops."""
    total, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
    total.backward()
    assert torch.isfinite(total)
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_family(name, mmseg_root, tmp_path):
    config, options = config_path("segmentation", name), segmentation_options(name)
    shared = ("--data-root", mmseg_root, "--workers", 0)
    run(main_train, "seg", config, *shared, "--output", tmp_path / "run", "--seed", 0, options=options)
    out = tmp_path / "run"
    assert (out / "iter_1.pth").is_file() and (out / "curves.png").is_file()
    assert Image.open(out / "predictions/c.png").size == (2 * SIDE[0], SIDE[1])  # truth and prediction side by side
    run(main_test, "seg", config, out / "iter_1.pth", *shared, options=options)
    metrics = json.loads((out / "test/metrics.json").read_text())["metrics"]
    scalars = [json.loads(line) for line in next(out.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    assert metrics["mIoU"] == pytest.approx([row["mIoU"] for row in scalars if "mIoU" in row][0], abs=0.01)

    image = mmseg_root / "img_dir/val/c.png"
    run(main_predict, "seg", config, out / "iter_1.pth", image, image.parent, "--device", "cpu", options=options)
    found = json.loads((out / "predictions/predictions.json").read_text())
    mask = Image.open(out / "predictions/masks/c.png")
    assert mask.size == SIDE and mask.mode == "P" and int(np.asarray(mask).max()) < len(found["classes"])
    assert sum(found["images"][0]["shares"].values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", DETECTION)
def test_detection_family(name, coco_root, tmp_path):
    config, options = config_path("detection", name), detection_options(name)
    shared = ("--data-root", coco_root, "--workers", 0)
    out = tmp_path / "run"
    run(main_train, "det", config, *shared, "--output", out, "--seed", 0, options=options)
    assert (out / "epoch_1.pth").is_file() and (out / "predictions/c.png").is_file()
    run(main_test, "det", config, out / "epoch_1.pth", *shared, options=options)
    metrics = json.loads((out / "test/metrics.json").read_text())["metrics"]
    assert 0 <= metrics["coco/bbox_mAP"] <= 1
    arguments = (out / "epoch_1.pth", coco_root / "val2017/c.png", "--score-thr", 0, "--device", "cpu")
    run(main_predict, "det", config, *arguments, options=options)
    boxes = json.loads((out / "predictions/predictions.json").read_text())["images"][0]["boxes"]
    assert (out / "predictions/overlays/c.png").is_file()
    assert boxes
    for box in boxes:
        x1, y1, x2, y2 = box["bbox"]
        assert 0 <= x1 <= x2 <= SIDE[0] and 0 <= y1 <= y2 <= SIDE[1] and 0 <= box["score"] <= 1


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentor_in_three_modes(name, quick_configs):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = tiny_model("seg", "segmentation", name, segmentation_options(name))
    classes = model.decode_head.num_classes

    def batch(*sizes):
        inputs = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
        truth = [PixelData(data=torch.randint(classes, (1, *size))) for size in sizes]
        metas = [dict(img_shape=size, ori_shape=size) for size in sizes]
        return dict(
            inputs=inputs,
            data_samples=[SegDataSample(gt_sem_seg=t, metainfo=m) for t, m in zip(truth, metas, strict=True)],
        )

    check_loss(model, batch((64, 64), (50, 41)))
    model.eval()
    data = model.data_preprocessor(batch((70, 96)), False)
    with torch.no_grad():
        for samples in (data["data_samples"], None):
            (found,) = model(data["inputs"], samples, mode="predict")
            assert found.seg_logits.shape == (70, 96) and len(found.seg_logits.data) == classes
            assert torch.equal(found.pred_sem_seg.data[0], found.seg_logits.data.argmax(0))
        raw = model(data["inputs"], mode="tensor")
    assert raw.shape[:2] == (1, classes) and torch.isfinite(raw).all()


@pytest.mark.parametrize("name", DETECTION)
def test_detector_in_three_modes(name, quick_configs):
    from mmdet.testing import demo_mm_inputs

    few = ["train_cfg.rpn_proposal.max_per_img=8", "test_cfg.rpn.max_per_img=4", "test_cfg.rcnn.max_per_img=4"]
    few = [f"model.{option}" for option in few] if "rcnn" in name else []
    model = tiny_model("det", "detection", name, [*detection_options(name), *few])
    check_loss(model, demo_mm_inputs(2, [[3, 64, 64], [3, 50, 41]], num_items=[2, 3], with_mask=True))
    model.eval()
    data = model.data_preprocessor(demo_mm_inputs(2, [[3, 64, 64], [3, 50, 41]]), False)
    with torch.no_grad():
        found = model(**data, mode="predict")
        raw = model(**data, mode="tensor")
    assert len(found) == 2 and all(len(f.pred_instances) for f in found)
    assert isinstance(raw, tuple) and raw


def test_resumed_run_goes_on(mmseg_root, tmp_path):
    config, options = config_path("segmentation", "vmamba_tiny_loveda"), segmentation_options("vmamba_tiny_loveda")
    options = [o for o in options if "max_iters" not in o]
    shared = ("--data-root", mmseg_root, "--workers", 0, "--seed", 0)
    broken = tmp_path / "broken"
    run(main_train, "seg", config, *shared, "--output", broken, options=[*options, "train_cfg.max_iters=1"])
    with pytest.raises(UserError, match=r"already holds a run .*--resume auto"):
        run(main_train, "seg", config, *shared, "--output", broken, options=options)
    first = torch.load(broken / "iter_1.pth", weights_only=True)
    resumed = [*options, "train_cfg.max_iters=2"]
    run(main_train, "seg", config, *shared, "--output", broken, "--resume", "auto", options=resumed)
    second = torch.load(broken / "iter_2.pth", weights_only=True)
    assert second["meta"]["iter"] == 2
    step = {p["step"].item() for p in second["optimizer"]["state"].values()}
    assert step == {2.0} and {p["step"].item() for p in first["optimizer"]["state"].values()} == {1.0}
    rows = [json.loads(line) for f in broken.glob("*/vis_data/scalars.json") for line in f.read_text().splitlines()]
    assert {row["step"] for row in rows if "mIoU" in row} == {1, 2}


def test_configs_fit_their_backbones(quick_configs):
    """Channels of heads and necks against the backbone's, of every config; and all classes counted alike."""
    backbones = {}
    paths = sorted(p for kind in ("segmentation", "detection") for p in glob.glob(str(ROOT / f"configs/{kind}/*.py")))
    assert len(paths) > 40
    for path in paths:
        cfg = Config.fromfile(path)
        backbone = dict(cfg.model.backbone)
        if backbone["type"] != "VisionMambaBackbone":
            continue
        key = (backbone["model_name"], str(backbone["out_indices"]))
        if key not in backbones:
            with torch.device("meta"):
                built = VisionMambaBackbone(backbone["model_name"], backbone["out_indices"])
            backbones[key] = built.out_channels
        channels = backbones[key]
        if cfg.default_scope == "mmdet":
            wanted = cfg.model.neck.in_channels
            assert ([wanted] if isinstance(wanted, int) else wanted) == channels, path
            continue
        if cfg.model.get("neck"):
            assert set(channels) == {cfg.model.neck.embed_dim}, path
        assert cfg.model.decode_head.in_channels == channels, path
        assert cfg.model.auxiliary_head.in_channels == channels[cfg.model.auxiliary_head.in_index], path
        assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes, path
        assert "VisionMambaOptimConstructor" == cfg.optim_wrapper.constructor, path
