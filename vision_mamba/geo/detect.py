"""Finding objects in a whole raster: windows, one owner an object, results in map coordinates."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms
from tqdm import tqdm

from vision_mamba.data.rasters import load_rasterio
from vision_mamba.engine.plots import replacing
from vision_mamba.errors import UserError

from .models import Detector
from .products import decimated, refuse_existing
from .reader import SceneReader, ahead
from .windows import Grid


@dataclass(frozen=True)
class Detections:
    """Objects of a scene.

    Attributes:
        boxes: (n, 4) left, top, right, bottom, in pixels of the scene.
        scores: (n,).
        labels: (n,) class numbers.
        files: what was written.
        seconds: of the run.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    files: list[Path]
    seconds: float


def detect_raster(
    source: str | os.PathLike,
    out: str | os.PathLike,
    detector: Detector,
    *,
    window: int = 1024,
    overlap: int | None = None,
    batch_size: int = 2,
    score: float = 0.3,
    iou: float = 0.5,
    value_range: Sequence[float] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Detections:
    """Objects of a raster of any size, each once.

    Of the objects that two windows see, each keeps those whose centre lies in its own half of the overlap,
    so an object smaller than the overlap is kept whole; what is left twice near the border between
    them goes by non-maximum suppression over the scene.

    Args:
        source: GeoTIFF, COG, VRT, JPEG2000, PNG, JPEG: whatever GDAL opens.
        out: folder for ``<name>_objects.gpkg`` (boxes in map coordinates), ``.json`` (COCO results in pixels) and
            ``.png``.
        detector: the model and its input.
        window: side of a window in pixels.
        overlap: pixels that neighbours share, more than an object's size; a quarter of the window if None.
        batch_size: windows in one forward pass.
        score: objects below are left out.
        iou: overlap above which the weaker of two objects of a class goes.
        value_range: values of the raster that become 0 and 255, for a model of 8-bit images on other numbers.
        overwrite: replace results that exist.
        progress: show windows a second and the time left.

    Raises:
        UserError: the raster cannot be read, has other bands than the model, or results exist.
    """
    begun = time.monotonic()
    overlap = window // 4 if overlap is None else overlap
    reader = SceneReader(source, detector, value_range)
    grid = Grid(reader.height, reader.width, window, overlap)
    stem = Path(out) / f"{Path(source).stem}_objects"
    files = [stem.with_suffix(suffix) for suffix in (".gpkg", ".json", ".png")]
    refuse_existing(files, overwrite)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    corners = _corners(grid)
    bar = tqdm(total=len(grid.tops) * len(grid.lefts), unit=" windows", desc=Path(source).name, disable=not progress)
    with bar, closing(ahead(reader.batches(grid, range(len(grid.tops)), batch_size), 2)) as batches:
        for x, empty in batches:
            found = []
            if not empty.all():
                with torch.inference_mode(), detector.autocast():
                    found = detector.model(x.to(detector.device))
            for i in range(len(x)):
                top, left, own = next(corners)
                if found and not empty[i]:
                    boxes, scores, labels = (t.detach().float().cpu() for t in found[i])
                    boxes = boxes + torch.tensor([left, top, left, top])
                    x_centre, y_centre = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
                    inside = (own[0] <= x_centre) & (x_centre < own[2]) & (own[1] <= y_centre) & (y_centre < own[3])
                    chosen = inside & (scores >= score)
                    kept.append((boxes[chosen], scores[chosen], labels[chosen].long()))
            bar.update(len(x))
    empty_set = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    boxes, scores, labels = (torch.cat(parts) for parts in zip(empty_set, *kept, strict=True))
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, reader.width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, reader.height)
    chosen = batched_nms(boxes, scores, labels, iou)
    boxes, scores, labels = boxes[chosen], scores[chosen], labels[chosen]
    try:
        with replacing(files[0]) as temporary:
            _write_boxes(temporary, reader, detector.classes, boxes, scores, labels)
        with replacing(files[1]) as temporary:
            temporary.write_text(json.dumps(coco_results(Path(source).name, boxes, scores, labels)) + "\n")
        with replacing(files[2]) as temporary:
            _picture(source, reader, detector, boxes, labels, temporary)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return Detections(boxes, scores, labels, files, time.monotonic() - begun)


def _corners(grid: Grid) -> Iterator[tuple[int, int, tuple[float, float, float, float]]]:
    """For each window its top, left, and the box of centres that it owns: to the middle of each overlap."""

    def owned(begins: list[int], length: int) -> list[tuple[float, float]]:
        borders = [(a + grid.window + b) / 2 for a, b in zip(begins, begins[1:], strict=False)]
        return list(zip([-1.0, *borders], [*borders, length + 1.0], strict=True))

    for top, rows in zip(grid.tops, owned(grid.tops, grid.height), strict=True):
        for left, columns in zip(grid.lefts, owned(grid.lefts, grid.width), strict=True):
            yield top, left, (columns[0], rows[0], columns[1], rows[1])


def coco_results(name: str, boxes: Tensor, scores: Tensor, labels: Tensor) -> list[dict]:
    """COCO's result format; ``image_id`` is the file's name, categories count from 1."""
    sizes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    return [
        {"image_id": name, "category_id": label + 1, "bbox": [round(v, 2) for v in box], "score": round(score, 5)}
        for box, score, label in zip(sizes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    ]


def _write_boxes(path: Path, reader: SceneReader, classes: Sequence[str], boxes, scores, labels) -> None:
    try:
        import pyogrio
        import shapely
    except ImportError:
        raise UserError("boxes on a map need pyogrio and shapely: pip install 'vision-mamba-zoo[geo]'") from None
    transform, crs = reader.profile["transform"], reader.profile["crs"]
    shapes = shapely.box(*boxes.double().numpy().T) if len(boxes) else np.empty(0, object)
    a, b, c, d, e, f = transform[:6]

    def on_map(xy: np.ndarray) -> np.ndarray:
        x, y = xy.T
        return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)

    shapes = shapely.transform(shapes, on_map)
    numbers = labels.numpy().astype(np.int32)
    pyogrio.raw.write(
        path,
        np.array(shapely.to_wkb(shapes), dtype=object),
        [numbers, np.array([classes[n] for n in numbers], object), scores.numpy().astype(np.float64)],
        np.array(["class", "name", "score"], object),
        geometry_type="Polygon",
        crs=crs.to_wkt() if crs else None,
        layer="objects",
        driver="GPKG",
    )


def _picture(source, reader: SceneReader, detector: Detector, boxes: Tensor, labels: Tensor, path: Path) -> None:
    from PIL import Image, ImageDraw

    rasterio = load_rasterio()
    with rasterio.open(source) as scene:
        image = decimated(scene, detector.bands)
    picture = Image.fromarray((image * 255).astype(np.uint8))
    factor = picture.width / reader.width
    draw, palette = ImageDraw.Draw(picture), detector.colours()
    for box, label in zip((boxes * factor).tolist(), labels.tolist(), strict=True):
        draw.rectangle(box, outline=palette[label], width=2)
    picture.save(path, format="PNG")
