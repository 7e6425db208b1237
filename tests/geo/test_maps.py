"""A scene's maps, collected block by block: what GDAL makes of them."""

import signal

import numpy as np
import pytest
from torch import nn

rasterio = pytest.importorskip("rasterio", reason="needs the extra geo (rasterio)")

from vision_mamba.geo import Segmentor  # noqa: E402
from vision_mamba.geo.products import NODATA, Maps, SceneFiles, pixel_areas  # noqa: E402

CLASSES = ("road", "tree", "roof", "water")
UTM, DEGREES = rasterio.crs.CRS.from_epsg(32617), rasterio.crs.CRS.from_epsg(4326)


def scene(height, width):
    """Class, confidence and probabilities, none in a part of it."""
    random = np.random.RandomState(0)
    coarse = random.randint(0, 255, (6, -(-height // 9), -(-width // 9)))
    planes = coarse.repeat(9, 1).repeat(9, 2)[:, :height, :width].astype(np.uint8)
    planes[0] %= len(CLASSES)
    planes[:, height // 3 : height // 2, width // 4 : width // 2] = NODATA
    return planes


@pytest.mark.parametrize("crs, side", [(UTM, 0.1), (DEGREES, 0.001)], ids=["metres", "degrees"])
def test_maps_are_what_was_collected(tmp_path, crs, side):
    """In blocks that cut across tiles, as groups of window columns do, and in any order."""
    height, width = 1300, 2050
    planes = scene(height, width)
    transform = rasterio.transform.from_origin(30.0, 60.0, side, side)
    profile = dict(height=height, width=width, crs=crs, transform=transform)
    files = SceneFiles.plan("scene.tif", tmp_path, confidence=True, probabilities=True, polygons=None)
    files.work.mkdir()
    segmentor = Segmentor(model=nn.Identity(), classes=CLASSES, mean=[0.0], std=[1.0])
    with Maps(files, profile, segmentor) as maps:
        for left, right in ((700, 1601), (0, 700), (1601, width)):
            for top in range(0, height, 512):
                maps.add(top, left, planes[:, top : top + 512, left:right])
        for path in maps.planes:
            maps.write(path)

    counts = np.stack([(planes[0] == i).sum(1) for i in range(len(CLASSES))])
    assert np.array_equal(maps.pixels, counts.sum(1))
    assert maps.hectares == pytest.approx(counts @ pixel_areas(profile) / 1e4, rel=1e-12)
    for path, expected in (
        (files.classes, planes[:1]),
        (files.confidence, planes[1:2]),
        (files.probabilities, planes[2:]),
    ):
        with rasterio.open(path) as file:
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.block_shapes[0] == (512, 512)
            assert file.nodata == NODATA and file.crs == crs and file.transform == transform
            assert file.overviews(1) == [2, 4]
            assert rasterio.enums.ColorInterp.alpha not in file.colorinterp  # the fourth of four 8-bit bands
            assert np.array_equal(file.read(), expected)
            if path == files.classes:
                assert file.tags()["CLASS_2"] == "roof" and file.colormap(1)[2] == (*segmentor.colours()[2], 255)
            else:
                names = ("confidence",) if path == files.confidence else CLASSES
                assert file.descriptions == names and file.scales == (1 / 254,) * len(names)
        with rasterio.open(path, overview_level=0) as file:
            half = file.read().astype(int)
        four = np.stack([expected[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]).astype(int)
        some = (four != NODATA).any(0)
        assert ((half != NODATA) == some).all()
        if path == files.classes:  # the most frequent one, or one of them
            often = np.stack([((four == i).sum(0)) for i in range(len(CLASSES))])
            assert np.array_equal(np.take_along_axis(often, half.clip(0, 3)[None], 0)[0][some], often.max(0)[some])
        else:
            mean = np.ma.array(four, mask=four == NODATA).mean(0)
            assert np.abs(half - mean)[some].max() <= 1


@pytest.mark.parametrize("size", [20_000, 100_000], ids=["no tile", "a tile and a half"])
def test_a_map_that_is_not_whole_is_named(tmp_path, size):
    """Files that cannot grow stand for a full disk."""
    resource = pytest.importorskip("resource")
    profile = dict(height=700, width=900, crs=UTM, transform=rasterio.transform.from_origin(3e5, 6e6, 0.1, 0.1))
    files = SceneFiles.plan("scene.tif", tmp_path, confidence=False, probabilities=False, polygons=None)
    files.work.mkdir()
    segmentor = Segmentor(model=nn.Identity(), classes=CLASSES, mean=[0.0], std=[1.0])
    limits, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with rasterio.Env(), Maps(files, profile, segmentor) as maps:
            for left in range(0, 900, 300):  # tiles that are not whole wait in GDAL's cache
                maps.add(0, left, scene(700, 300))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            # GDAL itself says so only on the standard error stream.
            with pytest.raises(OSError, match=r"scene_classes\.tif could not be written whole"):
                maps.write(files.classes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert not files.classes.exists()
