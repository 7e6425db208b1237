"""Mistakes in configs and data: one clear line each, or a counted warning, before anything runs."""

import json

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from vision_mamba.errors import UserError
from vision_mamba.mm.checks import check_config
from vision_mamba.mm.run import find_images, load_config, load_weights, main_train

PALETTE = [[0, 0, 0], [255, 0, 0]]


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


@pytest.fixture
def seg(tmp_path):
    """A config over two pictures of 6x4 with masks of 0 and 1, as a dictionary to spoil."""
    for name in "ab":
        write(tmp_path / f"img_dir/{name}.png", np.zeros((4, 6, 3)))
        write(tmp_path / f"ann_dir/{name}.png", np.eye(4, 6))
    dataset = dict(
        type="BaseSegDataset",
        data_root=str(tmp_path),
        img_suffix=".png",
        data_prefix=dict(img_path="img_dir", seg_map_path="ann_dir"),
        metainfo=dict(classes=("sky", "road"), palette=PALETTE),
    )
    init_default_scope("mmseg")
    return dict(
        default_scope="mmseg",
        train_dataloader=dict(dataset=dataset),
        model=dict(decode_head=dict(num_classes=2), auxiliary_head=[dict(num_classes=2)]),
    )


def check(content):
    return check_config(Config(content), ["train_dataloader"])


def test_segmentation_data_in_order(seg, tmp_path):
    assert check(seg) == []
    write(tmp_path / "ann_dir/b.png", np.full((4, 6), 255))  # ignored pixels are no classes
    assert check(seg) == []
    dataset = seg["train_dataloader"]["dataset"]
    dataset["reduce_zero_label"] = True
    write(tmp_path / "ann_dir/a.png", np.eye(4, 6) + 1)
    assert check(seg) == []
    seg["train_dataloader"]["dataset"] = dict(type="RepeatDataset", times=2, dataset=dataset)
    assert check(seg) == []


def test_segmentation_mistakes(seg, tmp_path):
    def spoil(message, change, repair):
        change()
        with pytest.raises(UserError, match=message):
            check(seg)
        repair()

    dataset, mask, image = seg["train_dataloader"]["dataset"], tmp_path / "ann_dir/b.png", tmp_path / "img_dir/b.png"
    good = np.eye(4, 6)
    spoil(
        r"image .*b\.png is 6x4 \(width x height\), its mask .*b\.png 5x4",
        lambda: write(mask, np.zeros((4, 5))),
        lambda: write(mask, good),
    )
    spoil(
        r"labels \[7\] outside the 2 classes \(3 pixels, first in .*b\.png\)",
        lambda: write(mask, np.pad([[7, 7, 7]], ((0, 3), (0, 3)))),
        lambda: write(mask, good),
    )
    spoil("b.png is a colour picture", lambda: write(mask, np.zeros((4, 6, 3))), lambda: write(mask, good))
    spoil(r"image .*b\.png has no mask .*b\.png", mask.unlink, lambda: write(mask, good))
    spoil("cannot be read", lambda: image.write_bytes(b"no"), lambda: write(image, np.zeros((4, 6, 3))))
    spoil(
        "2 classes but 3 palette colours",
        lambda: dataset["metainfo"].update(palette=[*PALETTE, [1, 1, 1]]),
        lambda: dataset["metainfo"].update(palette=PALETTE),
    )
    spoil(
        r"model\.auxiliary_head\.0\.num_classes=3, but the train data has 2 classes",
        lambda: seg["model"]["auxiliary_head"][0].update(num_classes=3),
        lambda: seg["model"]["auxiliary_head"][0].update(num_classes=2),
    )
    spoil(
        "mask folder .*nowhere does not exist; .*--data-root",
        lambda: dataset["data_prefix"].update(seg_map_path="nowhere"),
        lambda: dataset["data_prefix"].update(seg_map_path="ann_dir"),
    )
    spoil("no .jpg images in", lambda: dataset.update(img_suffix=".jpg"), lambda: dataset.update(img_suffix=".png"))
    spoil(
        "annotation file .*list.txt does not exist",
        lambda: dataset.update(ann_file="list.txt"),
        lambda: dataset.pop("ann_file"),
    )
    spoil(
        "no class names",
        lambda: dataset.update(metainfo={}),
        lambda: dataset.update(metainfo=dict(classes=("sky", "road"))),
    )
    for name in "ab":
        write(tmp_path / f"ann_dir/{name}.png", np.full((4, 6), 255))
    with pytest.raises(UserError, match="nothing but the ignored label"):
        check(seg)


@pytest.fixture
def det(tmp_path):
    write(tmp_path / "img/a.png", np.zeros((40, 60, 3)))
    content = dict(
        images=[dict(id=1, file_name="a.png", width=60, height=40)],
        categories=[dict(id=3, name="car"), dict(id=5, name="bus")],
        annotations=[dict(id=1, image_id=1, category_id=3, bbox=[1, 2, 10, 10], area=100, iscrowd=0)],
    )
    dataset = dict(
        type="CocoDataset",
        data_root=str(tmp_path),
        ann_file="boxes.json",
        data_prefix=dict(img="img"),
        metainfo=dict(classes=("car", "bus"), palette=PALETTE),
    )
    init_default_scope("mmdet")
    cfg = dict(
        default_scope="mmdet",
        train_dataloader=dict(dataset=dataset),
        model=dict(rpn_head=dict(num_classes=1), roi_head=dict(bbox_head=dict(num_classes=2))),
    )

    def check_with(**changes):
        (tmp_path / "boxes.json").write_text(json.dumps({**content, **changes}))
        return check(cfg)

    return cfg, content, check_with


def test_detection_warnings_are_counted(det):
    _, content, check_with = det
    assert check_with() == []
    box = content["annotations"][0]
    others = [
        dict(box, id=2, bbox=[70, 2, 5, 5]),
        dict(box, id=3, bbox=[-30, 2, 5, 5]),
        dict(box, id=4, bbox=[3, 3, 0.2, 9]),
        dict(box, id=5, bbox=[50, 30, 20, 20]),
        dict(box, id=6, category_id=9),
    ]
    categories = [*content["categories"], dict(id=9, name="tree")]
    found = check_with(annotations=[box, *others], categories=categories)
    assert found == [
        "train: 2 of 6 boxes lie outside their image and are left out (first: annotation 2)",
        "train: 1 of 6 boxes are less than a pixel wide or high and are left out (first: annotation 4)",
        "train: 1 of 6 boxes reach beyond their image (first: annotation 5)",
        "train: 1 of 6 boxes are of categories that are not among the classes (first: annotation 6)",
    ]


def test_detection_mistakes(det, tmp_path):
    cfg, content, check_with = det
    box = content["annotations"][0]
    for message, changes in (
        ("has no box to use for the classes car, bus", dict(annotations=[])),
        ("has no box to use", dict(annotations=[dict(box, bbox=[100, 100, 5, 5])])),
        (
            r"no category 'bus'; did you mean 'buss'\?; its categories are car, buss",
            dict(categories=[dict(id=3, name="car"), dict(id=5, name="buss")]),
        ),
        ("annotation 1 of .*boxes.json belongs to no image", dict(annotations=[dict(box, image_id=7)])),
        (r"names b\.png, which is not in .*img", dict(images=[dict(content["images"][0], file_name="b.png")])),
        ("is not a COCO annotation file", dict(categories=None)),
    ):
        with pytest.raises(UserError, match=message):
            check_with(**changes)
    cfg["model"]["roi_head"]["bbox_head"]["num_classes"] = 80
    with pytest.raises(
        UserError, match=r"model\.roi_head\.bbox_head\.num_classes=80, but the train data has 2 classes"
    ):
        check_with()
    (tmp_path / "boxes.json").unlink()
    with pytest.raises(UserError, match="annotation file .*boxes.json does not exist"):
        check(cfg)


def test_config_mistakes(tmp_path):
    def config(text):
        (tmp_path / "c.py").write_text(text)
        return str(tmp_path / "c.py")

    with pytest.raises(UserError, match=r"none\.py"):
        load_config(str(tmp_path / "none.py"), "seg", {})
    with pytest.raises(UserError, match="cannot be read: SyntaxError"):
        load_config(config("model = ("), "seg", {})
    with pytest.raises(UserError, match="has no model: it is a part for others"):
        load_config(config("x = 1"), "seg", {})
    with pytest.raises(UserError, match="is for mmdet, this tool for mmseg; take configs/segmentation/"):
        load_config(config("model = dict()\ndefault_scope = 'mmdet'"), "seg", {})
    with pytest.raises(UserError, match="no such checkpoint"):
        main_train("seg", "", [config("model = dict()\ndefault_scope = 'mmseg'"), "--resume", "gone.pth"])
    with pytest.raises(UserError, match="no image gone.jpg"):
        find_images(["gone.jpg"])


def test_data_root_reaches_every_part(tmp_path):
    (tmp_path / "c.py").write_text(
        "model = dict()\ndefault_scope = 'mmdet'\ndata_root = 'data/coco/'\n"
        "train_dataloader = dict(dataset=dict(dataset=dict(data_root=data_root, ann_file='a.json')))\n"
        "val_evaluator = dict(ann_file=data_root + 'annotations/v.json')\n"
    )
    for options, root in (({}, "/new"), ({"data_root": "/new"}, None)):
        cfg = load_config(str(tmp_path / "c.py"), "det", options, data_root=root)
        assert cfg.train_dataloader.dataset.dataset.data_root == "/new"
        assert cfg.train_dataloader.dataset.dataset.ann_file == "a.json"
        assert cfg.val_evaluator.ann_file == "/new/annotations/v.json"


def test_weights_of_another_model(tmp_path):
    import torch
    from torch import nn

    model = nn.ModuleDict(dict(a=nn.Linear(2, 3), head=nn.Linear(3, 4)))
    torch.save({"state_dict": model.state_dict(), "meta": {"epoch": 3}}, tmp_path / "good.pth")
    assert load_weights(model, str(tmp_path / "good.pth")) == {"epoch": 3}
    other = nn.ModuleDict(dict(a=nn.Linear(2, 3), head=nn.Linear(3, 5)))
    with pytest.raises(UserError, match="2 tensors differ, first: size mismatch for head.weight"):
        load_weights(other, str(tmp_path / "good.pth"))
    before = other["head"].weight.clone()
    load_weights(other, str(tmp_path / "good.pth"), allow_new_heads=True)
    assert torch.equal(other["a"].weight, model["a"].weight) and torch.equal(other["head"].weight, before)
    with pytest.raises(UserError, match="it lacks 2 tensors: neck.weight"):
        load_weights(nn.ModuleDict(dict(**model, neck=nn.Linear(1, 1))), str(tmp_path / "good.pth"))
    with pytest.raises(UserError, match="it has unknown 2 tensors: head.weight"):
        load_weights(nn.ModuleDict(dict(a=nn.Linear(2, 3))), str(tmp_path / "good.pth"))
    with pytest.raises(UserError, match="gone.pth"):
        load_weights(model, str(tmp_path / "gone.pth"))
