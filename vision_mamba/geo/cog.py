"""Cloud-optimised GeoTIFFs from tiles that are already compressed.

GDAL's COG driver reads a finished file and compresses all of it again. Here tiles are compressed when they are known,
by whichever thread has them, and put in place in the end; GDAL says how coordinates and colours are stored.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vision_mamba.data.rasters import load_rasterio

TILE = 512  # pixels a side
NODATA = 255
_LEVEL = 1  # of zlib
_AT_ONCE = 64  # tiles that are copied at once
Tiles = Iterable[tuple[bytes | memoryview, Sequence[int]]]
# Said right behind the header, so that readers trust the order: https://gdal.org/en/stable/drivers/raster/cog.html
_LAYOUT = (
    b"LAYOUT=IFDS_BEFORE_DATA\nBLOCK_ORDER=ROW_MAJOR\nBLOCK_LEADER=SIZE_AS_UINT4\n"
    b"BLOCK_TRAILER=LAST_4_BYTES_REPEATED\nKNOWN_INCOMPATIBLE_EDITION=NO\n "
)
_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 12: 8, 16: 8}  # bytes of TIFF's types: those that GDAL writes
_SUBFILE, _WIDTH, _HEIGHT, _OFFSETS, _SIZES = 254, 256, 257, 324, 325
_OF_THE_SCENE = {33550, 33922, 34264, 34735, 34736, 34737, 42112}  # coordinates and descriptions: not of overviews


def compress(planes: np.ndarray, numbers: bool) -> bytes:
    """A tile as it stands in the file: its size, the compressed values, their last four bytes again.

    Args:
        planes: uint8 (bands, rows, columns), of at most 512 x 512 pixels; filled up with NODATA.
        numbers: neighbours are alike as numbers are, so their differences are compressed (TIFF's predictor 2); else
            they are classes.
    """
    full = np.full((TILE, TILE, len(planes)), NODATA, np.uint8)
    full[: planes.shape[1], : planes.shape[2]] = planes.transpose(1, 2, 0)
    if numbers:
        full = np.concatenate([full[:, :1], full[:, 1:] - full[:, :-1]], axis=1)
    found = zlib.compress(full.data, _LEVEL)
    return struct.pack("<I", len(found)) + found + found[-4:]


def across(planes: np.ndarray) -> list[np.ndarray]:
    """A row of tiles, (bands, rows, columns), cut into tiles."""
    return [planes[:, :, left : left + TILE] for left in range(0, planes.shape[2], TILE)]


def halved(planes: np.ndarray, numbers: bool) -> np.ndarray:
    """Half the rows and columns (rounded up) of uint8 (bands, rows, columns): of each square of four pixels, as far as
    they are not NODATA, the mean, or the class that is most frequent among them."""
    odd = [(0, 0), *((0, side % 2) for side in planes.shape[1:])]
    planes = np.pad(planes, odd, constant_values=NODATA) if planes.shape[1] % 2 or planes.shape[2] % 2 else planes
    a, b, c, d = (planes[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    least, most = np.minimum(np.minimum(a, b), np.minimum(c, d)), np.maximum(np.maximum(a, b), np.maximum(c, d))
    if numbers:
        total = np.add(a, b, dtype=np.uint16)
        total += c
        total += d
        if most.max(initial=0) < NODATA:
            return ((total + 2) >> 2).astype(np.uint8)
        missing = sum((part == NODATA).astype(np.uint16) for part in (a, b, c, d))
        count = np.maximum(4 - missing, 1)
        mean = (total - missing * NODATA + count // 2) // count
        return np.where(missing == 4, NODATA, mean).astype(np.uint8)
    found = np.where(c == d, c, a)
    found = np.where((b == c) | (b == d), b, found)
    found = np.where((a == b) | (a == c) | (a == d), a, found)
    return np.where(found == NODATA, least, found)  # NODATA is above all classes


def sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of the raster and of its overviews: each half of the one before, the last within a tile."""
    found = [(height, width)]
    while max(found[-1]) > TILE:
        found.append((-(-found[-1][0] // 2), -(-found[-1][1] // 2)))
    return found


class Overviews:
    """Overviews made from the first one, which comes in rows; compressed tiles wait in files."""

    def __init__(self, height: int, width: int, numbers: bool, folder: Path, name: int, pool: Executor) -> None:
        """
        Args:
            height, width: of the raster.
            numbers: as in :func:`compress`.
            folder, name: for the files.
            pool: compresses.
        """
        self._heights = [height for height, _ in sizes(height, width)[1:]]
        self._numbers, self._pool = numbers, pool
        self._pending: list[list[np.ndarray]] = [[] for _ in self._heights]
        self._taken = [0] * len(self._heights)
        self._files = [open(folder / f"overview-{name}-{i}", "w+b") for i in range(len(self._heights))]
        self.sizes: list[list[int]] = [[] for _ in self._heights]

    def add(self, rows: np.ndarray) -> None:
        """The next rows of the first overview, uint8 (bands, rows, columns), an even number but for the last."""
        if self._heights:
            self._add(0, rows)

    def _add(self, level: int, rows: np.ndarray) -> None:
        self._pending[level].append(rows)
        self._taken[level] += rows.shape[1]
        waiting = sum(piece.shape[1] for piece in self._pending[level])
        if waiting < TILE and self._taken[level] < self._heights[level]:
            return
        full = np.concatenate(self._pending[level], axis=1)  # TILE rows: those of the pieces are powers of two
        self._pending[level] = []
        for tile in self._pool.map(partial(compress, numbers=self._numbers), across(full)):
            self._files[level].write(tile)
            self.sizes[level].append(len(tile))
        if level + 1 < len(self._heights):
            self._add(level + 1, halved(full, self._numbers))

    def tiles(self, level: int) -> Iterator[tuple[bytes, list[int]]]:
        """An overview as :func:`write_cog` takes it."""
        self._files[level].seek(0)
        for begin in range(0, len(self.sizes[level]), _AT_ONCE):
            lengths = self.sizes[level][begin : begin + _AT_ONCE]
            yield self._files[level].read(sum(lengths)), lengths

    def close(self) -> None:
        for file in self._files:
            file.close()
            os.unlink(file.name)


def write_cog(path: Path, template: Path, levels: Sequence[tuple[tuple[int, int], Tiles]], total: int) -> None:
    """Writes a GeoTIFF in the order of a cloud-optimised one: what it is, the smallest overview, ..., the raster.

    Args:
        path: file to write.
        template: a BigTIFF of the raster's size and kind in tiles, whose values do not matter; all but where the tiles
            are is taken from it.
        levels: of the raster, then of its overviews: height and width, and the tiles (see :func:`compress`) row by row,
            several at once with the length of each.
        total: bytes of all tiles, or more.
    """
    main = _read_tags(template)
    tables = []
    for i, ((height, width), _) in enumerate(levels):
        count = -(-height // TILE) * -(-width // TILE)
        tags = {tag: value for tag, value in main.items() if not (i and tag in _OF_THE_SCENE)}
        if i:
            tags |= {_SUBFILE: (4, 1, struct.pack("<I", 1)), _WIDTH: _long(width), _HEIGHT: _long(height)}
        tables.append((tags, count))
    # Offsets of 32 bits where they do, for readers that know no other.
    tiles = sum(count for _, count in tables)
    big = total + 64 * tiles + sum(len(value) for tags, _ in tables for _, _, value in tags.values()) > 2**32 - 2**20

    def head(offsets: list[np.ndarray], lengths: list[np.ndarray]) -> bytes:
        ghost = b"GDAL_STRUCTURAL_METADATA_SIZE=%06d bytes\n" % len(_LAYOUT) + _LAYOUT
        ghost += b"\0" * (len(ghost) % 2)
        begin = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16 + len(ghost)) if big else struct.pack(
            "<2sHI", b"II", 42, 8 + len(ghost)
        )  # fmt: skip
        found, kind = begin + ghost, 16 if big else 4
        for i, (tags, _) in enumerate(tables):
            where = {_OFFSETS: offsets[i], _SIZES: lengths[i]}
            for tag, values in where.items():
                tags[tag] = kind, len(values), values.astype("<u8" if big else "<u4").tobytes()
            found += _directory(tags, len(found), big, last=i == len(tables) - 1)
        return found

    nothing = [np.zeros(count, np.int64) for _, count in tables]
    with open(path, "wb") as file:
        file.write(head(nothing, nothing))
        offsets, lengths = [], []
        for (_, tiles_of_level), (_, count) in reversed(list(zip(levels, tables, strict=True))):
            starts, found = _write_tiles(file, tiles_of_level)
            if len(starts) != count:
                raise ValueError(f"{len(starts)} tiles, where {count} belong")
            offsets.append(starts)
            lengths.append(found)
        file.seek(0)
        file.write(head(offsets[::-1], lengths[::-1]))


def make_template(path: Path, profile: dict[str, Any], count: int, numbers: bool, describe) -> None:
    """The file that :func:`write_cog` takes its tags from.

    Args:
        path: file to write.
        profile: the raster's crs, transform, width and height.
        count: bands.
        numbers: as in :func:`compress`.
        describe: called with the open dataset; sets colours and names.
    """
    with load_rasterio().open(
        path, "w", driver="GTiff", dtype="uint8", nodata=NODATA, tiled=True, blockxsize=TILE, blockysize=TILE,
        compress="deflate", predictor=2 if numbers else 1, interleave="pixel", bigtiff="yes", sparse_ok=True,
        endianness="little", count=count, **profile,
    ) as file:  # fmt: skip
        describe(file)


def _write_tiles(file: BinaryIO, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Where the values of each tile begin, and how many bytes they are."""
    starts, found, at = [], [np.zeros(0, np.int64)], file.tell()
    for data, lengths in tiles:
        file.write(data)
        ends = at + np.cumsum(lengths, dtype=np.int64)
        starts.append(ends - lengths + 4)
        found.append(np.array(lengths, np.int64) - 8)
        at = int(ends[-1])
    return np.concatenate([np.zeros(0, np.int64), *starts]), np.concatenate(found)


def _long(value: int) -> tuple[int, int, bytes]:
    return 4, 1, struct.pack("<I", value)


def _read_tags(path: Path) -> dict[int, tuple[int, int, bytes]]:
    """Type, count and value of each tag in the first directory of a little-endian BigTIFF, but of where its tiles
    are."""
    found = {}
    with open(path, "rb") as file:
        (at,) = struct.unpack("<8xQ", file.read(16))
        file.seek(at)
        (count,) = struct.unpack("<Q", file.read(8))
        for tag, kind, number, value in struct.iter_unpack("<HHQ8s", file.read(20 * count)):
            if tag in (_OFFSETS, _SIZES):
                continue
            size = _TYPES[kind] * number
            if size > 8:
                file.seek(struct.unpack("<Q", value)[0])
                value = file.read(size)
            found[tag] = kind, number, value[:size]
    return found


def _directory(tags: dict[int, tuple[int, int, bytes]], at: int, big: bool, last: bool) -> bytes:
    """A directory that lies at the byte ``at`` with its values behind it, and says that the next follows."""
    entry, inline, number = ("<HHQ8s", 8, "<Q") if big else ("<HHI4s", 4, "<I")
    size = (8 if big else 2) + len(tags) * struct.calcsize(entry) + inline
    entries, values = b"", b""
    for tag, (kind, count, value) in sorted(tags.items()):
        if len(value) > inline:
            place = struct.pack(number, at + size + len(values))
            values += value + b"\0" * (-len(value) % 8)
        else:
            place = value.ljust(inline, b"\0")
        entries += struct.pack(entry, tag, kind, count, place)
    following = 0 if last else at + size + len(values)
    return struct.pack("<Q" if big else "<H", len(tags)) + entries + struct.pack(number, following) + values
