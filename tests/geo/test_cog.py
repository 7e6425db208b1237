"""Cloud-optimised GeoTIFFs from compressed tiles, as GDAL reads them."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio", reason="needs the extra geo (rasterio)")

from vision_mamba.geo.cog import (  # noqa: E402
    NODATA,
    Overviews,
    across,
    compress,
    halved,
    make_template,
    sizes,
    write_cog,
)  # fmt: skip

TRANSFORM = rasterio.transform.from_origin(404211.9, 3285142.9, 0.1, 0.1)


def picture(bands, height, width, classes=200):
    random = np.random.RandomState(0)
    coarse = random.randint(0, classes, (bands, -(-height // 9), -(-width // 9)))
    planes = coarse.repeat(9, 1).repeat(9, 2)[:, :height, :width].astype(np.uint8)
    planes[:, height // 3 : height // 2, width // 4 : width // 2] = NODATA
    return planes


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("bands, height, width", [(1, 1500, 2701), (3, 600, 513), (2, 512, 300), (1, 5, 2049)])
@pytest.mark.parametrize("total", [0, 2**33], ids=["classic", "big"])
def test_gdal_reads_what_was_written(tmp_path, bands, height, width, numbers, total):
    planes = picture(bands, height, width)
    rows = [planes[:, top : top + 512] for top in range(0, height, 512)]
    profile = dict(height=height, width=width, crs=rasterio.crs.CRS.from_epsg(32617), transform=TRANSFORM)
    make_template(tmp_path / "template.tif", profile, bands, numbers, lambda file: file.update_tags(NAME="a scene"))

    def tiles():
        for row in rows:
            found = [compress(tile, numbers) for tile in across(row)]
            yield b"".join(found), list(map(len, found))

    with ThreadPoolExecutor(2) as pool, closing(Overviews(height, width, numbers, tmp_path, 0, pool)) as overviews:
        for row in rows:
            overviews.add(halved(row, numbers))
        levels = [tiles(), *(overviews.tiles(i) for i in range(len(overviews.sizes)))]
        pairs = list(zip(sizes(height, width), levels, strict=True))
        write_cog(tmp_path / "cog.tif", tmp_path / "template.tif", pairs, total)
    assert (tmp_path / "cog.tif").read_bytes()[2] == (43 if total else 42)
    with rasterio.open(tmp_path / "cog.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.tags()["NAME"] == "a scene"
        assert file.nodata == NODATA and file.crs == profile["crs"] and file.transform == TRANSFORM
        assert file.overviews(1) == [2**i for i in range(1, len(sizes(height, width)))]
        assert np.array_equal(file.read(), planes)
    expected = planes
    for level, size in enumerate(sizes(height, width)[1:]):
        expected = halved(expected, numbers)
        with rasterio.open(tmp_path / "cog.tif", overview_level=level) as file:
            assert file.shape == size and np.array_equal(file.read(), expected)


def test_halves_are_those_of_gdal(tmp_path):
    """Means within rounding, and classes that are as frequent."""
    for numbers, resampling in ((True, "average"), (False, "mode")):
        planes = picture(1, 640, 832, classes=200 if numbers else 4)
        path = tmp_path / f"{resampling}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", count=1, height=640, width=832, dtype="uint8", nodata=NODATA, crs="EPSG:32617",
            transform=TRANSFORM,
        ) as file:  # fmt: skip
            file.write(planes)
        with rasterio.open(path, "r+") as file:
            file.build_overviews([2], rasterio.enums.Resampling[resampling])
        with rasterio.open(path, overview_level=0) as file:
            gdal = file.read().astype(int)
        found = halved(planes, numbers).astype(int)
        assert ((found == NODATA) == (gdal == NODATA)).all()
        if numbers:
            assert np.abs(found - gdal).max() <= 1
        else:
            four = np.stack([planes[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
            assert np.array_equal((four == found).sum(0), (four == gdal).sum(0))
