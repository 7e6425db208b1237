"""What a user gets of a segmented scene: georeferenced maps, outlines, areas, a picture."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vision_mamba.data.rasters import load_rasterio
from vision_mamba.errors import UserError
from vision_mamba.files import replacing

from .cog import NODATA, TILE, Overviews, compress, halved, make_template, sizes, write_cog
from .models import Segmentor
from .parts import THREADS
from .reader import sampled
from .stages import Stages

_COLUMNS = 4096  # pixels of the scene's width that are read at once for a picture
_POLYGONS = 20_000  # written at once
_SHOWN = 1050  # pixels of the longer side of a quick look's halves, at most


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


@dataclass(frozen=True)
class Map:
    """A map of a scene: the file, which of the planes it holds, and whether these are numbers (or else classes)."""

    path: Path
    planes: slice
    numbers: bool


def planned_maps(files: SceneFiles) -> list[Map]:
    """The maps of a scene whose planes are class, confidence and then probabilities."""
    found = (
        (files.classes, slice(0, 1), False),
        (files.confidence, slice(1, 2), True),
        (files.probabilities, slice(2, None), True),
    )
    return [Map(path, planes, numbers) for path, planes, numbers in found if path is not None]


def pack(planes: np.ndarray, maps: Sequence[Map]) -> dict[str, np.ndarray]:
    """What :func:`write_products` makes the maps of, from some tiles of a row of them.

    Args:
        planes: uint8 (planes, rows, columns): class, confidence, then probabilities, NODATA where there is no data; of
            whole tiles but at the scene's ends.
        maps: what is made of them.

    Returns:
        "counts": (rows, 256) pixels a class; and of each map, by its number, the compressed tiles ("tiles0"), how long
        each is ("sizes0"), and the pixels of the first overview ("half0").
    """
    rows = planes.shape[1]
    keys = planes[0].astype(np.intp)
    keys += 256 * np.arange(rows)[:, None]
    found = {"counts": np.bincount(keys.ravel(), minlength=256 * rows).reshape(rows, 256).astype(np.int32)}
    for i, item in enumerate(maps):
        tiles = compress(planes[item.planes], item.numbers)
        found[f"tiles{i}"] = np.frombuffer(b"".join(tiles), np.uint8)
        found[f"sizes{i}"] = np.array([len(tile) for tile in tiles], np.int64)
        found[f"half{i}"] = halved(planes[item.planes], item.numbers)
    return found


def write_products(
    files: SceneFiles,
    profile: dict[str, Any],
    packed: Callable[[int], list[Mapping[str, np.ndarray]]],
    view: Callable[[], np.ndarray],
    segmentor: Segmentor,
    stages: Stages,
    *,
    source: str | os.PathLike,
    simplify: float,
    min_area: float,
) -> tuple[dict[str, int], dict[str, float] | None]:
    """Writes every result, each under a temporary name first.

    Args:
        profile: the scene's crs, transform, width and height.
        packed: gives for the number of a row of tiles what :func:`pack` made of them, from the left to the right.
        view: gives the scene for the picture, (3, rows, columns) float32, NaN where there is no data.
        source: the scene's name, for errors.

    Returns:
        Pixels and hectares a class; hectares are None without a coordinate system.

    Raises:
        UserError: nothing but nodata.
    """
    classes, palette, maps = list(segmentor.classes), segmentor.colours(), planned_maps(files)
    height, width = profile["height"], profile["width"]
    pixels, hectares = np.zeros(len(classes), np.int64), np.zeros(len(classes))
    areas = pixel_areas(profile)
    lengths = [0] * len(maps)
    with ThreadPoolExecutor(THREADS) as pool, ExitStack() as stack:
        with stages("overviews"):
            overviews = [
                stack.enter_context(closing(Overviews(height, width, item.numbers, files.work, i, pool)))
                for i, item in enumerate(maps)
            ]
            for index in range(-(-height // TILE)):
                pieces = packed(index)
                counts = np.sum([piece["counts"] for piece in pieces], axis=0)[:, : len(classes)]
                pixels += counts.sum(0)
                if areas is not None:
                    hectares += areas[index * TILE : index * TILE + len(counts)] @ counts / 1e4
                for i, overview in enumerate(overviews):
                    lengths[i] += sum(int(piece[f"sizes{i}"].sum()) for piece in pieces)
                    overview.add(np.concatenate([piece[f"half{i}"] for piece in pieces], axis=2))
        if not pixels.sum():
            raise UserError(f"{source} holds nothing but nodata: there is nothing to segment")

        def tiles(number: int) -> Iterator[memoryview]:
            for index in range(-(-height // TILE)):
                for piece in packed(index):
                    data, begin = memoryview(piece[f"tiles{number}"]), 0
                    for size in piece[f"sizes{number}"].tolist():
                        yield data[begin : begin + size]
                        begin += size

        with stages("maps"):
            for i, (item, overview) in enumerate(zip(maps, overviews, strict=True)):
                template = files.work / f"template-{i}.tif"
                count = len(classes) if item.path == files.probabilities else 1
                make_template(template, profile, count, item.numbers, partial(_describe, files, item, classes, palette))
                levels = [tiles(i), *(overview.tiles(level) for level in range(len(overview.sizes)))]
                total = lengths[i] + sum(map(sum, overview.sizes))
                with replacing(item.path) as temporary:
                    write_cog(temporary, template, list(zip(sizes(height, width), levels, strict=True)), total)
    if files.polygons is not None:
        with stages("polygons"), replacing(files.polygons) as temporary:
            write_polygons(files.classes, temporary, classes, simplify=simplify, min_area=min_area)
    found_pixels = dict(zip(classes, pixels.tolist(), strict=True))
    found_hectares = None if areas is None else dict(zip(classes, hectares.tolist(), strict=True))
    with replacing(files.areas) as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "pixels", "share", "hectares"])
        for name, count in found_pixels.items():
            area = "" if found_hectares is None else f"{found_hectares[name]:.4f}"
            table.writerow([name, count, f"{count / pixels.sum():.6f}", area])
    with stages("picture"), replacing(files.picture) as temporary:
        quick_look(stretched(view()), files.classes, classes, palette, temporary)
    return found_pixels, found_hectares


def _describe(files: SceneFiles, item: Map, classes: Sequence[str], palette, file) -> None:
    """Sets colours, names and scales of an open raster."""
    if not item.numbers:
        file.write_colormap(1, {NODATA: (0, 0, 0, 0), **{i: (*rgb, 255) for i, rgb in enumerate(palette)}})
        file.update_tags(**{f"CLASS_{i}": name for i, name in enumerate(classes)})
        return
    for band in file.indexes:
        file.set_band_description(band, classes[band - 1] if item.path == files.probabilities else "confidence")
    file.scales = (1 / 254,) * file.count


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
    and 0 where one of the three is not finite."""
    image = image.transpose(1, 2, 0)
    valid = np.isfinite(image).all(-1)
    if not valid.any():
        return np.zeros_like(image)
    low, high = np.percentile(image[valid], (2, 98), axis=0)
    return np.where(valid[..., None], np.nan_to_num((image - low) / np.maximum(high - low, 1e-6)).clip(0, 1), 0.0)


def quick_look(image: np.ndarray, class_map: Path, classes: Sequence[str], palette, path: Path) -> None:
    """A small picture: the scene (height, width, 3) in 0..1, and the classes over it with a legend."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    with load_rasterio().open(class_map) as found:
        numbers = found.read(1, out_shape=image.shape[:2])
    valid = numbers != NODATA
    table = np.zeros((256, 3), np.float32)
    table[: len(palette)] = np.array(palette) / 255
    over = np.where(valid[..., None], (0.45 * image + 0.55 * table[numbers]).clip(0, 1), 0.0)
    image = np.where(valid[..., None], image, 0.0)
    present = np.flatnonzero(np.bincount(numbers.ravel(), minlength=256)[: len(classes)])[:40]

    halves = [Image.fromarray((255 * picture).round().astype(np.uint8)) for picture in (image, over)]
    for half in halves:
        half.thumbnail((_SHOWN, _SHOWN), Image.Resampling.BILINEAR)
    # The font's file alone: a figure takes longer to draw than a small scene to segment.
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 22)
    wide, line, gap = max((font.getlength(classes[i]) for i in present), default=0), 34, 20
    (across, down), legend = halves[0].size, gap + line * len(present)
    size = 2 * across + 4 * gap + 40 + math.ceil(wide), max(down + 2 * gap, legend + gap)
    picture = Image.new("RGB", size, "white")
    for i, half in enumerate(halves):
        picture.paste(half, (gap + i * (across + gap), gap))
    draw, x = ImageDraw.Draw(picture), 2 * across + 3 * gap
    for i, number in enumerate(present):
        y = gap + line * i
        draw.rectangle((x, y, x + 28, y + 24), fill=palette[number])
        draw.text((x + 38, y + 12), classes[number], fill="black", font=font, anchor="lm")
    picture.save(path, format="PNG", compress_level=1)
