"""A scene's windows as a model's input, read ahead by a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vision_mamba.data.rasters import load_rasterio
from vision_mamba.errors import UserError

from .models import SceneModel
from .windows import Grid

_READERS = min(8, os.cpu_count() or 1)  # threads that decode
_CACHE = 40 * 2**20  # bytes of blocks that GDAL keeps: a panel's row of the file's tiles, and those that are written


@contextmanager
def gdal_options() -> Iterator[None]:
    """Bounds GDAL's cache, 5 % of the machine's memory by default, and decodes with all threads; also a decorator."""
    with load_rasterio().Env(GDAL_CACHEMAX=_CACHE, GDAL_NUM_THREADS="ALL_CPUS"):
        yield


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor there, without waiting for what the device is still doing; pinned on the way if it is not yet."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


class Batch(NamedTuple):
    """Windows of a scene as they are stored.

    Attributes:
        values: (n, bands, window, window), the raster's type.
        valid: where they are values, of the same shape; None if everywhere.
        empty: (n,) whether a window holds nothing but nodata.
        wanted: which of them were asked for.
    """

    values: Tensor
    valid: Tensor | None
    empty: np.ndarray
    wanted: range


class SceneReader:
    """Windows of the scene as the model's input; checks the raster when it is made."""

    def __init__(
        self, source: str | os.PathLike, model: SceneModel, value_range: Sequence[float] | None = None
    ) -> None:
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
        self.mean, self.std = (
            torch.tensor(list(map(float, v)))[:, None, None].to(model.device) for v in (model.mean, model.std)
        )

    def _check(self, scene, value_range) -> None:
        model, path = self.model, self.path
        self.height, self.width = scene.height, scene.width
        self.profile = dict(crs=scene.crs, transform=scene.transform, width=scene.width, height=scene.height)
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
        kinds = {scene.dtypes[band - 1] for band in self.bands}
        if len(kinds) > 1:
            raise UserError(
                f"{path} has bands of different types ({', '.join(sorted(kinds))}); choose bands of one, e.g. --bands 1"
            )
        self.dtype = kinds.pop()
        if self.dtype.startswith("complex"):
            raise UserError(f"{path} holds complex numbers; a model reads real ones")
        if value_range is None and model.eight_bit and self.dtype != "uint8":
            raise UserError(
                f"{path} holds {self.dtype}, and the model was made for 8-bit images; say which values are black and "
                "white, e.g. --value-range 0 3000"
            )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise UserError(f"value range {value_range[0]} to {value_range[1]}: the first must be below the second")

    def batches(self, grid: Grid, columns: range, rows: range, batch_size: int) -> Generator[Batch, None, None]:
        """Windows of ``columns``, row by row, with those of ``rows`` wanted.

        Batches are counted from the first window of the columns on, so a resumed run forms the same ones; a few
        windows outside of ``rows`` may complete the first and the last.
        """
        tops, lefts, wide = grid.tops, grid.lefts, len(columns)
        wanted = range(rows.start * wide, rows.stop * wide)
        first = wanted.start // batch_size * batch_size
        last = min(-(-wanted.stop // batch_size) * batch_size, len(tops) * wide)
        right = min(lefts[columns[-1]] + grid.window, self.width)
        held: _Held | None = None
        with ExitStack() as stack:
            scenes = [stack.enter_context(self.rasterio.open(self.path)) for _ in range(_READERS)]
            pool = stack.enter_context(ThreadPoolExecutor(_READERS))
            for begin in range(first, last, batch_size):
                numbers = range(begin, min(begin + batch_size, last))
                batch = None
                for i, number in enumerate(numbers):
                    top, left = tops[number // wide], lefts[columns[number % wide]]
                    if held is None or held.top != top:
                        box = top, min(top + grid.window, self.height), lefts[columns[0]], right
                        held = self._read(pool, scenes, held, *box)
                    values, valid = held.window(left - lefts[columns[0]], grid.window)
                    if batch is None:
                        batch = self._batch(len(numbers), values, valid)
                    batch.values[i].numpy()[:] = values
                    if valid is not None and batch.valid is not None:
                        batch.valid[i].numpy()[:] = valid
                        batch.empty[i] = not valid.any()
                assert batch is not None
                inside = [i for i, number in enumerate(numbers) if number in wanted]
                yield batch._replace(wanted=range(inside[0], inside[-1] + 1))

    def _batch(self, count: int, values: np.ndarray, valid: np.ndarray | None) -> Batch:
        """Room for ``count`` windows like the given one."""
        # Pinned, a batch is copied to the GPU while the one before is computed.
        pinned = torch.device(self.model.device).type == "cuda"
        dtype = torch.from_numpy(np.empty(0, values.dtype)).dtype
        return Batch(
            torch.empty(count, *values.shape, dtype=dtype, pin_memory=pinned),
            None if valid is None else torch.empty(count, *valid.shape, dtype=torch.bool, pin_memory=pinned),
            np.zeros(count, bool),
            range(0),
        )

    def _read(self, pool: Executor, scenes: Sequence[Any], held: _Held | None, top, bottom, left, right) -> _Held:
        """The rows from ``top`` to ``bottom``, those that ``held`` has taken from there."""
        begin = max(held.bottom, top) if held else top
        values = np.empty((len(self.bands), bottom - top, right - left), self.dtype)
        valid: np.ndarray | None = np.empty(values.shape, bool)

        def read(scene, box) -> bool:
            """Reads a piece; whether it may lack values."""
            rows, columns = (slice(o - s, o - s + n) for o, s, n in zip(
                (box.row_off, box.col_off), (top, left), (box.height, box.width), strict=True
            ))  # fmt: skip
            piece = scene.read(self.bands, window=box)
            values[:, rows, columns] = piece
            where = self.valid(scene, box, piece)
            if where is not None:
                valid[:, rows, columns] = where
            return where is not None

        # A file of strips is cut into rows, one of tiles into columns: no block is decoded twice.
        high, wide = scenes[0].block_shapes[0]
        if wide < self.width:
            pieces = [(begin, bottom, a, b) for a, b in _shares(left, right, wide, len(scenes))]
        else:
            pieces = [(a, b, left, right) for a, b in _shares(begin, bottom, high, len(scenes))]
        boxes = [self.rasterio.windows.Window(x, y, xx - x, yy - y) for y, yy, x, xx in pieces]
        masked = list(pool.map(read, scenes, boxes))
        if not any(masked):
            valid = None
        if held and begin > top:
            values[:, : begin - top] = held.values[:, top - held.top :]
            if valid is not None and held.valid is not None:
                valid[:, : begin - top] = held.valid[:, top - held.top :]
        return _Held(top, values, valid)

    def normalised(self, batch: Batch) -> Tensor:
        """The model's input on its device, (n, bands, window, window) float32; the mean where there is no value."""
        device = self.model.device
        x = to_device(batch.values, device).to(torch.float32, copy=True)
        x = x.sub_(self.offset).mul_(self.scale).sub_(self.mean).div_(self.std)
        if batch.valid is not None:
            x.masked_fill_(~to_device(batch.valid, device), 0.0)
        return x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) if batch.values.is_floating_point() else x

    def valid(self, scene, box, values: np.ndarray | None = None) -> np.ndarray | None:
        """(bands, h, w): where the scene has a value; None if it has one everywhere. ``values`` are what it has, if
        they have been read."""
        kinds = self.rasterio.enums.MaskFlags
        flags = [scene.mask_flag_enums[band - 1] for band in self.bands]
        # GDAL takes the fourth of four 8-bit bands for alpha, be it near infrared; only PNG has a real one.
        masked = np.array([kinds.all_valid not in f and (kinds.alpha not in f or bool(self.alpha)) for f in flags])
        floating = self.dtype.startswith("float")
        if not masked.any() and not floating:
            return None
        valid = scene.read_masks(self.bands, window=box) > 0
        valid[~masked] = True
        if self.dtype == "uint8":  # every value may be a real one: a pixel has no data where no band has any
            valid[:] = valid.any(0)
        if floating:
            valid &= np.isfinite(scene.read(self.bands, window=box) if values is None else values)
        return valid

    def any_valid(self, box) -> np.ndarray | None:
        """(h, w): where the scene has a value in one of the bands; None if it has one everywhere."""
        with self.rasterio.open(self.path) as scene:
            valid = self.valid(scene, box)
            if valid is None:
                return None
            some = valid.any(0)
            return some & (scene.read(self.alpha, window=box) > 0) if self.alpha else some


@dataclass(frozen=True)
class _Held:
    """Rows of a panel from ``top`` on, as stored: each is read once, though overlapping windows take it."""

    top: int
    values: np.ndarray
    valid: np.ndarray | None

    @property
    def bottom(self) -> int:
        return self.top + self.values.shape[1]

    def window(self, left: int, side: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Values and validity of a window, (bands, side, side); at the end of a small scene the last are repeated."""

        def cut(plane: np.ndarray) -> np.ndarray:
            plane = plane[:, :side, left : left + side]
            short = [(0, 0), (0, side - plane.shape[1]), (0, side - plane.shape[2])]
            return np.pad(plane, short, mode="edge") if plane.shape[1:] != (side, side) else plane

        return cut(self.values), None if self.valid is None else cut(self.valid)


def _shares(begin: int, end: int, block: int, count: int) -> list[tuple[int, int]]:
    """``begin`` to ``end`` in at most ``count`` parts whose borders are multiples of ``block``."""
    first, last = begin // block, -(-end // block)
    count = min(count, last - first)
    borders = [(first + (last - first) * i // count) * block for i in range(count + 1)]
    return [(max(a, begin), min(b, end)) for a, b in zip(borders, borders[1:], strict=False)]


def each_window(
    reader: SceneReader,
    grid: Grid,
    columns: range,
    rows: range,
    batch_size: int,
    look: Callable[[Batch], Any],
    bar: tqdm,
) -> Generator[Any, None, None]:
    """What ``look`` (an item a window of its batch) finds in each window of ``rows``; reading goes ahead of it."""
    with closing(ahead(reader.batches(grid, columns, rows, batch_size), 2)) as batches:
        for batch in batches:
            found = look(batch)
            bar.update(len(batch.wanted))
            for i in batch.wanted:
                yield found[i]


def ahead(items: Generator[Any, None, None], depth: int) -> Generator[Any, None, None]:
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
            with closing(items):  # here: the raster and rasterio's environment are this thread's
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
