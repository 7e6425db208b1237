"""Segmenting a whole raster: reading, inference and writing overlap; a killed run goes on where it stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vision_mamba.engine.distributed import barrier
from vision_mamba.errors import UserError

from .models import TTA, Segmentor
from .parts import Parts, Writer
from .products import NODATA, SceneFiles, write_products
from .reader import Batch, SceneReader, each_window, gdal_options, to_device
from .windows import Grid, blend_rows, blend_weights, weigh

STRIP = 512  # pixel rows that are stored at once: the height of a tile of the output
_BLOCK = 4096  # pixel columns that are written at once
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
        inference_seconds: of these, until the last window's rows were stored; then the results were written.
    """

    files: SceneFiles
    hectares: dict[str, float] | None
    pixels: dict[str, int]
    windows: int
    seconds: float
    inference_seconds: float


@gdal_options()
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

    Memory does not grow with the scene; windows overlap and their probabilities are blended, so that no seams
    show.

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
        batch_size=batch_size, blend=blend, tta=tta, scales=list(scales), value_range=value_range,
        probabilities=probabilities, classes=list(segmentor.classes),
    )  # fmt: skip
    parts = Parts(files.work, reader, grid, -(-grid.height // STRIP), options)
    parts.open(files.results(), resume=resume, overwrite=overwrite, rank=rank)
    strips = _Strips(parts, reader)

    views, num_classes = TTA[tta], len(segmentor.classes)
    seen = 0

    def finish(scores: Tensor) -> Tensor:
        best, index = scores.max(0)
        planes = [index.to(torch.uint8), (best * _FRACTIONS).round().to(torch.uint8)]
        if probabilities:
            planes += list((scores * _FRACTIONS).round().to(torch.uint8))
        return torch.stack(planes)

    def look(batch: Batch) -> Tensor:
        nonlocal seen
        seen += len(batch.empty)
        if batch.empty.all():
            size = len(batch.empty), num_classes, window, window
            return weigh(torch.full(size, 1 / num_classes, device=segmentor.device), weights)
        x = reader.normalised(batch)
        if len(x) < batch_size:
            # Always the same shape: some exported models take no other, and no kernel is chosen anew.
            x = F.pad(x, (0, 0) * 3 + (0, batch_size - len(x)))
        with torch.inference_mode():
            scores = segmentor.probabilities(x, views, scales)
        return weigh(scores[: len(batch.empty)], weights)

    planned = [
        (panel, run, grid.rows_for(run.start * STRIP, min(run.stop * STRIP, grid.height)))
        for panel in range(len(grid.panels)) for run in parts.missing(panel, rank, world_size)
    ]  # fmt: skip
    try:
        with parts.progress(source, [(panel, rows) for panel, _, rows in planned], progress and rank == 0) as bar:
            with Writer() as writer:
                for panel, run, rows in planned:
                    columns = grid.panels[panel]
                    load = partial(strips.load_edge, panel - 1, segmentor.device) if panel else None
                    save = partial(strips.save_edge, panel, writer) if columns.stop < len(grid.lefts) else None
                    with closing(each_window(reader, grid, columns, rows, batch_size, look, bar)) as scores:
                        blended = blend_rows(grid, rows, scores, columns=columns, load_edge=load, save_edge=save)
                        strips.store(panel, run, ((top, finish(mean)) for top, mean in blended), writer)
                    strips.remove_edges(panel, rows)
        inference = time.monotonic() - begun
        barrier()
        if rank == 0:
            pixels, hectares = write_products(
                files, reader.profile, strips.blocks, segmentor, simplify=simplify, min_area=min_area, source=source
            )
    except OSError as error:
        raise UserError(f"cannot write to {files.work.parent}: {error.strerror or error}") from error
    parts.close(rank)
    if rank > 0:
        return SceneReport(files, None, {}, seen, time.monotonic() - begun, inference)
    return SceneReport(files, hectares, pixels, seen, time.monotonic() - begun, inference)


class _Strips:
    """Finished rows of the scene, ``STRIP`` to a part, and what neighbouring groups of window columns share."""

    def __init__(self, parts: Parts, reader: SceneReader) -> None:
        self.parts, self.reader, self.grid = parts, reader, parts.grid

    def store(self, panel: int, run: range, blocks: Iterator[tuple[int, Tensor]], writer: Writer) -> None:
        """Cuts blocks of rows (planes, rows, width) into the parts of ``run``; what lies outside is dropped."""
        first, last = run.start * STRIP, min(run.stop * STRIP, self.grid.height)
        pending, top = None, first
        for start, block in blocks:
            block = block[:, max(first - start, 0) : max(last - start, 0)]
            pending = block if pending is None else torch.cat([pending, block], dim=1)
            while pending.shape[1] >= min(STRIP, last - top) > 0:
                rows = min(STRIP, last - top)
                writer.submit(self._save, panel, top // STRIP, pending[:, :rows].clone())
                pending, top = pending[:, rows:], top + rows
        writer.finish()

    def _save(self, panel: int, index: int, found: Tensor) -> None:
        planes = found.cpu().numpy()
        columns = self.grid.pixels(self.grid.panels[panel])
        box = self.reader.rasterio.windows.Window(columns.start, index * STRIP, len(columns), planes.shape[1])
        valid = self.reader.any_valid(box)
        if valid is not None:
            planes[:, ~valid] = NODATA
        self.parts.save(self.parts.path(panel, index), planes)

    def _edge(self, panel: int, row: int) -> Path:
        return self.parts.folder / f"edge-{panel:03d}-{row:06d}.npy"

    def load_edge(self, panel: int, device: torch.device | str, row: int) -> Tensor:
        return to_device(torch.from_numpy(np.load(self._edge(panel, row))), device)

    def save_edge(self, panel: int, writer: Writer, row: int, scores: Tensor) -> None:
        # The same thread stores parts: no part is there before what its neighbour needs of its rows.
        path = self._edge(panel, row)
        writer.submit(lambda kept: self.parts.save(path, kept.cpu().numpy()), scores.clone())

    def remove_edges(self, panel: int, rows: range) -> None:
        """Of the columns before ``panel``, where no part of ``panel`` waits for them any more."""
        for row in rows if panel else ():
            top = self.grid.tops[row]
            touched = range(top // STRIP, -(-min(top + self.grid.window, self.grid.height) // STRIP))
            if all(self.parts.path(panel, index).exists() for index in touched):
                self._edge(panel - 1, row).unlink(missing_ok=True)  # another process may have been here

    def blocks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """First row, first column and planes, in blocks that are whole tiles of the output, in row order."""
        panels = [self.grid.pixels(columns) for columns in self.grid.panels]
        for index in range(self.parts.count):
            stored = [np.load(self.parts.path(i, index), mmap_mode="r") for i in range(len(panels))]
            for left in range(0, self.grid.width, _BLOCK):
                pieces = [
                    planes[:, :, max(left - here.start, 0) : max(left + _BLOCK - here.start, 0)]
                    for here, planes in zip(panels, stored, strict=True)
                ]
                yield index * STRIP, left, np.concatenate(pieces, axis=2)
