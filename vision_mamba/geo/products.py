"""What a user gets of a segmented scene: georeferenced maps, outlines, areas, a picture."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_mamba.data.rasters import load_rasterio
from vision_mamba.errors import UserError
from vision_mamba.files import replacing

from .models import Segmentor
from .reader import sampled
from .stages import Stages

TILE = 512  # pixels a side
NODATA = 255
_COLUMNS = 4096  # pixels of the scene's width that are read at once for a picture
_POLYGONS = 20_000  # written at once
_SHOWN = 1050  # pixels of the longer side of a quick look's halves, at most
# GDAL's threads hold a piece of the map each, and which of its pixels have data; and GDAL would compress the overviews
# twice, with 14 MB a thread: that option is not documented, and without it the overviews are the same.
_OVERVIEWS = dict(
    GDAL_NUM_THREADS=4, GDAL_OVR_CHUNK_MAX_SIZE=4 * 2**20, GDAL_CACHEMAX=16 * 2**20, COG_TMP_COMPRESSION="NONE"
)  # fmt: skip


@dataclass(frozen=True)
class SceneFiles:
    """Paths of a scene's results; ``work`` is the folder of unfinished ones. None where not wanted."""

    work: Path
    classes: Path
    confidence: Path | None
    probabilities: Path | None
    polygons: Path | None
    areas: Path
    picture: Path

    @classmethod
    def plan(cls, source, out, *, confidence: bool, probabilities: bool, polygons: str | None) -> SceneFiles:
        out, stem = Path(out), Path(source).stem
        return cls(
            work=out / f".{stem}.partial",
            classes=out / f"{stem}_classes.tif",
            confidence=out / f"{stem}_confidence.tif" if confidence else None,
            probabilities=out / f"{stem}_probabilities.tif" if probabilities else None,
            polygons=out / f"{stem}_classes.{polygons}" if polygons else None,
            areas=out / f"{stem}_areas.csv",
            picture=out / f"{stem}_quicklook.png",
        )

    def results(self) -> list[Path]:
        found = (self.classes, self.confidence, self.probabilities, self.polygons, self.areas, self.picture)
        return [path for path in found if path is not None]


class Maps:
    """The maps of a scene in plain files among the unfinished ones, which GDAL makes the results of, and the pixels a
    class. Used as a context, by one thread at a time."""

    def __init__(self, files: SceneFiles, profile: dict[str, Any], segmentor: Segmentor) -> None:
        """
        Args:
            files: of the scene.
            profile: the scene's crs, transform, width and height.
            segmentor: its classes and colours.
        """
        self.files, self.profile = files, profile
        self.classes, self.palette = list(segmentor.classes), segmentor.colours()
        self.areas = pixel_areas(profile)
        self.pixels = np.zeros(len(self.classes), np.int64)
        self.hectares = None if self.areas is None else np.zeros(len(self.classes))
        planes = (
            (files.classes, slice(0, 1)), (files.confidence, slice(1, 2)), (files.probabilities, slice(2, None)),
        )  # fmt: skip
        self.planes = {path: where for path, where in planes if path is not None}
        self._totals = dict.fromkeys(self.planes, 0)

    def __enter__(self) -> Maps:
        with ExitStack() as stack:
            self._plain = {path: stack.enter_context(self._create(path)) for path in self.planes}
            self._pool = stack.enter_context(ThreadPoolExecutor(len(self.planes)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _create(self, path: Path) -> Any:
        """A map's plain file, open. Not compressed: GDAL's COG driver compresses in any case, with all threads."""
        names = self.classes if path == self.files.probabilities else ["confidence"]
        file = load_rasterio().open(
            self.files.work / path.name, "w", driver="GTiff", dtype="uint8", nodata=NODATA, count=len(names),
            tiled=True, blockxsize=TILE, blockysize=TILE // 4,  # a row of them fits into GDAL's cache
            sparse_ok=True, bigtiff="if_safer",
            interleave="band",  # else each tile is read once a band
            photometric="minisblack",  # else the fourth of four classes is taken for opacity
            **self.profile,
        )  # fmt: skip
        if path == self.files.classes:
            colours = {i: (*rgb, 255) for i, rgb in enumerate(self.palette)}
            file.write_colormap(1, {NODATA: (0, 0, 0, 0), **colours})
            file.update_tags(**{f"CLASS_{i}": name for i, name in enumerate(self.classes)})
        else:
            file.descriptions, file.scales = names, (1 / 254,) * file.count
        return file

    def add(self, top: int, left: int, planes: np.ndarray) -> None:
        """Takes pixels of the scene, each once.

        Args:
            top, left: the first row and column.
            planes: uint8 (planes, rows, columns): class, confidence, then probabilities, NODATA where there is no data.
        """
        box = load_rasterio().windows.Window(left, top, planes.shape[2], planes.shape[1])

        def write(path: Path) -> None:
            mine = planes[self.planes[path]]
            self._plain[path].write(mine, window=box)
            self._totals[path] += int(mine.sum(dtype=np.int64))

        written = [self._pool.submit(write, path) for path in self._plain]
        # One call for all rows, which leaves Python to the thread that keeps the device busy.
        classes = torch.arange(0, 256 * planes.shape[1], 256, dtype=torch.int32)[:, None] + torch.tensor(planes[0])
        counts = torch.bincount(classes.flatten(), minlength=256 * len(classes)).numpy()
        counts = counts.reshape(-1, 256)[:, : len(self.classes)]
        for one in written:
            one.result()
        self.pixels += counts.sum(0)
        if self.hectares is not None and self.areas is not None:
            self.hectares += self.areas[top : top + len(counts)] @ counts / 1e4

    def write(self, path: Path) -> None:
        """Writes one of the results, when all pixels are there.

        Raises:
            OSError: not all of it could be written.
        """
        from rasterio._err import CPLE_BaseError  # rasterio has no public name for it
        from rasterio.shutil import copy

        classes, plain, whole = path == self.files.classes, self.files.work / path.name, self.files.work / "cog.tif"
        self._plain[path].close()
        with load_rasterio().Env(**_OVERVIEWS):
            try:
                copy(
                    plain, whole, driver="COG", compress="deflate", level=1, predictor="no" if classes else "yes",
                    blocksize=TILE, overview_resampling="mode" if classes else "average", bigtiff="if_safer",
                    num_threads="all_cpus",
                )  # fmt: skip
            except CPLE_BaseError as error:  # the plain file ends too early
                raise OSError(f"{path.name} could not be written whole; is the disk full? GDAL: {error}") from error
        # GDAL closes a file without an error where its last tiles could not be written.
        with load_rasterio().open(whole) as file:
            total = sum(int(file.read(window=box).sum(dtype=np.int64)) for _, box in file.block_windows(1))
        if total != self._totals[path]:
            raise OSError(f"{path.name} could not be written whole; is the disk full?")
        os.replace(whole, path)


def write_products(
    maps: Maps,
    view: Callable[[], np.ndarray],
    stages: Stages,
    *,
    source: str | os.PathLike,
    simplify: float,
    min_area: float,
) -> tuple[dict[str, int], dict[str, float] | None]:
    """Writes every result, each under a temporary name first.

    Args:
        maps: of the scene, with all pixels.
        view: gives the scene for the picture, (3, rows, columns) float32, NaN where there is no data.
        source: the scene's name, for errors.
        simplify, min_area: see :func:`write_polygons`.

    Returns:
        Pixels and hectares a class; hectares are None without a coordinate system.

    Raises:
        UserError: nothing but nodata.
    """
    files, classes, pixels, hectares = maps.files, maps.classes, maps.pixels, maps.hectares
    if not pixels.sum():
        raise UserError(f"{source} holds nothing but nodata: there is nothing to segment")

    def draw() -> None:
        with stages("picture"), replacing(files.picture) as temporary:
            quick_look(stretched(view()), files.classes, classes, maps.palette, temporary)

    with ThreadPoolExecutor(1) as pool:
        with stages("maps"):
            first, *others = maps.planes
            maps.write(first)
            drawn = pool.submit(draw)  # of the classes alone
            for path in others:  # together they would be faster, and hold twice the memory
                maps.write(path)
        drawn.result()
    if files.polygons is not None:
        with stages("polygons"), replacing(files.polygons) as temporary:
            write_polygons(files.classes, temporary, classes, simplify=simplify, min_area=min_area)
    found_pixels = dict(zip(classes, pixels.tolist(), strict=True))
    found_hectares = None if hectares is None else dict(zip(classes, hectares.tolist(), strict=True))
    with replacing(files.areas) as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "pixels", "share", "hectares"])
        for name, count in found_pixels.items():
            area = "" if found_hectares is None else f"{found_hectares[name]:.4f}"
            table.writerow([name, count, f"{count / pixels.sum():.6f}", area])
    return found_pixels, found_hectares


def pixel_areas(profile: dict[str, Any]) -> np.ndarray | None:
    """Area of a pixel in square metres, one for each row; None without a coordinate system.

    In degrees, the area of a quadrilateral on the WGS 84 ellipsoid (Snyder 1987, equations 3-12 and 14-4).
    """
    crs, t = profile["crs"], profile["transform"]
    if not crs:
        return None
    if not crs.is_geographic:
        return np.full(profile["height"], abs(t.a * t.e - t.b * t.d) * crs.linear_units_factor[1] ** 2)
    a, e2 = 6378137.0, 0.0066943799901413165
    e = math.sqrt(e2)

    def belt(latitude: np.ndarray) -> np.ndarray:  # from the equator, for one radian of longitude
        s = np.sin(np.radians(latitude))
        return a**2 * (1 - e2) / 2 * (s / (1 - e2 * s**2) + np.arctanh(e * s) / e)

    # With a rotated grid, a row's own centre line stands for all of its pixels.
    edges = t.f + t.d * profile["width"] / 2 + t.e * np.arange(profile["height"] + 1)
    columns = np.radians(abs(t.a - t.b * t.d / t.e))
    return np.abs(np.diff(belt(edges))) * columns


def write_polygons(
    class_map: Path, path: Path, classes: Sequence[str], *, simplify: float = 1.0, min_area: float = 0.0
) -> int:
    """Outlines of the classes of a class map, as GeoPackage (``.gpkg``) or GeoJSON (WGS 84, RFC 7946).

    Args:
        class_map: raster of class numbers with nodata.
        path: file to write; its ending decides.
        simplify: by how many pixels an outline may deviate (Douglas & Peucker); neighbours may then overlap.
        min_area: smallest polygon in square metres, or square pixels without a coordinate system.

    Returns:
        How many polygons there are.

    Raises:
        UserError: pyogrio or shapely is not installed, or GeoJSON is wanted without a coordinate system.
    """
    rasterio = load_rasterio()
    try:
        import pyogrio
        import shapely
        from rasterio.features import shapes
        from rasterio.transform import rowcol
    except ImportError:
        raise UserError("polygons need pyogrio and shapely: pip install 'vision-mamba-zoo[geo]'") from None
    count = 0
    with rasterio.open(class_map) as source:
        profile = dict(crs=source.crs, transform=source.transform, width=source.width, height=source.height)
        areas, t = pixel_areas(profile), source.transform
        side = math.sqrt(abs(t.a * t.e - t.b * t.d))  # of a pixel, in units of the map
        json = path.suffix == ".geojson"
        options: dict[str, Any] = dict(driver="GeoJSON", RFC7946="YES") if json else dict(driver="GPKG")
        if json and not source.crs:
            raise UserError("GeoJSON is in degrees, and the scene has no coordinate system; write a GeoPackage")

        def save(shown: list, numbers: list[int], square_metres: list[float]) -> None:
            pyogrio.raw.write(
                path,
                np.array(shapely.to_wkb(shown), dtype=object),
                [
                    np.array(numbers, np.int32),
                    np.array([classes[n] for n in numbers], object),
                    np.array(square_metres),
                ],
                np.array(["class", "name", "area_m2" if areas is not None else "area_pixels"], object),
                geometry_type="Polygon",
                crs=source.crs.to_wkt() if source.crs else None,
                layer="classes",
                append=count > 0 and not json,
                **options,
            )

        shown: list = []
        numbers: list[int] = []
        sizes: list[float] = []
        for geometry, value in shapes(rasterio.band(source, 1), connectivity=4, transform=t):
            if value == NODATA:
                continue
            polygon = shapely.geometry.shape(geometry)
            pixels = polygon.area / side**2
            row = min(max(rowcol(t, *polygon.centroid.coords[0])[0], 0), source.height - 1)
            size = pixels if areas is None else pixels * float(areas[row])
            if size < min_area:
                continue
            polygon = polygon.simplify(simplify * side) if simplify else polygon
            if polygon.is_empty or polygon.geom_type != "Polygon":
                continue  # thinner than the tolerance
            shown.append(polygon)
            numbers.append(int(value))
            sizes.append(size)
            if len(shown) == _POLYGONS and not json:
                save(shown, numbers, sizes)
                count += len(shown)
                shown, numbers, sizes = [], [], []
        if shown or not count:
            save(shown, numbers, sizes)
        return count + len(shown)


def decimated(scene, bands: Sequence[int] | None) -> np.ndarray:
    """A small view of an open raster's first three bands (or first), stretched from the 2nd to the 98th percentile.

    Returns:
        (height, width, 3) float32 in 0..1, of at most 1600 pixels a side.
    """
    from rasterio.windows import Window

    size = tuple(map(len, sampled(scene.height, scene.width)))
    chosen = list(bands or range(1, min(scene.count, 3) + 1))[:3]
    chosen = chosen if len(chosen) == 3 else chosen[:1] * 3
    image = np.zeros((3, *size), np.float32)
    # Group by group of columns: a row of tiles of the whole width need not fit into GDAL's cache, and would be decoded
    # anew for each line of the picture.
    groups = min(-(-scene.width // _COLUMNS), size[1])
    for i in range(groups):
        columns = slice(size[1] * i // groups, size[1] * (i + 1) // groups)
        begin, end = (round(column * scene.width / size[1]) for column in (columns.start, columns.stop))
        box = Window(begin, 0, end - begin, scene.height)
        shape = (3, size[0], columns.stop - columns.start)
        image[:, :, columns] = scene.read(chosen, window=box, out_shape=shape)
        valid = (scene.read_masks(chosen, window=box, out_shape=shape) > 0).any(0)
        image[:, :, columns][:, ~valid] = np.nan
    return stretched(image)


def stretched(image: np.ndarray) -> np.ndarray:
    """A picture (3, height, width) float32, stretched from the 2nd to the 98th percentile: (height, width, 3), 0 to 1,
    and 0 where one of the three is not finite. In place: three such pictures would be 100 MB."""
    valid = np.isfinite(image).all(0)
    for band in image if valid.any() else ():
        low, high = np.percentile(band[valid], (2, 98))
        band -= low
        band /= max(high - low, 1e-6)
    image.clip(0, 1, out=image)[:, ~valid] = 0
    return image.transpose(1, 2, 0)


def quick_look(image: np.ndarray, class_map: Path, classes: Sequence[str], palette, path: Path) -> None:
    """A small picture: the scene (height, width, 3) in 0..1, and the classes over it with a legend."""
    from PIL import Image, ImageDraw, ImageFont

    # Band by band, and in 32 bits: of 20 MB each, not all at a time.
    bands = [(255 * image[..., i]).round().astype(np.uint8) for i in range(3)]
    scene = Image.fromarray(np.stack(bands, axis=2))
    scene.thumbnail((_SHOWN, _SHOWN), Image.Resampling.BOX)
    with load_rasterio().open(class_map) as found:
        numbers = found.read(1, out_shape=scene.size[::-1])
    counts = np.bincount(numbers.ravel(), minlength=256)
    colours = np.zeros((256, 3), np.float32)
    colours[: len(palette)] = palette
    seen = np.where((numbers != NODATA)[..., None], np.asarray(scene), 0)
    over = np.float32(0.45) * seen + 0.55 * colours[numbers]
    over = np.where((numbers != NODATA)[..., None], over, 0).round().astype(np.uint8)
    present = np.flatnonzero(counts[: len(classes)])[:40]
    # The font's file alone: a figure takes longer to draw than a small scene to segment.
    matplotlib = find_spec("matplotlib")
    assert matplotlib is not None and matplotlib.origin is not None
    font = ImageFont.truetype(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", 22)
    wide, line, gap = max((font.getlength(classes[i]) for i in present), default=0), 34, 20
    (right, down), legend = scene.size, gap + line * len(present)
    size = 2 * right + 4 * gap + 40 + math.ceil(wide), max(down + 2 * gap, legend + gap)
    picture = Image.new("RGB", size, "white")
    for i, half in enumerate((seen, over)):
        picture.paste(Image.fromarray(half), (gap + i * (right + gap), gap))
    draw, x = ImageDraw.Draw(picture), 2 * right + 3 * gap
    for i, number in enumerate(present):
        y = gap + line * i
        draw.rectangle((x, y, x + 28, y + 24), fill=palette[number])
        draw.text((x + 38, y + 12), classes[number], fill="black", font=font, anchor="lm")
    picture.save(path, format="PNG", compress_level=1)
