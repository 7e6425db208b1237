"""A scene's windows as a model's input, read ahead by a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Full, Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_mamba.data.rasters import load_rasterio
from vision_mamba.errors import UserError

from .models import SceneModel
from .windows import Grid


class SceneReader:
    """Windows of the scene as the model's input; checks the raster when it is made."""

    def __init__(
        self, source: str | os.PathLike, model: SceneModel, value_range: Sequence[float] | None = None
    ) -> None:
        # GDAL keeps up to 5 % of the machine's memory in blocks; two rows of windows are all that is read again.
        os.environ.setdefault("GDAL_CACHEMAX", "256")
        self.rasterio = load_rasterio()
        self.path = Path(source)
        self.model = model
        try:
            with self.rasterio.open(source) as scene:
                self._check(scene, value_range)
        except self.rasterio.errors.RasterioError as error:
            raise UserError(f"cannot read {source}: {_line(error)}") from None
        self.offset, self.scale = 0.0, 1.0
        if value_range is not None:
            low, high = value_range
            self.offset, self.scale = low, 255.0 / (high - low)

    def _check(self, scene, value_range) -> None:
        model, path = self.model, self.path
        self.height, self.width = scene.height, scene.width
        self.profile = dict(crs=scene.crs, transform=scene.transform, width=scene.width, height=scene.height)
        self.dtype = scene.dtypes[0]
        alpha = self.rasterio.enums.ColorInterp.alpha
        self.alpha = scene.colorinterp.index(alpha) + 1 if alpha in scene.colorinterp and scene.driver == "PNG" else 0
        count = scene.count - bool(self.alpha)
        wanted = len(model.mean)
        if model.bands is None and count != wanted:
            raise UserError(
                f"{path} has {count} band{'s' * (count != 1)}, the model reads {wanted}; choose them, e.g. "
                f"--bands {' '.join(map(str, range(1, wanted + 1)))}"
            )
        self.bands = list(model.bands or range(1, wanted + 1))
        if max(self.bands) > scene.count:
            raise UserError(f"{path} has {scene.count} bands, numbered from 1; band {max(self.bands)} is asked for")
        if self.dtype.startswith("complex"):
            raise UserError(f"{path} holds complex numbers; a model reads real ones")
        if value_range is None and model.eight_bit and self.dtype != "uint8":
            raise UserError(
                f"{path} holds {self.dtype}, and the model was made for 8-bit images; say which values are black and "
                "white, e.g. --value-range 0 3000"
            )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise UserError(f"value range {value_range[0]} to {value_range[1]}: the first must be below the second")

    def batches(self, grid: Grid, rows: range, batch_size: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(n, bands, window, window) normalised, and (n,) whether a window holds nothing but nodata.

        No batch goes over the end of a window row, so that a resumed run forms the same ones.
        """
        with self.rasterio.open(self.path) as scene:
            for row in rows:
                corners = [(grid.tops[row], left) for left in grid.lefts]
                for i in range(0, len(corners), batch_size):
                    read = [self._read(scene, grid, *corner) for corner in corners[i : i + batch_size]]
                    yield torch.from_numpy(np.stack([x for x, _ in read])), np.array([empty for _, empty in read])

    def _read(self, scene, grid: Grid, top: int, left: int) -> tuple[np.ndarray, bool]:
        box = self.rasterio.windows.Window(
            left, top, min(grid.window, self.width - left), min(grid.window, self.height - top)
        )
        valid = self.valid(scene, box)
        values = scene.read(self.bands, window=box).astype(np.float32)
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.model.mean, self.model.std))
        values = ((values - self.offset) * self.scale - mean) / std
        values[~valid] = 0.0  # the mean
        values = np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        short = [(0, 0), (0, grid.window - values.shape[1]), (0, grid.window - values.shape[2])]
        return np.pad(values, short, mode="edge"), not valid.any()

    def valid(self, scene, box) -> np.ndarray:
        """(bands, h, w): where the scene has a value."""
        valid = scene.read_masks(self.bands, window=box) > 0
        for i, band in enumerate(self.bands):
            flags = scene.mask_flag_enums[band - 1]
            # GDAL takes the fourth of four 8-bit bands for alpha, be it near infrared; only PNG has a real one.
            if self.rasterio.enums.MaskFlags.alpha in flags and not self.alpha:
                valid[i] = True
        if self.dtype == "uint8":  # every value may be a real one: a pixel has no data where no band has any
            valid[:] = valid.any(0)
        if self.dtype.startswith("float"):
            valid &= np.isfinite(scene.read(self.bands, window=box))
        return valid


def ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The items, made by a thread up to ``depth`` ahead; closing the generator ends the thread."""
    queue: Queue = Queue(depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except Exception as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise UserError(f"cannot read the scene: {_line(error)}") from error
            yield item
    finally:
        stop.set()
        thread.join()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
