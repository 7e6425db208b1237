"""Finding objects in a whole raster: windows, one owner an object, results in map coordinates."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from vision_mamba.data.rasters import load_rasterio
from vision_mamba.engine.distributed import barrier
from vision_mamba.errors import UserError
from vision_mamba.files import replacing

from .models import Detector
from .parts import Parts, Writer
from .products import decimated
from .reader import Batch, SceneReader, each_window, gdal_options
from .windows import Grid


@dataclass(frozen=True)
class Detections:
    """Objects of a scene.

    Attributes:
        boxes: (n, 4) left, top, right, bottom, in pixels of the scene.
        scores: (n,).
        labels: (n,) class numbers.
        files: what was written.
        windows: windows that the model saw in this run.
        seconds: of this run.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    files: list[Path]
    windows: int
    seconds: float


@gdal_options()
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
    resume: bool = False,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
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
        resume: go on with a run that was interrupted.
        overwrite: replace results that exist.
        rank, world_size: this process and how many share the scene; rank 0 writes the results, all return them.
        progress: show windows a second and the time left.

    Raises:
        UserError: the raster cannot be read, has other bands than the model, or results exist; options differ from
            the run to resume; the disk is full.
        ValueError: a window and overlap that do not fit.
    """
    begun = time.monotonic()
    overlap = window // 4 if overlap is None else overlap
    reader = SceneReader(source, detector, value_range)
    grid = Grid(reader.height, reader.width, window, overlap)
    stem = Path(out) / f"{Path(source).stem}_objects"
    files = [stem.with_suffix(suffix) for suffix in (".gpkg", ".json", ".png")]
    options = dict(batch_size=batch_size, score=score, value_range=value_range, classes=list(detector.classes))
    parts = Parts(stem.with_name(f".{stem.name}.partial"), reader, grid, len(grid.tops), options)
    parts.open(files, resume=resume, overwrite=overwrite, rank=rank)
    x_owned, y_owned = _owned(grid.lefts, grid), _owned(grid.tops, grid)
    seen = 0

    def look(batch: Batch) -> list[np.ndarray]:
        """Objects of each window, (n, 6): box in pixels of the window, score, class."""
        nonlocal seen
        seen += len(batch.empty)
        nothing = np.zeros((0, 6))
        if batch.empty.all():
            return [nothing] * len(batch.empty)
        with torch.inference_mode(), detector.autocast():
            found = detector.model(reader.normalised(batch))
        return [
            nothing if empty else torch.cat([boxes.double(), scores[:, None], labels[:, None]], dim=1).cpu().numpy()
            for (boxes, scores, labels), empty in zip(found, batch.empty, strict=True)
        ]

    planned = [
        (panel, rows) for panel in range(len(grid.panels)) for rows in parts.missing(panel, rank, world_size)
    ]  # fmt: skip
    try:
        with parts.progress(source, planned, progress and rank == 0) as bar, Writer() as writer:
            where = [(grid.panels[panel], rows) for panel, rows in planned]
            with closing(each_window(reader, grid, where, batch_size, look, bar)) as windows:
                for panel, rows in planned:
                    columns = grid.panels[panel]
                    for row in rows:
                        kept = []
                        for column in columns:
                            found = next(windows) + np.array([grid.lefts[column], grid.tops[row]] * 2 + [0, 0])
                            x, y = (found[:, 0] + found[:, 2]) / 2, (found[:, 1] + found[:, 3]) / 2
                            (left, right), (top, bottom) = x_owned[column], y_owned[row]
                            inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
                            kept.append(found[inside & (found[:, 4] >= score)])
                        writer.submit(parts.save, parts.path(panel, row), np.concatenate(kept))
            writer.finish()
        barrier()
        found = np.concatenate([
            np.load(parts.path(panel, row)) for panel in range(len(grid.panels)) for row in range(len(grid.tops))
        ])  # fmt: skip
        boxes, scores = torch.from_numpy(found[:, :4]).float(), torch.from_numpy(found[:, 4]).float()
        labels = torch.from_numpy(found[:, 5]).long()
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, reader.width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, reader.height)
        chosen = batched_nms(boxes, scores, labels, iou)
        boxes, scores, labels = boxes[chosen], scores[chosen], labels[chosen]
        if rank == 0:
            with replacing(files[0]) as temporary:
                _write_boxes(temporary, reader, detector.classes, boxes, scores, labels)
            with replacing(files[1]) as temporary:
                temporary.write_text(json.dumps(coco_results(Path(source).name, boxes, scores, labels)) + "\n")
            with replacing(files[2]) as temporary:
                _picture(source, reader, detector, boxes, labels, temporary)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    parts.close(rank)
    return Detections(boxes, scores, labels, files, seen, time.monotonic() - begun)


def _owned(begins: list[int], grid: Grid) -> list[tuple[float, float]]:
    """For the windows of one axis the box centres that each owns: to the middle of each overlap, and beyond the scene
    at its borders."""
    borders = [(a + grid.window + b) / 2 for a, b in zip(begins, begins[1:], strict=False)]
    return list(zip([-math.inf, *borders], [*borders, math.inf], strict=True))


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
