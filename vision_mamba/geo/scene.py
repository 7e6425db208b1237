"""Segmenting a whole raster: reading, inference and writing overlap; a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vision_mamba.engine.distributed import barrier
from vision_mamba.errors import UserError

from .models import TTA, Segmentor
from .products import NODATA, SceneFiles, write_products
from .reader import SceneReader, ahead
from .windows import Grid, blend_rows, blend_weights

STRIP = 512  # pixel rows that are stored at once: the height of a tile of the output
_FRACTIONS = 254  # confidence and probabilities: 0 to 254 for 0 to 1, 255 for nodata


@dataclass(frozen=True)
class SceneReport:
    """What :func:`segment_raster` made.

    Attributes:
        files: paths of the outputs.
        hectares: area a class; None without a coordinate system.
        pixels: pixels a class.
        windows: windows that the model saw in this run.
        seconds: of this run.
    """

    files: SceneFiles
    hectares: dict[str, float] | None
    pixels: dict[str, int]
    windows: int
    seconds: float


def segment_raster(
    source: str | os.PathLike,
    out: str | os.PathLike,
    segmentor: Segmentor,
    *,
    window: int = 512,
    overlap: int | None = None,
    batch_size: int = 4,
    blend: str = "cosine",
    tta: str = "none",
    scales: Sequence[float] = (1.0,),
    value_range: tuple[float, float] | None = None,
    confidence: bool = True,
    probabilities: bool = False,
    polygons: str | None = None,
    simplify: float = 1.0,
    min_area: float = 0.0,
    resume: bool = False,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> SceneReport:
    """Class map of a raster of any size, in its own coordinates.

    Host memory is a few strips of the scene's width whatever its height; windows overlap and their
    probabilities are blended, so that no seams show.

    Args:
        source: GeoTIFF, COG, VRT, JPEG2000, PNG, JPEG: whatever GDAL opens.
        out: folder for the results, each named after the source.
        segmentor: the model and its input.
        window: side of a window in pixels.
        overlap: pixels that neighbours share; a quarter of the window if None.
        batch_size: windows in one forward pass.
        blend: ``"cosine"`` or ``"gaussian"``.
        tta: ``"none"``, ``"flips"`` (4 views) or ``"turns"`` (8).
        scales: of the windows, for multi-scale inference.
        value_range: values of the raster that become 0 and 255, for a model of 8-bit images on other numbers.
        confidence: write the probability of the chosen class, 0 to 254 for 0 to 1.
        probabilities: write those of all classes, alike.
        polygons: ``"gpkg"`` or ``"geojson"`` for outlines of the classes; None for none.
        simplify: by how many pixels outlines may deviate; 0 keeps them exact.
        min_area: smallest polygon, in square metres (square pixels without a coordinate system).
        resume: go on with a run that was interrupted.
        overwrite: replace results that exist.
        rank, world_size: this process and how many share the scene; rank 0 writes the results.
        progress: show windows a second and the time left.

    Raises:
        UserError: the raster cannot be read, has other bands than the model, or holds nothing but nodata;
            results exist; options differ from the run to resume; the disk is full.
        ValueError: an unknown ``blend``, ``tta`` or ``polygons``, a window and overlap that do not fit.
    """
    if tta not in TTA:
        raise ValueError(f"tta={tta!r}: allowed are {', '.join(map(repr, TTA))}")
    if polygons not in (None, "gpkg", "geojson"):
        raise ValueError(f"polygons={polygons!r}: allowed are 'gpkg', 'geojson' and None")
    overlap = window // 4 if overlap is None else overlap
    begun = time.monotonic()
    reader = SceneReader(source, segmentor, value_range)
    grid = Grid(reader.height, reader.width, window, overlap)
    weights = blend_weights(window, overlap, blend).to(segmentor.device)
    files = SceneFiles.plan(source, out, confidence=confidence, probabilities=probabilities, polygons=polygons)
    options = dict(
        window=window, overlap=overlap, batch_size=batch_size, blend=blend, tta=tta, scales=list(scales),
        value_range=value_range, probabilities=probabilities, classes=list(segmentor.classes),
    )  # fmt: skip
    strips = _Strips(files.work, reader, options)
    if rank == 0:
        files.check(overwrite)
        strips.open(resume=resume, overwrite=overwrite)
    barrier()

    views, num_classes = TTA[tta], len(segmentor.classes)
    total = len(grid.tops) * len(grid.lefts)
    seen = 0
    share = strips.missing(rank, world_size)
    planned = [(run, grid.rows_for(run.start * STRIP, min(run.stop * STRIP, grid.height))) for run in share]
    count = sum(len(rows) for _, rows in planned) * len(grid.lefts)
    bar = tqdm(
        total=total, initial=max(total - count, 0) if world_size == 1 else 0, unit=" windows",
        desc=Path(source).name, disable=not progress or rank > 0,
    )  # fmt: skip

    def finish(scores: Tensor) -> Tensor:
        best, index = scores.max(0)
        planes = [index.to(torch.uint8), (best * _FRACTIONS).round().to(torch.uint8)]
        if probabilities:
            planes += list((scores * _FRACTIONS).round().to(torch.uint8))
        return torch.stack(planes)

    def scores(batches: Iterator[tuple[Tensor, np.ndarray]]) -> Iterator[Tensor]:
        nonlocal seen
        for x, empty in batches:
            if empty.all():
                found = torch.full((len(x), num_classes, window, window), 1 / num_classes, device=segmentor.device)
            else:
                # Always the same shape: some exported models take no other, and no kernel is chosen anew.
                full = F.pad(x, (0, 0) * 3 + (0, batch_size - len(x)))
                with torch.inference_mode():
                    found = segmentor.probabilities(full.to(segmentor.device, non_blocking=True), views, scales)
            seen += len(x)
            bar.update(len(x))
            yield from found[: len(x)]

    try:
        with bar, ThreadPoolExecutor(1) as writer:
            for run, rows in planned:
                with closing(ahead(reader.batches(grid, rows, batch_size), 2)) as batches:
                    blended = blend_rows(grid, rows, scores(batches), weights, finish)
                    strips.store(run, ((top, planes.cpu().numpy()) for top, planes in blended), writer)
        barrier()
        if rank > 0:
            barrier()
            return SceneReport(files, None, {}, seen, time.monotonic() - begun)
        pixels, hectares = write_products(
            files, reader.profile, strips.read, segmentor, simplify=simplify, min_area=min_area, source=source
        )
    except OSError as error:
        raise UserError(f"cannot write to {files.work.parent}: {error.strerror or error}") from error
    shutil.rmtree(files.work)
    barrier()
    return SceneReport(files, hectares, pixels, seen, time.monotonic() - begun)


class _Strips:
    """Finished rows of the scene, in files of ``STRIP`` rows each, beside the results until these are whole."""

    def __init__(self, folder: Path, reader: SceneReader, options: dict[str, Any]) -> None:
        self.folder, self.reader = folder, reader
        self.height = reader.height
        self.count = -(-self.height // STRIP)
        status = os.stat(reader.path) if reader.path.exists() else None
        self.plan = {
            **json.loads(json.dumps(options)),
            "source": str(reader.path.resolve()),
            "size": [reader.height, reader.width],
            "modified": status.st_mtime_ns if status else None,
        }

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def open(self, *, resume: bool, overwrite: bool) -> None:
        plan = self.folder / "plan.json"
        if self.folder.exists() and resume:
            old = json.loads(plan.read_text()) if plan.exists() else {}
            changed = [key for key in self.plan if old.get(key) != self.plan[key]]
            if changed:
                raise UserError(
                    f"{self.folder} was begun with another {', '.join(changed)}; give the same options, or --overwrite"
                )
        elif self.folder.exists() and not overwrite:
            raise UserError(
                f"{self.folder} is of an interrupted run; --resume goes on with it, --overwrite starts anew"
            )
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = plan.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.plan))
        temporary.replace(plan)

    def missing(self, rank: int, world_size: int) -> list[range]:
        """This process's runs of consecutive strips that are still to be made."""
        mine = range(self.count * rank // world_size, self.count * (rank + 1) // world_size)
        runs: list[range] = []
        for index in mine:
            if self.path(index).exists():
                continue
            if runs and runs[-1].stop == index:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        return runs

    def store(self, run: range, blocks: Iterator[tuple[int, np.ndarray]], writer: ThreadPoolExecutor) -> None:
        """Cuts blocks of rows (planes, rows, width) into the strips of ``run``; what lies outside is dropped."""
        first, last = run.start * STRIP, min(run.stop * STRIP, self.height)
        pending, top, waiting = None, first, []
        for start, block in blocks:
            block = block[:, max(first - start, 0) : max(last - start, 0)]
            pending = block if pending is None else np.concatenate([pending, block], axis=1)
            while pending.shape[1] >= min(STRIP, last - top) > 0:
                rows = min(STRIP, last - top)
                waiting.append(writer.submit(self._save, top // STRIP, pending[:, :rows].copy()))
                pending, top = pending[:, rows:], top + rows
                while len(waiting) > 2:  # bounds what waits in memory, and brings a full disk to light
                    waiting.pop(0).result()
        for job in waiting:
            job.result()

    def _save(self, index: int, planes: np.ndarray) -> None:
        box = self.reader.rasterio.windows.Window(0, index * STRIP, planes.shape[2], planes.shape[1])
        with self.reader.rasterio.open(self.reader.path) as scene:
            valid = self.reader.valid(scene, box).any(0)
            if self.reader.alpha:
                valid &= scene.read(self.reader.alpha, window=box) > 0
        planes[:, ~valid] = NODATA
        temporary = self.path(index).with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.save(file, planes)
        temporary.replace(self.path(index))

    def read(self) -> Iterator[tuple[int, np.ndarray]]:
        """First row and planes of each strip."""
        for index in range(self.count):
            yield index * STRIP, np.load(self.path(index))
