"""A scene's windows as a model's input, read ahead by a thread."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from .room import Room
from .stages import Stages
from .windows import Grid

_READERS = min(8, os.cpu_count() or 1)  # threads that decode
_PICTURE = 1600  # pixels of the longer side of a small picture of a scene, at most
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


class Copy(NamedTuple):
    """A tensor's copy on the host, and when it is there; None for at once."""

    room: Room
    host: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> np.ndarray:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.numpy()


class ToHost:
    """Copies to the host, in memory that is used again; pinned if they come from a GPU."""

    def __init__(self) -> None:
        self._spare: deque[Room] = deque()

    def begin(self, tensor: Tensor) -> Copy:
        """Does not wait for the device."""
        cuda = tensor.device.type == "cuda"
        room = self._spare.popleft() if self._spare else Room(pinned=cuda)
        host = room.take(tensor.shape, tensor.dtype)
        host.copy_(tensor.contiguous() if cuda else tensor, non_blocking=True)
        copied = None
        if cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(tensor.device))
        return Copy(room, host, copied)

    def give_back(self, copy: Copy) -> None:
        """The copy is no longer needed; for any thread."""
        self._spare.append(copy.room)


def sampled(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of a scene that a small picture of it shows, at most 1600 a side."""
    factor = max(height, width, _PICTURE) / _PICTURE
    rows, columns = (
        ((np.arange(count) + 0.5) * length / count).astype(int)
        for length in (height, width)
        for count in (max(round(length / factor), 1),)
    )
    return rows, columns


class Row(NamedTuple):
    """What is known of the pixel rows that a row of windows finishes, for the pixel columns of its group.

    Attributes:
        valid: (rows, columns) where the scene has a value in one of the bands; None if everywhere.
        view: (3, rows, columns) float32, the pixels among them that a small picture shows (see :func:`sampled`), NaN
            where there is none.
    """

    valid: np.ndarray | None
    view: np.ndarray


class Batch(NamedTuple):
    """Windows of a scene.

    Attributes:
        room: (n or more, bands, window, window) float32 on the model's device, where :meth:`SceneReader.normalised`
            finds them.
        copied: when they are there; None on a CPU.
        empty: (n,) whether a window holds nothing but nodata.
        wanted: which of them were asked for.
        rows: the rows of windows that begin in this batch, by their number.
    """

    room: Tensor
    copied: torch.cuda.Event | None
    empty: np.ndarray
    wanted: range
    rows: dict[int, Row]


class SceneReader:
    """Windows of the scene as the model's input; checks the raster when it is made."""

    def __init__(
        self,
        source: str | os.PathLike,
        model: SceneModel,
        value_range: Sequence[float] | None = None,
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
        self.device = self.mean.device  # with its number, which another thread would not know
        # Windows are copied and normalised beside what the model computes.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._spare: deque[tuple[Tensor, Any]] = deque()  # room for batches, and when the device is done with it
        self._rows = [_Rows(self.device, pinned=self._stream is not None) for _ in range(2)]
        self.sampled = sampled(self.height, self.width)
        self.stages = Stages()

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
        kinds = self.rasterio.enums.MaskFlags
        flags = [scene.mask_flag_enums[band - 1] for band in self.bands]
        # GDAL takes the fourth of four 8-bit bands for alpha, be it near infrared; only PNG has a real one.
        real = [kinds.alpha not in f or bool(self.alpha) for f in flags]
        self._masked = np.array([kinds.all_valid not in f and r for f, r in zip(flags, real, strict=True)])
        self._floating = self.dtype.startswith("float")
        self.may_lack_values = bool(self._masked.any()) or self._floating
        if value_range is None and model.eight_bit and self.dtype != "uint8":
            raise UserError(
                f"{path} holds {self.dtype}, and the model was made for 8-bit images; say which values are black and "
                "white, e.g. --value-range 0 3000"
            )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise UserError(f"value range {value_range[0]} to {value_range[1]}: the first must be below the second")

    def batches(
        self, grid: Grid, planned: Iterable[tuple[range, range]], batch_size: int
    ) -> Generator[Batch, None, None]:
        """Windows of each (columns, rows) of ``planned``, row by row.

        Batches are counted from the first window of the columns on, so a resumed run forms the same ones; a few
        windows outside of ``rows`` may complete the first and the last.
        """
        with ExitStack() as stack:
            scenes = [stack.enter_context(self.rasterio.open(self.path)) for _ in range(_READERS)]
            pool = stack.enter_context(ThreadPoolExecutor(_READERS))
            for columns, rows in planned:
                yield from self._batches(pool, scenes, grid, columns, rows, batch_size)

    def _batches(
        self, pool: Executor, scenes: Sequence[Any], grid: Grid, columns: range, rows: range, batch_size: int
    ) -> Generator[Batch, None, None]:
        tops, lefts, wide = [*grid.tops, self.height], grid.lefts, len(columns)
        wanted = range(rows.start * wide, rows.stop * wide)
        first = wanted.start // batch_size * batch_size
        last = min(-(-wanted.stop // batch_size) * batch_size, len(grid.tops) * wide)
        right = min(lefts[columns[-1]] + grid.window, self.width)
        held: _Held | None = None
        for begin in range(first, last, batch_size):
            numbers = range(begin, min(begin + batch_size, last))
            room = self._room((batch_size, len(self.bands), grid.window, grid.window))
            empty, begun = np.zeros(len(numbers), bool), dict[int, Row]()
            for i, number in enumerate(numbers):
                row, column = number // wide, columns[number % wide]
                left = lefts[column] - lefts[columns[0]]
                if held is None or held.top != tops[row]:
                    box = tops[row], min(tops[row] + grid.window, self.height), lefts[columns[0]], right
                    self._rows.reverse()  # the others still have what the two share
                    self._rows[0].wait()
                    with self.stages("read"):
                        held = self._read(pool, scenes, held, self._rows[0], grid, *box)
                if number % wide == 0:
                    begun[row] = held.finished(tops[row + 1], len(grid.pixels(columns)))
                with torch.cuda.stream(self._stream):  # not over a yield: it is this thread's, for all it does
                    room[i].copy_(held.inputs[:, :, left : left + grid.window])
                if held.valid is not None:
                    empty[i] = not held.valid[:, left : left + grid.window].any()
            copied = None
            if self._stream is not None:
                copied = torch.cuda.Event()
                copied.record(self._stream)
            inside = [i for i, number in enumerate(numbers) if number in wanted]
            yield Batch(room, copied, empty, range(inside[0], inside[-1] + 1), begun)

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        """Room for a batch, that of one given back if there is one."""
        with torch.cuda.stream(self._stream):
            while self._spare:
                room, used = self._spare.popleft()
                if room.shape == shape:
                    if self._stream is not None:
                        self._stream.wait_event(used)
                    return room
            return torch.empty(shape, device=self.device)

    def give_back(self, batch: Batch) -> None:
        """The batch's room is for another when what this thread has told the device to do is done."""
        used = None
        if self._stream is not None:
            used = torch.cuda.Event()
            used.record(torch.cuda.current_stream(self.device))
        self._spare.append((batch.room, used))

    def _read(self, pool: Executor, scenes: Sequence[Any], held: _Held | None, room: _Rows, grid: Grid, *box: int):
        """The rows and columns of ``box`` (top, bottom, left, right), as :class:`_Held`; what ``held`` has of them is
        taken from there."""
        top, bottom, left, right = box
        begin = max(held.bottom, top) if held else top
        bands, high, wide, kept = len(self.bands), bottom - top, right - left, begin - top
        shape = bands, high - kept, wide
        values = room.values.take(shape, torch.from_numpy(np.empty(0, self.dtype)).dtype, grid.widest)
        valid = room.valid.take(shape, torch.bool, grid.widest) if self.may_lack_values else None
        some = np.empty(shape[1:], bool) if self.may_lack_values else None

        def read(scene, box) -> None:
            rows, columns = (slice(o - s, o - s + n) for o, s, n in zip(
                (box.row_off, box.col_off), (begin, left), (box.height, box.width), strict=True
            ))  # fmt: skip
            piece = values.numpy()[:, rows, columns]
            scene.read(self.bands, window=box, out=piece)
            if valid is not None and some is not None:
                valid.numpy()[:, rows, columns] = where = self._valid(scene, box, piece)
                some[rows, columns] = where.any(0)
                if self.alpha:
                    some[rows, columns] &= scene.read(self.alpha, window=box) > 0

        # A file of strips is cut into rows, one of tiles into columns: no block is decoded twice.
        block_high, block_wide = scenes[0].block_shapes[0]
        if block_wide < self.width:
            pieces = [(begin, bottom, a, b) for a, b in _shares(left, right, block_wide, len(scenes))]
        else:
            pieces = [(a, b, left, right) for a, b in _shares(begin, bottom, block_high, len(scenes))]
        boxes = [self.rasterio.windows.Window(x, y, xx - x, yy - y) for y, yy, x, xx in pieces]
        list(pool.map(read, scenes, boxes))

        with torch.cuda.stream(self._stream):
            inputs = room.inputs.take((bands, grid.window, max(grid.window, wide)), torch.float32, grid.widest)
            if held and kept:
                inputs[:, :kept] = held.inputs[:, top - held.top : held.bottom - held.top]
            fresh = inputs[:, kept:high, :wide]
            fresh.copy_(to_device(values, self.device))
            fresh.sub_(self.offset).mul_(self.scale).sub_(self.mean).div_(self.std)
            if valid is not None:
                fresh.masked_fill_(~to_device(valid, self.device), 0.0)
            room.copied(self._stream)
            if values.is_floating_point():
                fresh.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            # Where the scene ends within the first window, its last pixels are repeated.
            inputs[:, kept:high, wide:] = inputs[:, kept:high, wide - 1 : wide]
            inputs[:, high:] = inputs[:, high - 1 : high]
        view = self._view(values.numpy(), some, begin, left)
        if held and kept:
            if some is not None and held.valid is not None:
                some = np.concatenate([held.valid[top - held.top :], some])
            view = {**{row: line for row, line in held.view.items() if row >= top}, **view}
        return _Held(top, bottom, inputs, some, view, self.sampled[1][self.sampled[1] >= left] - left)

    def _view(self, values: np.ndarray, valid: np.ndarray | None, top: int, left: int) -> dict[int, np.ndarray]:
        """What a small picture shows of values that begin at (``top``, ``left``): (3, columns) float32 a sampled row,
        NaN where there is none."""
        bands = range(3) if len(values) >= 3 else (0, 0, 0)
        rows, columns = (
            at[(at >= begin) & (at < begin + length)] - begin
            for at, begin, length in zip(self.sampled, (top, left), values.shape[1:], strict=True)
        )
        found = values[np.ix_(bands, rows, columns)].astype(np.float32)
        if valid is not None:
            found[:, ~valid[np.ix_(rows, columns)]] = np.nan
        return {int(row) + top: found[:, i] for i, row in enumerate(rows)}

    def normalised(self, batch: Batch) -> Tensor:
        """The model's input on its device, (n, bands, window, window) float32; the mean where there is no value.

        What this thread computes next waits for it, this thread does not.
        """
        if batch.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(batch.copied)
            batch.room.record_stream(stream)  # its memory was given out on the other stream
        return batch.room[: len(batch.empty)]

    def _valid(self, scene, box, values: np.ndarray) -> np.ndarray:
        """(bands, h, w): where the scene has a value."""
        valid = scene.read_masks(self.bands, window=box) > 0
        valid[~self._masked] = True
        if self.dtype == "uint8":  # every value may be a real one: a pixel has no data where no band has any
            valid[:] = valid.any(0)
        if self._floating:
            valid &= np.isfinite(values)
        return valid


class _Rows:
    """Room for pixel rows of a group of window columns.

    Attributes:
        values, valid: of rows that are read, as they are stored, and where there is one. Pinned if the model is on a
            GPU: few bytes for it, and no wait.
        inputs: of a row of windows, on the model's device.
    """

    def __init__(self, device: torch.device, pinned: bool) -> None:
        self.values, self.valid, self.inputs = Room(pinned=pinned), Room(pinned=pinned), Room(device)
        self._copied = torch.cuda.Event() if pinned else None

    def copied(self, stream: torch.cuda.Stream | None) -> None:
        """``values`` and ``valid`` are needed until the device has come so far."""
        if self._copied is not None:
            self._copied.record(stream)

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


@dataclass(frozen=True)
class _Held:
    """Pixel rows of a group of window columns, each read once, though overlapping windows take it.

    Attributes:
        top, bottom: pixel rows of the scene.
        inputs: (bands, rows, columns) float32 on the model's device, normalised; at least as large as a window.
        valid: (rows, columns) where there is a value in one of the bands; None if everywhere.
        view: of the rows that a small picture shows, the pixels that it shows, (3, columns there) float32.
        columns: which columns these are.
    """

    top: int
    bottom: int
    inputs: Tensor
    valid: np.ndarray | None
    view: dict[int, np.ndarray]
    columns: np.ndarray

    def finished(self, bottom: int, width: int) -> Row:
        """The first ``width`` columns of the rows above ``bottom``."""
        lines = [line for row, line in self.view.items() if row < bottom]
        count = int((self.columns < width).sum())
        view = np.stack(lines, axis=1)[:, :, :count] if lines else np.zeros((3, 0, count), np.float32)
        return Row(None if self.valid is None else self.valid[: bottom - self.top, :width], view)


def _shares(begin: int, end: int, block: int, count: int) -> list[tuple[int, int]]:
    """``begin`` to ``end`` in at most ``count`` parts whose borders are multiples of ``block``."""
    first, last = begin // block, -(-end // block)
    count = min(count, last - first)
    borders = [(first + (last - first) * i // count) * block for i in range(count + 1)]
    return [(max(a, begin), min(b, end)) for a, b in zip(borders, borders[1:], strict=False)]


def each_window(
    reader: SceneReader,
    grid: Grid,
    planned: Iterable[tuple[range, range]],
    batch_size: int,
    look: Callable[[Batch], Any],
    bar: tqdm,
) -> Generator[Any, None, None]:
    """What ``look`` (an item a window of its batch) finds in each window of each (columns, rows) of ``planned``.

    Reading goes ahead of it, from one group of columns to the next as well.
    """
    with closing(ahead(reader.batches(grid, planned, batch_size), 1)) as batches:
        while True:
            with reader.stages("wait for reading"):
                batch = next(batches, None)
            if batch is None:
                return
            found = look(batch)
            reader.give_back(batch)
            bar.update(len(batch.wanted))
            for i in batch.wanted:
                yield found[i]
            del found  # else it stays while the next are looked at


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
