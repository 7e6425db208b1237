"""Segmenting a whole raster: reading, inference and writing overlap; a killed run goes on where it stopped."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vision_mamba.engine.distributed import barrier
from vision_mamba.engine.graphs import CaptureError, InferenceGraph
from vision_mamba.errors import UserError

from .models import TTA, Segmentor
from .parts import Parts, Writer
from .products import NODATA, TILE, Maps, SceneFiles, write_products
from .reader import Batch, Copy, Row, SceneReader, ToHost, each_window, gdal_options, sampled, to_device
from .room import Room
from .stages import Stages
from .windows import Grid, blend_rows, blend_weights

STRIP = TILE  # pixel rows that are stored at once
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
        inference_seconds: of these, until the last window's rows were stored; then the results were put together.
        stages: seconds of each stage. "wait for reading" and "wait for storing" are those in which no window could be
            handed to the device; "read", "device" (waiting for its results), "store" and "collect" (pixels for the
            maps; those of an earlier run or of another process after the last window) are of other threads; "maps",
            "picture" (beside the maps) and "polygons" follow the last window.
    """

    files: SceneFiles
    hectares: dict[str, float] | None
    pixels: dict[str, int]
    windows: int
    seconds: float
    inference_seconds: float
    stages: dict[str, float]


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
    cuda_graphs: bool | None = None,
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
        cuda_graphs: replay the model's passes as a CUDA graph, as most models wait for Python in small batches. None:
            on a GPU, where the model can be captured; it must not look at values on the host.
        progress: show windows a second and the time left.

    Raises:
        UserError: the raster cannot be read, has other bands than the model, or holds nothing but nodata;
            results exist; options differ from the run to resume; the disk is full; ``cuda_graphs`` without a GPU, or
            for a model that cannot be captured.
        ValueError: an unknown ``blend``, ``tta`` or ``polygons``, a window and overlap that do not fit.
    """
    if tta not in TTA:
        raise ValueError(f"tta={tta!r}: allowed are {', '.join(map(repr, TTA))}")
    if polygons not in (None, "gpkg", "geojson"):
        raise ValueError(f"polygons={polygons!r}: allowed are 'gpkg', 'geojson' and None")
    if cuda_graphs and torch.device(segmentor.device).type != "cuda":
        raise UserError(f"cuda_graphs wants a GPU, and the model is on {segmentor.device}")
    overlap = window // 4 if overlap is None else overlap
    begun = time.monotonic()
    reader = SceneReader(source, segmentor, value_range)
    stages = reader.stages
    grid = Grid(reader.height, reader.width, window, overlap)
    weights = blend_weights(window, overlap, blend).to(segmentor.device)
    files = SceneFiles.plan(source, out, confidence=confidence, probabilities=probabilities, polygons=polygons)
    options = dict(
        batch_size=batch_size, blend=blend, tta=tta, scales=list(scales), value_range=value_range,
        confidence=confidence, probabilities=probabilities, classes=list(segmentor.classes),
    )  # fmt: skip
    parts = Parts(files.work, reader, grid, -(-grid.height // STRIP), options)
    parts.open(files.results(), resume=resume, overwrite=overwrite, rank=rank)
    views, num_classes = TTA[tta], len(segmentor.classes)
    seen, begun_rows = 0, dict[int, Row]()

    def weighted(x: Tensor) -> Tensor:
        return segmentor.probabilities(x, views, scales).mul_(weights)

    graph = None if cuda_graphs is False or torch.device(segmentor.device).type != "cuda" else InferenceGraph(weighted)

    def passed(x: Tensor) -> Tensor:
        nonlocal graph
        try:
            return weighted(x) if graph is None else graph(x)
        except CaptureError as error:
            if cuda_graphs:
                raise UserError(f"the model {error}; leave cuda_graphs out") from error
            warnings.warn(f"{source}: runs eagerly, for the model {error}", stacklevel=2)
            graph = None
            return weighted(x)

    def finish(scores: Tensor, valid: np.ndarray | None) -> Tensor:
        best, index = scores.max(0)
        planes = [index.to(torch.uint8), best.mul_(_FRACTIONS).round_().to(torch.uint8)]
        if probabilities:
            planes += list(scores.mul_(_FRACTIONS).round_().to(torch.uint8))
        found = torch.stack(planes)
        return found if valid is None else found.masked_fill_(~to_device(torch.from_numpy(valid), found.device), NODATA)

    def look(batch: Batch) -> Tensor:
        nonlocal seen
        seen += len(batch.empty)
        begun_rows.update(batch.rows)
        if batch.empty.all():
            return (weights / num_classes).expand(len(batch.empty), num_classes, -1, -1)
        x = reader.normalised(batch)
        if len(x) < batch_size:
            # Always the same shape: some exported models take no other, and no kernel is chosen anew.
            x = F.pad(x, (0, 0) * 3 + (0, batch_size - len(x)))
        with torch.inference_mode():
            return passed(x)[: len(batch.empty)]

    planned = [
        (panel, run, grid.rows_for(run.start * STRIP, min(run.stop * STRIP, grid.height)))
        for panel in range(len(grid.panels)) for run in parts.missing(panel, rank, world_size)
    ]  # fmt: skip
    maps = Maps(files, reader.profile, segmentor) if rank == 0 else None
    strips, rooms = _Strips(parts, maps, stages, segmentor.device), [Room(segmentor.device) for _ in range(2)]
    bar = parts.progress(source, [(panel, rows) for panel, _, rows in planned], progress and rank == 0)
    try:
        # Entered here too, for all of it: what autocast casts of the weights is kept until then.
        with bar, maps or nullcontext(), strips, segmentor.autocast():
            where = [(grid.panels[panel], rows) for panel, _, rows in planned]
            with closing(each_window(reader, grid, where, batch_size, look, bar)) as scores:
                for panel, run, rows in planned:
                    columns = grid.panels[panel]
                    blended = blend_rows(
                        grid, rows, scores, weights, columns=columns,
                        load_edge=partial(strips.load_edge, panel - 1, segmentor.device) if panel else None,
                        save_edge=partial(strips.save_edge, panel) if columns.stop < len(grid.lefts) else None,
                        rooms=rooms,
                    )  # fmt: skip

                    def finished(panel=panel, rows=rows, blended=blended) -> Iterator[tuple[int, Tensor]]:
                        for row in rows:
                            top, mean = next(blended)
                            valid, view = begun_rows.pop(row)
                            strips.save_view(panel, row, view)
                            yield top, finish(mean, valid)
                        begun_rows.clear()  # the last batch of the group may hold windows that were not asked for

                    strips.store(panel, run, finished())
                    strips.submit(strips.remove_edges, panel, rows)
            strips.finish()
            inference = time.monotonic() - begun
            barrier()
            if maps is not None:
                strips.collect_rest(maps)
                pixels, hectares = write_products(
                    maps, strips.view, stages, source=source, simplify=simplify, min_area=min_area
                )
    except OSError as error:
        raise UserError(f"cannot write to {files.work.parent}: {error.strerror or error}") from error
    parts.close(rank)
    if rank > 0:
        return SceneReport(files, None, {}, seen, time.monotonic() - begun, inference, dict(stages.seconds))
    return SceneReport(files, hectares, pixels, seen, time.monotonic() - begun, inference, dict(stages.seconds))


class _Strips:
    """Finished rows of the scene, ``STRIP`` to a part, what neighbouring groups of window columns share, and the maps,
    which take what is stored (None in all processes but the first)."""

    def __init__(self, parts: Parts, maps: Maps | None, stages: Stages, device: torch.device | str) -> None:
        self.parts, self.maps, self.grid, self.stages = parts, maps, parts.grid, stages
        self._writer, self._collector = Writer(), Writer()
        self._part, self._parts_to_host, self._edges_to_host = Room(device), ToHost(), ToHost()
        self._edges: dict[Path, Future] = {}
        self._collected: set[tuple[int, int]] = set()

    def __enter__(self) -> _Strips:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self._writer, self._collector):
            writer.close()

    def finish(self) -> None:
        """Waits until all is stored, and raises what went wrong."""
        with self.stages("wait for storing"):
            for writer in (self._writer, self._collector):
                writer.finish()

    def submit(self, job: Callable[..., None], *args: Any) -> Future:
        """One thread stores in order: no part is there before what its neighbour, or the picture, needs of its rows."""
        with self.stages("wait for storing"):
            return self._writer.submit(job, *args)

    def store(self, panel: int, run: range, blocks: Iterator[tuple[int, Tensor]]) -> None:
        """Cuts blocks of rows (planes, rows, width) into the parts of ``run``; what lies outside is dropped."""
        first, last = run.start * STRIP, min(run.stop * STRIP, self.grid.height)
        filled, top = 0, first
        for start, block in blocks:
            block = block[:, max(first - start, 0) : max(last - start, 0)]
            while block.shape[1]:
                rows = min(STRIP, last - top)
                part = self._part.take((len(block), rows, block.shape[2]), block.dtype, self.grid.widest)
                taken = block[:, : rows - filled]
                part[:, filled : filled + taken.shape[1]] = taken
                filled, block = filled + taken.shape[1], block[:, taken.shape[1] :]
                if filled == rows:
                    self.submit(self._save, panel, top // STRIP, self._parts_to_host.begin(part))
                    filled, top = 0, top + rows

    def _store(self, path: Path, found: Copy, to_host: ToHost) -> None:
        with self.stages("device"):
            array = found.wait()
        with self.stages("store"):
            self.parts.save(path, array)
        to_host.give_back(found)

    def _save(self, panel: int, index: int, found: Copy) -> None:
        self._store(self.parts.path(panel, index), found, self._parts_to_host)
        if self.maps is not None:
            self._collector.submit(self._collect, self.maps, panel, index)

    def _collect(self, maps: Maps, panel: int, index: int) -> None:
        with self.stages("collect"):
            planes = np.load(self.parts.path(panel, index), mmap_mode="r")  # what waits to be collected is in no memory
            maps.add(index * STRIP, self.grid.pixels(self.grid.panels[panel]).start, planes)
            self._collected.add((panel, index))

    def collect_rest(self, maps: Maps) -> None:
        """The maps take what an earlier run or another process stored."""
        for panel in range(len(self.grid.panels)):
            for index in range(self.parts.count):
                if (panel, index) not in self._collected:
                    self._collect(maps, panel, index)

    def _view(self, panel: int, row: int) -> Path:
        return self.parts.folder / f"view-{panel:03d}-{row:06d}.npy"

    def save_view(self, panel: int, row: int, view: np.ndarray) -> None:
        self.submit(self.parts.save, self._view(panel, row), view)

    def view(self) -> np.ndarray:
        """The scene as a small picture shows it, (3, rows, columns) float32, NaN where there is no data."""
        found, top = np.empty((3, *map(len, sampled(self.grid.height, self.grid.width))), np.float32), 0
        for row in range(len(self.grid.tops)):
            lines = [np.load(self._view(panel, row)) for panel in range(len(self.grid.panels))]
            bottom = top + lines[0].shape[1]
            np.concatenate(lines, axis=2, out=found[:, top:bottom])
            top = bottom
        return found

    def _edge(self, panel: int, row: int) -> Path:
        return self.parts.folder / f"edge-{panel:03d}-{row:06d}.npy"

    def load_edge(self, panel: int, device: torch.device | str, row: int) -> Tensor:
        path = self._edge(panel, row)
        if path in self._edges:  # else it is of another run
            with self.stages("wait for storing"):
                self._edges.pop(path).result()
        return to_device(torch.from_numpy(np.load(path)), device)

    def save_edge(self, panel: int, row: int, scores: Tensor) -> None:
        path = self._edge(panel, row)
        self._edges[path] = self.submit(self._store, path, self._edges_to_host.begin(scores), self._edges_to_host)

    def remove_edges(self, panel: int, rows: range) -> None:
        """Of the columns before ``panel``, where no part of ``panel`` waits for them any more."""
        for row in rows if panel else ():
            top = self.grid.tops[row]
            touched = range(top // STRIP, -(-min(top + self.grid.window, self.grid.height) // STRIP))
            if all(self.parts.path(panel, index).exists() for index in touched):
                self._edge(panel - 1, row).unlink(missing_ok=True)  # another process may have been here
