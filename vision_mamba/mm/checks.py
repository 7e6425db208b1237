"""What can be wrong with a config and its data, found before training or testing starts.

The mm-series would go on in silence with much of it: classes that the annotations do not know give no boxes and a
score of zero, boxes outside the image are dropped, labels outside the classes count as whatever the loss makes of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

from ..errors import UserError, nearest

# Masks opened for their labels, evenly spaced over the set; the files' presence and sizes are checked of all.
_MASKS = 400


def check_config(cfg: Config, loaders: Sequence[str]) -> list[str]:
    """Checks the data of ``loaders`` ("train_dataloader", ...) against files, classes and the model's heads.

    Returns:
        Warnings, each one line with a count.

    Raises:
        UserError: the first thing that would make training or the score meaningless.
    """
    warnings = []
    for key in loaders:
        if cfg.get(key) is None:
            raise UserError(f"the config has no {key}")
        for dataset in _datasets(cfg[key]["dataset"]):
            split = key.removesuffix("_dataloader")
            check = _check_detection if cfg.get("default_scope") == "mmdet" else _check_segmentation
            warnings += check(dataset, split)
            _check_heads(cfg, len(_classes(dataset)), split)
    return warnings


def _datasets(dataset: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The plain data sets within wrappers (RepeatDataset, ConcatDataset, MultiImageMixDataset)."""
    if "dataset" in dataset:
        yield from _datasets(dataset["dataset"])
    elif "datasets" in dataset:
        for part in dataset["datasets"]:
            yield from _datasets(part)
    else:
        yield dataset


def _dataset_class(dataset: dict[str, Any]) -> type:
    from mmengine.registry import DATASETS

    with DATASETS.switch_scope_and_registry(None) as registry:
        found = registry.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]
    if found is None:
        raise UserError(f"unknown data set type {dataset['type']!r} in the config")
    return found


def _metainfo(dataset: dict[str, Any]) -> dict[str, Any]:
    return {**getattr(_dataset_class(dataset), "METAINFO", {}), **(dataset.get("metainfo") or {})}


def _classes(dataset: dict[str, Any]) -> tuple[str, ...]:
    metainfo = _metainfo(dataset)
    classes, palette = metainfo.get("classes"), metainfo.get("palette")
    if not classes:
        raise UserError(f"{dataset['type']} has no class names: set metainfo=dict(classes=(...), palette=[...])")
    if isinstance(classes, str):
        raise UserError(f"metainfo classes={classes!r} is a text; with one class write ({classes!r},)")
    own = getattr(_dataset_class(dataset), "METAINFO", {}).get("classes")
    if palette and len(palette) != len(classes) and (own is None or len(palette) != len(own)):
        raise UserError(
            f"{dataset['type']}: {len(classes)} classes but {len(palette)} palette colours; "
            "give metainfo one colour a class"
        )
    return tuple(classes)


def _check_heads(cfg: Config, classes: int, split: str) -> None:
    """All heads of the model must have as many classes as the data."""

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "num_classes" and "head" in path and value not in (classes, None):
                    if "rpn" in path:  # always one: object or not
                        continue
                    raise UserError(f"{path}.num_classes={value}, but the {split} data has {classes} classes")
                visit(value, f"{path}.{key}")
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                visit(value, f"{path}.{i}")

    visit({key: value for key, value in cfg.model.items() if key != "backbone"}, "model")


def _folder(dataset: dict[str, Any], prefix: str) -> Path | None:
    path = (dataset.get("data_prefix") or {}).get(prefix)
    if path is None:
        return None
    return Path(dataset.get("data_root") or "", path)


def _check_segmentation(dataset: dict[str, Any], split: str) -> list[str]:
    images, masks = _folder(dataset, "img_path"), _folder(dataset, "seg_map_path")
    names, ann_file = _classes(dataset), dataset.get("ann_file")
    if ann_file and not Path(dataset.get("data_root") or "", ann_file).is_file():
        raise UserError(f"{split}: annotation file {Path(dataset.get('data_root') or '', ann_file)} does not exist")
    for what, folder in (("image", images), ("mask", masks)):
        if folder is None or not folder.is_dir():
            raise UserError(
                f"{split}: {what} folder {folder} does not exist; give the data's place with --data-root "
                f"(it is {dataset.get('data_root')!r} now)"
            )
    samples = _build(dataset, split)
    if not len(samples):
        raise UserError(f"{split}: no {samples.img_suffix} images in {images}")

    ignored, zero = dataset.get("ignore_index", 255), getattr(samples, "reduce_zero_label", False)
    known = len(getattr(_dataset_class(dataset), "METAINFO", {}).get("classes") or names)
    allowed = set(range(known + 1 if zero else known)) | {ignored, 255}
    step = max(1, len(samples) // _MASKS)
    foreign: Counter[int] = Counter()
    first_foreign, seen = None, set()
    for i in range(len(samples)):
        info = samples.get_data_info(i)
        image, mask = Path(info["img_path"]), Path(info["seg_map_path"])
        if not mask.is_file():
            raise UserError(f"{split}: image {image} has no mask {mask}")
        size, mask_size, labels = _mask(image, mask, read=i % step == 0)
        if size != mask_size:
            raise UserError(
                f"{split}: image {image} is {size[0]}x{size[1]} (width x height), "
                f"its mask {mask} {mask_size[0]}x{mask_size[1]}"
            )
        if labels is not None:
            values, counts = np.unique(labels, return_counts=True)
            seen.update(values.tolist())
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                if value not in allowed:
                    foreign[value] += count
                    first_foreign = first_foreign or mask
    if foreign:
        raise UserError(
            f"{split}: masks hold labels {sorted(foreign)} outside the {known} classes "
            f"({sum(foreign.values())} pixels, first in {first_foreign}); correct the masks or metainfo classes, or "
            "set ignore_index of the data set and the heads"
        )
    if not seen - {ignored, 255} - ({0} if zero else set()):
        raise UserError(f"{split}: the masks in {masks} hold nothing but the ignored label")
    return []


def _mask(image: Path, mask: Path, *, read: bool) -> tuple[tuple[int, int], tuple[int, int], np.ndarray | None]:
    """Sizes (width, height) of an image and its mask, and the mask's labels if asked for."""
    try:
        with Image.open(image) as opened:
            size = opened.size
        with Image.open(mask) as opened:
            if opened.mode not in ("L", "P", "I", "I;16", "1"):
                raise UserError(f"mask {mask} is a colour picture ({opened.mode}); masks hold one class number a pixel")
            return size, opened.size, np.asarray(opened) if read else None
    except OSError as error:
        raise UserError(f"image {image} or its mask {mask} cannot be read: {error}") from None


def _check_detection(dataset: dict[str, Any], split: str) -> list[str]:
    root = Path(dataset.get("data_root") or "")
    ann_file = root / dataset.get("ann_file", "")
    if not ann_file.is_file():
        raise UserError(
            f"{split}: annotation file {ann_file} does not exist; give the data's place with --data-root "
            f"(it is {dataset.get('data_root')!r} now)"
        )
    try:
        annotations = json.loads(ann_file.read_text())
        images = {image["id"]: image for image in annotations["images"]}
        categories = {c["id"]: c["name"] for c in annotations["categories"]}
        boxes = annotations.get("annotations", [])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{split}: {ann_file} is not a COCO annotation file: {type(error).__name__} {error}") from None

    classes = _classes(dataset)
    missing = [name for name in classes if name not in categories.values()]
    if missing:
        known = list(categories.values())
        raise UserError(
            f"{split}: {ann_file} has no category {missing[0]!r}{nearest(missing[0], known)}; its categories are "
            f"{', '.join(map(str, known))}: set metainfo=dict(classes=(...)) to those to detect"
        )
    wanted = {id_ for id_, name in categories.items() if name in classes}
    folder = _folder(dataset, "img") or root
    for image in images.values():
        if not (folder / image["file_name"]).is_file():
            raise UserError(f"{split}: {ann_file} names {image['file_name']}, which is not in {folder}")

    warnings, kept = [], 0
    outside, tiny, partly, other = [], [], [], []
    for box in boxes:
        if box["image_id"] not in images:
            raise UserError(f"{split}: annotation {box['id']} of {ann_file} belongs to no image (id {box['image_id']})")
        if box["category_id"] not in wanted:
            other.append(box)
            continue
        x, y, width, height = box["bbox"]
        image = images[box["image_id"]]
        if x + width <= 0 or y + height <= 0 or x >= image["width"] or y >= image["height"]:
            outside.append(box)
        elif width < 1 or height < 1:
            tiny.append(box)
        else:
            kept += 1
            if min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1:
                partly.append(box)
    if not kept:
        raise UserError(f"{split}: {ann_file} has no box to use for the classes {', '.join(classes)}")
    for some, what in (
        (outside, "lie outside their image and are left out"),
        (tiny, "are less than a pixel wide or high and are left out"),
        (partly, "reach beyond their image"),
        (other, "are of categories that are not among the classes"),
    ):
        if some:
            warnings.append(
                f"{split}: {len(some)} of {len(boxes)} boxes {what} (first: annotation {some[0].get('id')})"
            )
    return warnings


def _build(dataset: dict[str, Any], split: str) -> Any:
    """The data set without its pipeline."""
    from mmengine.registry import DATASETS

    try:
        return DATASETS.build({**dataset, "pipeline": [], "serialize_data": False})
    except (AssertionError, ValueError, KeyError, TypeError, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{split}: {dataset['type']} cannot be opened: {lines[0]}") from None
