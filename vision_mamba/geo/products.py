"""What a user gets of a segmented scene: georeferenced maps, outlines, areas, a picture."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vision_mamba.data.rasters import load_rasterio
from vision_mamba.errors import UserError
from vision_mamba.files import replacing

from .models import Segmentor

NODATA = 255
_QUICK_LOOK = 1600  # pixels of its longer side, at most
_COLUMNS = 4096  # pixels of the scene's width that are read at once for it
_POLYGONS = 20_000  # written at once


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


def write_products(
    files: SceneFiles,
    profile: dict[str, Any],
    read: Callable[[], Iterator[tuple[int, int, np.ndarray]]],
    segmentor: Segmentor,
    *,
    simplify: float,
    min_area: float,
    source: str | os.PathLike,
) -> tuple[dict[str, int], dict[str, float] | None]:
    """Writes every result, each under a temporary name first.

    Args:
        profile: the scene's crs, transform, width and height.
        read: gives the first row, the first column and the planes (class, confidence, then probabilities; NODATA
            where there is no data), uint8 (planes, rows, columns), block by block: of 512 rows and a multiple of 512
            columns but at the scene's ends, in row order.
        source: the scene, for the picture.

    Returns:
        Pixels and hectares a class; hectares are None without a coordinate system.
    """
    classes = list(segmentor.classes)
    palette = segmentor.colours()
    rasterio = load_rasterio()
    from rasterio.shutil import copy as rasterio_copy

    pixels, hectares = np.zeros(len(classes), np.int64), np.zeros(len(classes))
    areas = pixel_areas(profile)
    wanted = {path: planes for path, planes in (
        (files.classes, slice(0, 1)), (files.confidence, slice(1, 2)), (files.probabilities, slice(2, None)),
    ) if path is not None}  # fmt: skip
    plain = {path: files.work / path.name for path in wanted}
    # Tiles in row order, each compressed once; GDAL's COG driver then adds overviews and puts them in place.
    writers = {
        path: rasterio.open(
            plain[path], "w", driver="GTiff", dtype="uint8", nodata=NODATA, tiled=True, blockxsize=512, blockysize=512,
            compress="deflate", zlevel=1, bigtiff="if_safer", count=len(classes) if planes.start == 2 else 1, **profile,
        )
        for path, planes in wanted.items()
    }  # fmt: skip
    try:
        writers[files.classes].write_colormap(
            1, {NODATA: (0, 0, 0, 0), **{i: (*rgb, 255) for i, rgb in enumerate(palette)}}
        )
        writers[files.classes].update_tags(**{f"CLASS_{i}": name for i, name in enumerate(classes)})
        for top, left, planes in read():
            box = rasterio.windows.Window(left, top, planes.shape[2], planes.shape[1])
            for path, wanted_planes in wanted.items():
                writers[path].write(planes[wanted_planes], window=box)
            counts = np.stack([np.bincount(row, minlength=256)[: len(classes)] for row in planes[0]])
            pixels += counts.sum(0)
            if areas is not None:
                hectares += areas[top : top + len(counts)] @ counts / 1e4
        for path, planes in wanted.items():
            if planes.start:
                for band in writers[path].indexes:
                    writers[path].set_band_description(band, classes[band - 1] if planes.start == 2 else "confidence")
                writers[path].scales = (1 / 254,) * writers[path].count
    finally:
        for writer in writers.values():
            writer.close()
    if not pixels.sum():
        raise UserError(f"{source} holds nothing but nodata: there is nothing to segment")
    for path in wanted:  # one after the other: together they would be faster, and hold twice the memory
        with replacing(path) as temporary:
            rasterio_copy(
                plain[path], temporary, driver="COG", compress="deflate", blocksize=512, bigtiff="if_safer",
                overview_resampling="mode" if path == files.classes else "average", num_threads="all_cpus",
            )  # fmt: skip
        plain[path].unlink()
    if files.polygons is not None:
        with replacing(files.polygons) as temporary:
            write_polygons(files.classes, temporary, classes, simplify=simplify, min_area=min_area)
    found_pixels = dict(zip(classes, pixels.tolist(), strict=True))
    found_hectares = None if areas is None else dict(zip(classes, hectares.tolist(), strict=True))
    with replacing(files.areas) as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "pixels", "share", "hectares"])
        for name, count in found_pixels.items():
            area = "" if found_hectares is None else f"{found_hectares[name]:.4f}"
            table.writerow([name, count, f"{count / pixels.sum():.6f}", area])
    with replacing(files.picture) as temporary:
        quick_look(source, files.classes, classes, palette, segmentor.bands, temporary)
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

    factor = max(scene.width, scene.height, _QUICK_LOOK) / _QUICK_LOOK
    size = (max(round(scene.height / factor), 1), max(round(scene.width / factor), 1))
    chosen = list(bands or range(1, min(scene.count, 3) + 1))[:3]
    chosen = chosen if len(chosen) == 3 else chosen[:1] * 3
    image, valid = np.zeros((3, *size), np.float32), np.zeros(size, bool)
    # Group by group of columns: a row of tiles of the whole width need not fit into GDAL's cache, and would be decoded
    # anew for each line of the picture.
    groups = min(-(-scene.width // _COLUMNS), size[1])
    for i in range(groups):
        columns = slice(size[1] * i // groups, size[1] * (i + 1) // groups)
        begin, end = (round(column * scene.width / size[1]) for column in (columns.start, columns.stop))
        box = Window(begin, 0, end - begin, scene.height)
        shape = (3, size[0], columns.stop - columns.start)
        image[:, :, columns] = scene.read(chosen, window=box, out_shape=shape)
        valid[:, columns] = (scene.read_masks(chosen, window=box, out_shape=shape) > 0).any(0)
    image = image.transpose(1, 2, 0)
    valid &= np.isfinite(image).all(-1)
    if not valid.any():
        return np.zeros_like(image)
    low, high = np.percentile(image[valid], (2, 98), axis=0)
    return np.where(valid[..., None], np.nan_to_num((image - low) / np.maximum(high - low, 1e-6)).clip(0, 1), 0.0)


def quick_look(source, class_map: Path, classes: Sequence[str], palette, bands, path: Path) -> None:
    """A small picture: the scene, and the classes over it with a legend."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rasterio = load_rasterio()
    with rasterio.open(source) as scene:
        image = decimated(scene, bands)
    with rasterio.open(class_map) as found:
        numbers = found.read(1, out_shape=image.shape[:2])
    size, valid = image.shape[:2], numbers != NODATA
    table = np.zeros((256, 3), np.float32)
    table[: len(palette)] = np.array(palette) / 255
    over = np.where(valid[..., None], (0.45 * image + 0.55 * table[numbers]).clip(0, 1), 0.0)
    image = np.where(valid[..., None], image, 0.0)
    present = [i for i in range(len(classes)) if (numbers == i).any()]
    wide = 7 * size[1] / max(size)
    figure = Figure(figsize=(2 * wide + 2.2, max(7 * size[0] / max(size), 2.5)), layout="constrained", dpi=150)
    for axes, picture in zip(figure.subplots(1, 2), (image, over), strict=True):
        axes.imshow((255 * picture).round().astype(np.uint8))  # of floats matplotlib holds several copies in float64
        axes.set_axis_off()
    handles = [Patch(color=np.array(palette[i]) / 255, label=classes[i]) for i in present[:40]]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.savefig(path, format="png")
