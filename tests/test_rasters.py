"""Rasters of any band count and type: reading, augmentation, statistics, bad input, and a run from end to end.

The pixels are those of the built-in aerial tiles, written as GeoTIFF; numpy is the reference.
"""

import importlib.util
import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vision_mamba.data import (
    band_statistics,
    build_transform,
    check_images,
    create_loader,
    decode_raster,
    keep_in_memory,
    knn_baseline,
    open_dataset,
    preview,
    read_statistics,
)
from vision_mamba.data.rasters import RasterProfile, read_profile
from vision_mamba.errors import UserError, run_main

rasterio = pytest.importorskip("rasterio")
albumentations = pytest.importorskip("albumentations")

TOOLS = Path(__file__).parents[1] / "tools"
NAMES = ("red", "green", "blue", "grey", "ratio")


@pytest.fixture(scope="module")
def tiles():
    """Built-in tiles by split and class: uint8 (48, 48, 3)."""
    found = {}
    for split in ("train", "val"):
        data = open_dataset("builtin", split)
        for target in range(len(data.classes)):
            some = [i for i, t in enumerate(data.targets) if t == target][:6]
            found[split, data.classes[target]] = [np.asarray(data[i][0]) for i in some]
    return found


def five_bands(tile, dtype):
    """(5, H, W): the colours, their mean, and a ratio, in units of their own."""
    red, green, blue = np.moveaxis(tile.astype(np.float64), -1, 0)
    if dtype == "uint8":
        return np.stack([red, green, blue, (red + green + blue) / 3, 255 * red / (red + green + 1)]).astype(dtype)
    bands = np.stack([40 * red + 200, 35 * green, 9 * blue, 10 * (red + blue), 900 * (green - red) / (green + red + 1)])
    return (bands.clip(0) if dtype.startswith("u") else bands).astype(dtype)


def write_tiff(path, bands, *, nodata=None, names=None, **options):
    """bands (C, H, W) -> path."""
    count, height, width = bands.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": bands.dtype.name}
    transform = rasterio.Affine(0.1, 0, 4e5, 0, -0.1, 3e6)
    with rasterio.open(path, "w", **profile, nodata=nodata, transform=transform, **options) as file:
        file.write(bands)
        if names:
            file.descriptions = names
    return path


def write_set(root, tiles, dtype="uint16", nodata=None, block=None):
    """root/{train,val}/<class>/<n>.tif of five bands; ``block`` gives the value of a corner of each image."""
    for (split, name), members in tiles.items():
        for i, tile in enumerate(members):
            bands = five_bands(tile, dtype)
            if block is not None:
                bands[:, :7, :9] = block
            write_tiff(root / split / name / f"{i}.tif", bands, nodata=nodata, names=NAMES)
    return root


def read_all(root, split="train"):
    """The values of a set as numpy sees them, (N, C, H, W) float64, in the set's order."""
    arrays = []
    for path in sorted((root / split).rglob("*.tif")):
        with rasterio.open(path) as file:
            arrays.append(file.read().astype(np.float64))
    return np.stack(arrays)


def error_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_values_are_as_stored(tiles, tmp_path, dtype):
    bands = five_bands(tiles["train", "car"][0], dtype)
    data = write_tiff(tmp_path / "a.tif", bands, names=NAMES).read_bytes()
    profile = read_profile(data, "a.tif", ["ratio", 1])
    assert profile == RasterProfile(dtype, 5, NAMES, (5, 1))
    expected = bands[[4, 0]].transpose(1, 2, 0).astype(np.float64) / (255 if dtype == "uint8" else 1)
    read = decode_raster(data, "a.tif", profile)
    assert read.dtype == np.float32 and read.shape == (48, 48, 2)
    np.testing.assert_allclose(read, expected, rtol=1e-6)


def test_nodata_becomes_nan_band_by_band(tmp_path):
    bands = np.arange(2 * 4 * 4, dtype=np.float32).reshape(2, 4, 4)
    bands[0, 0, 0], bands[1, 1, 1], bands[1, 2, 2] = -9999, np.nan, np.inf
    data = write_tiff(tmp_path / "a.tif", bands, nodata=-9999).read_bytes()
    read = decode_raster(data, "a.tif", read_profile(data, "a.tif"))
    assert sorted(map(tuple, np.argwhere(np.isnan(read)))) == [(0, 0, 0), (1, 1, 1), (2, 2, 1)]


def test_a_stored_mask_counts_but_alpha_does_not(tmp_path):
    bands = np.full((4, 4, 4), 100, np.uint8)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_tiff(tmp_path / "mask.tif", bands[:3])
        with rasterio.open(tmp_path / "mask.tif", "r+") as file:
            file.write_mask(np.arange(16).reshape(4, 4) > 2)
    data = (tmp_path / "mask.tif").read_bytes()
    assert np.isnan(decode_raster(data, "m", read_profile(data, "m"))).sum() == 3 * 3
    bands[3, :2] = 0  # GDAL calls the fourth of four 8-bit bands alpha; here it is near infrared
    data = write_tiff(tmp_path / "nir.tif", bands, photometric="RGB", alpha="yes").read_bytes()
    assert not np.isnan(decode_raster(data, "n", read_profile(data, "n"))).any()


def test_wrong_rasters_are_named(tmp_path):
    bands = np.full((3, 4, 4), 7, np.uint16)
    whole = write_tiff(tmp_path / "a.tif", bands, names=("B02", "B02", "B04")).read_bytes()
    profile = read_profile(whole, "a.tif")
    assert "no band named 'B4'; did you mean 'B04'?" in error_of(read_profile, whole, "a.tif", ["B4"])
    assert "2 bands named 'B02'" in error_of(read_profile, whole, "a.tif", ["B02"])
    assert "a.tif has 3 bands, numbered from 1" in error_of(read_profile, whole, "a.tif", [0])
    two = write_tiff(tmp_path / "b.tif", bands[:2]).read_bytes()
    assert "b.tif has 2 bands of uint16, where 3 bands of uint16" in error_of(decode_raster, two, "b.tif", profile)
    eight = write_tiff(tmp_path / "c.tif", bands.astype(np.uint8)).read_bytes()
    assert "c.tif has 3 bands of uint8, where 3 bands of uint16" in error_of(decode_raster, eight, "c.tif", profile)
    empty = write_tiff(tmp_path / "d.tif", bands, nodata=7).read_bytes()
    assert "d.tif holds nothing but nodata" in error_of(decode_raster, empty, "d.tif", profile)
    for damaged in (whole[:100], b"", b"text"):
        assert "cannot read image e.tif" in error_of(decode_raster, damaged, "e.tif", profile)


def test_without_rasterio_the_extra_is_named(tmp_path, monkeypatch):
    data = write_tiff(tmp_path / "a.tif", np.ones((5, 4, 4), np.uint16)).read_bytes()
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert "vision-mamba-zoo[geo]" in error_of(read_profile, data, "a.tif")


# Sets


def test_what_a_set_is_read_as(tiles, tmp_path):
    tile = tiles["train", "car"][0].transpose(2, 0, 1)
    cases = {
        "pictures": (tile, None),
        "with nodata": (tile, 255),
        "16 bits": (tile.astype(np.uint16) * 9, None),
        "floats": (tile.astype(np.float32), None),
    }
    for name, (bands, nodata) in cases.items():
        write_tiff(tmp_path / name / "train" / "x" / "a.tif", bands, nodata=nodata)
        data = open_dataset(str(tmp_path / name), "train")
        assert (data.profile is None) == (name == "pictures"), name
        assert isinstance(data[0][0], Image.Image if name == "pictures" else np.ndarray)
    data = open_dataset(str(tmp_path / "pictures"), "train", in_chans=2, bands=[3, 1])
    np.testing.assert_allclose(data[0][0], tile[[2, 0]].transpose(1, 2, 0) / 255, rtol=1e-6)


def test_band_count_that_does_not_fit(tiles, tmp_path):
    root = write_set(tmp_path / "set", tiles)
    message = error_of(open_dataset, str(root), "train", in_chans=3)
    assert "has 5 band(s), but in_chans=3" in message and "model.in_chans=5" in message and "data.bands" in message
    assert "2 bands are picked, but in_chans=3" in error_of(open_dataset, str(root), "train", bands=[1, 2])
    assert "did you mean 'red'" in error_of(open_dataset, str(root), "train", bands=["re", 1, 2])
    assert "has 3 band(s), but in_chans=7" in error_of(open_dataset, "builtin", "train", in_chans=7)


def test_a_tar_of_rasters_is_read_like_the_folder(tiles, tmp_path):
    root = write_set(tmp_path / "set", tiles, nodata=0)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(root, "set")
    folder, tar = (open_dataset(str(tmp_path / n), "val", in_chans=5) for n in ("set", "set.tar"))
    assert folder.profile == tar.profile and len(folder) == len(tar)
    for i in range(len(folder)):
        np.testing.assert_array_equal(folder[i][0], tar[i][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_check_lists_every_odd_file(tiles, tmp_path, workers):
    root = write_set(tmp_path / "set", tiles, nodata=0)
    bands = five_bands(tiles["train", "car"][0], "uint16")
    write_tiff(root / "train" / "car" / "four.tif", bands[:4])
    write_tiff(root / "train" / "car" / "float.tif", bands.astype(np.float32))
    write_tiff(root / "train" / "tree" / "void.tif", bands * 0, nodata=0)
    (root / "train" / "tree" / "torn.tif").write_bytes((root / "train" / "tree" / "0.tif").read_bytes()[:900])
    lines = check_images(open_dataset(str(root), "train", in_chans=5), progress=False, num_workers=workers)
    assert len(lines) == 4
    for line, words in zip(
        sorted(lines), ("torn.tif", "float.tif has 5 bands of float32", "four.tif has 4 bands", "void.tif holds nothing"),
        strict=True,
    ):  # fmt: skip
        assert words in line


def test_rasters_among_pictures_are_named(tiles, tmp_path):
    tile = tiles["train", "car"][0].transpose(2, 0, 1)
    write_tiff(tmp_path / "train" / "x" / "a.tif", tile)
    write_tiff(tmp_path / "train" / "x" / "b.tif", tile[:1].astype(np.uint16))
    (line,) = check_images(open_dataset(str(tmp_path), "train"), progress=False)
    assert "b.tif is a raster of 1 band of 16 bits" in line and "data.bands" in line


def test_preview_is_a_picture(tiles):
    bands = five_bands(tiles["train", "car"][0], "uint16").astype(np.float32).transpose(1, 2, 0)
    bands[:5] = np.nan
    picture = preview(bands)
    assert picture.mode == "RGB" and picture.size == (48, 48)
    assert np.asarray(picture)[:5].max() == 0 and np.asarray(picture).max() == 255
    assert preview(bands[..., :2]).mode == "L"


# Transforms

MEAN, STD = (0.4, 0.45, 0.3), (0.2, 0.21, 0.22)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_evaluation_agrees_with_that_of_pictures(tiles, tmp_path, size):
    # PIL rounds to 8 bits after each of its two passes, so they differ by about one part in 255.
    tile = tiles["val", "car"][0]
    options = {"split": "val", "img_size": size, "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    picture = build_transform(**options)(Image.fromarray(tile))
    raster = build_transform(**options, raster=True)(tile.astype(np.float32) / 255)
    assert picture.shape == raster.shape == (3, *size)
    assert float((picture - raster).abs().max()) * min(STD) < 1.6 / 255


@pytest.mark.parametrize("train", [False, True])
def test_nodata_is_the_mean_and_does_not_spread(train):
    image = np.full((40, 40, 2), 3000.0, np.float32)
    image[5:20, 7:30, 0] = np.nan
    options = {"img_size": 29, "in_chans": 2, "mean": [1000, 2000], "std": [1000, 500], "interpolation": "bilinear"}
    # The whole image: a random crop might miss the hole.
    options |= {"recipe": "overhead_geometry", "scale": (1, 1), "ratio": (1, 1)} if train else {}
    out = build_transform(split="train" if train else "val", raster=True, **options)(image)
    assert out.dtype == torch.float32 and bool(torch.isfinite(out).all())
    assert float(out[0].min()) == 0 and float(out[0].max()) == pytest.approx(2)
    assert torch.allclose(out[1], torch.full((29, 29), 2.0))


@pytest.mark.parametrize("bands", [1, 2, 3, 7])
def test_overhead_geometry_takes_the_eight_orientations(tiles, bands):
    tile = np.concatenate([tiles["val", "car"][i] for i in range(3)], axis=2).astype(np.float32)[..., :bands] / 255
    eight = [np.rot90(side, k) for side in (tile, tile[::-1]) for k in range(4)]
    transform = build_transform(
        split="train", img_size=48, in_chans=bands, mean=[0.0] * bands, std=[1.0] * bands, scale=(1, 1), ratio=(1, 1),
        recipe="overhead_geometry", raster=True,
    )  # fmt: skip
    seen = set()
    for seed in range(60):
        transform.set_random_seed(seed)
        out = transform(tile).numpy().transpose(1, 2, 0)
        seen.add(next(i for i, expected in enumerate(eight) if np.abs(out - expected).max() < 1e-6))
    assert seen == set(range(8))


@pytest.mark.parametrize("recipe", ["overhead", "overhead_geometry"])
@pytest.mark.parametrize(("bands", "raster"), [(1, False), (3, False), (4, False), (1, True), (13, True)])
def test_recipes_serve_pictures_and_rasters(recipe, bands, raster):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 60, bands), dtype=np.uint8)
    mode = {1: "L", 3: "RGB", 4: "RGBX"}.get(bands)
    image = pixels.astype(np.float32) * 30 if raster else Image.frombytes(mode, (60, 50), pixels.tobytes())
    options = {"mean": [3000.0] * bands, "std": [900.0] * bands} if raster else {}
    transform = build_transform(
        split="train", img_size=(24, 32), in_chans=bands, recipe=recipe, raster=raster, scale=(0.3, 1), **options
    )
    outs = []
    for seed in (1, 1, 2):
        transform.set_random_seed(seed)
        outs.append(transform(image))
    assert outs[0].shape == (bands, 24, 32) and outs[0].dtype == torch.float32 and bool(torch.isfinite(outs[0]).all())
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_gain_and_offset_are_drawn_for_each_band():
    image = np.random.default_rng(0).normal(size=(30, 30, 6)).astype(np.float32)
    transform = build_transform(
        split="train", img_size=30, in_chans=6, mean=[0.0] * 6, std=[1.0] * 6, raster=True, library="albumentations",
        albumentations=[{"BandGainOffset": {"gain": 0.3, "offset": 0.5, "p": 1.0}}, {"Resize": {"height": 30, "width": 30}}],
    )  # fmt: skip
    transform.set_random_seed(3)
    out = transform(image).numpy()
    fits = np.array([np.polyfit(image[..., b].ravel().astype(float), out[b].ravel(), 1) for b in range(6)])
    assert (
        len(set(fits[:, 0].round(3))) == 6 and (np.abs(fits[:, 0] - 1) < 0.3).all() and (np.abs(fits[:, 1]) < 0.5).all()
    )
    assert np.ptp(fits[:, 0]) > 0.05 and np.ptp(fits[:, 1]) > 0.05
    for b in range(6):  # nothing is clipped
        np.testing.assert_allclose(out[b], fits[b, 0] * image[..., b] + fits[b, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "overhed"}, "did you mean 'overhead'"),
        ({"recipe": "overhead", "interpolation": "hamming"}, "interpolation 'hamming'"),
        ({"recipe": "overhead", "library": "albumentations", "albumentations": ["D4"]}, "unset one"),
        ({"library": "albumentations", "albumentations": ["ColorJitter"]}, "ColorJitter is for 8-bit pictures"),
        (
            {"library": "albumentations", "albumentations": [{"OneOf": {"transforms": ["Blur", "D4"]}}]},
            "Blur is for 8-bit pictures",
        ),
        ({"auto_augment": "rand-m9"}, "recipe: overhead"),
        ({"interpolation": "lanczos"}, "'lanczos' is for pictures"),
        ({"mean": [0.5] * 3}, "mean has 3 values for in_chans=5"),
    ],
)
def test_wrong_raster_augmentation_is_named(options, words):
    known = {"split": "train", "img_size": 16, "in_chans": 5, "mean": [0.5] * 5, "std": [1.0] * 5, "raster": True}
    assert words in error_of(build_transform, **{**known, **options})


def test_band_noise_is_not_for_pictures():
    options = {"library": "albumentations", "albumentations": ["BandGainOffset", {"Resize": {"height": 8, "width": 8}}]}
    assert "BandGainOffset is for rasters" in error_of(build_transform, split="train", img_size=8, **options)


def test_batches_do_not_depend_on_workers(tiles, tmp_path):
    data = open_dataset(str(write_set(tmp_path / "set", tiles, nodata=0)), "train", in_chans=5)
    transform = build_transform(
        split="train", img_size=16, in_chans=5, mean=[2000] * 5, std=[900] * 5, recipe="overhead", raster=True
    )
    runs = []
    for workers in (0, 2):
        loader = create_loader(data, batch_size=8, train=True, transform=transform, num_workers=workers)
        runs.append(torch.cat([images for images, _ in loader]))
    assert runs[0].shape == (24, 5, 16, 16) and torch.equal(*runs)


# Statistics


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("nodata", [False, True])
def test_statistics_agree_with_numpy(tiles, tmp_path, dtype, nodata):
    value = {"uint8": 250, "uint16": 65535, "float32": -9999.0}[dtype]
    root = write_set(tmp_path / "set", tiles, dtype, *((value, value) if nodata else ()))
    found = band_statistics(open_dataset(str(root), "train", in_chans=5), progress=False)
    values = read_all(root)
    if nodata:
        values = np.where(values == value, np.nan, values)
    values = values.transpose(1, 0, 2, 3).reshape(5, -1) / (255 if dtype == "uint8" else 1)
    assert found["bands"] == [1, 2, 3, 4, 5] and found["names"] == list(NAMES) and found["dtype"] == dtype
    assert found["images"] == 24 and found["nodata"] == pytest.approx(np.isnan(values).mean())
    np.testing.assert_allclose(found["mean"], np.nanmean(values, 1), rtol=1e-6)
    np.testing.assert_allclose(found["std"], np.nanstd(values, 1), rtol=1e-6)
    np.testing.assert_allclose(found["min"], np.nanmin(values, 1), rtol=1e-6)
    np.testing.assert_allclose(found["max"], np.nanmax(values, 1), rtol=1e-6)
    for p, row in found["percentiles"].items():
        expected = np.nanpercentile(values, int(p), axis=1, method="inverted_cdf")
        np.testing.assert_allclose(row, expected, rtol=0.008 if dtype == "float32" else 1e-6, atol=1e-6)


def test_statistics_of_pictures_and_by_two_workers():
    data = open_dataset("builtin", "val")
    found = band_statistics(data, num_workers=2, progress=False)
    assert found == band_statistics(data, progress=False)
    pixels = np.stack([np.asarray(data[i][0]) for i in range(len(data))]).reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["std"], pixels.std(0), rtol=1e-6)
    assert found["names"] == ["red", "green", "blue"] and found["dtype"] == "uint8"


def test_statistics_are_looked_up_by_band(tiles, tmp_path):
    root = write_set(tmp_path / "set", tiles)
    found = band_statistics(open_dataset(str(root), "train", in_chans=5), progress=False)
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(found))
    data = open_dataset(str(root), "val", in_chans=2, bands=["blue", 1])
    mean, std = read_statistics(str(path), data)
    assert mean == [found["mean"][2], found["mean"][0]] and std == [found["std"][2], found["std"][0]]

    def refuses(**changes):
        path.write_text(yaml.safe_dump({**found, **changes}))
        return error_of(read_statistics, str(path), data)

    assert "of float32 images, but" in refuses(dtype="float32")
    assert "no band 3 (has: 1, 2)" in refuses(**{k: found[k][:2] for k in ("bands", "mean", "std")})
    assert "lists of one length" in refuses(mean=[1.0])
    assert "band 1 of" in refuses(std=[0.0] * 5) or "band 3 of" in refuses(std=[0.0] * 5)
    path.write_text("mean: [1]")
    assert "lacks dtype, bands, std" in error_of(read_statistics, str(path), data)
    path.write_text("[")
    assert "not valid YAML" in error_of(read_statistics, str(path), data)
    assert "nowhere.yaml cannot be read" in error_of(read_statistics, "nowhere.yaml", data)


def test_a_band_without_a_value_is_named(tiles, tmp_path):
    bands = five_bands(tiles["train", "car"][0], "uint16")
    bands[3] = 0
    write_tiff(tmp_path / "train" / "x" / "a.tif", np.where(bands == 0, 0, bands), nodata=0)
    data = open_dataset(str(tmp_path), "train", in_chans=5)
    assert "band 4" in error_of(band_statistics, data, progress=False)


def test_neighbours_of_rasters():
    # The second band's spread would drown the first, which alone tells the classes apart.
    class Bands(torch.utils.data.Dataset):
        def __init__(self, seed):
            self.noise = np.random.default_rng(seed).normal(size=(12, 8, 8, 2)).astype(np.float32)

        def __len__(self):
            return 12

        def __getitem__(self, i):
            image = self.noise[i] * [0.1, 5000] + [i % 3, 9000]
            image[0, 0] = np.nan
            return image.astype(np.float32), i % 3

    assert knn_baseline(Bands(0), Bands(1), k=1, size=1) == 1.0


# From end to end, through the tools


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments, capsys, monkeypatch):
    """Exit code, stdout and stderr of a tool."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        if name == "train":
            runpy.run_path(str(TOOLS / "train.py"), run_name="__main__")
        else:
            run_main(lambda: tool(name).main(list(map(str, arguments))))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


CONFIG = {
    "model": {"name": "test_vim", "img_size": 32, "in_chans": 5},
    "data": {"batch_size": 8, "num_workers": 0},
    "augment": {"recipe": "overhead"},
    "schedule": {"epochs": 1, "warmup_epochs": 0},
    "train": {"device": "cpu", "knn_baseline": True},
    "output": {"tensorboard": False},
}


def test_train_evaluate_and_predict_five_bands(one_thread, tiles, tmp_path, capsys, monkeypatch):
    root = write_set(tmp_path / "set", tiles, nodata=65535, block=65535)
    config, statistics, out = tmp_path / "c.yaml", tmp_path / "s.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(CONFIG))
    tools = {"capsys": capsys, "monkeypatch": monkeypatch}
    source = f"data.source={root}"
    code, _, err = run("train", config, source, "--output", out, **tools)
    assert code == 2 and "uint16 rasters" in err and "data.statistics" in err and not out.exists()
    code, shown, _ = run("band_statistics", root, "--out", statistics, "--workers", 0, **tools)
    assert code == 0 and "rasters of 5 bands" in shown
    wrong = five_bands(tiles["train", "car"][0], "uint16")[:4]
    write_tiff(root / "val" / "tree" / "wrong.tif", wrong)
    arguments = (config, source, f"data.statistics={statistics}", "--output", out)
    code, _, err = run("train", *arguments, **tools)
    assert code == 2 and "wrong.tif has 4 bands" in err and err.count("\n") == 1 and not out.exists()
    (root / "val" / "tree" / "wrong.tif").unlink()
    code, shown, err = run("train", *arguments, **tools)
    assert code == 0, err
    assert "precision" in shown and "nearest neighbours" in shown

    saved = torch.load(out / "best.pth", weights_only=True)
    found = yaml.safe_load(statistics.read_text())
    assert saved["data_config"]["mean"] == found["mean"] and saved["data_config"]["std"] == found["std"]
    assert saved["data_config"]["raster"] == {
        "dtype": "uint16", "count": 5, "names": NAMES, "bands": (1, 2, 3, 4, 5),
    }  # fmt: skip
    statistics.write_text(yaml.safe_dump({**found, "mean": [m + 1 for m in found["mean"]]}))
    code, _, err = run("train", *arguments, "--resume", "auto", **tools)
    assert code == 2 and "s.yaml has" in err
    statistics.write_text(yaml.safe_dump(found))
    code, shown, err = run("train", *arguments, "--resume", "auto", **tools)
    assert code == 0 and "all epochs are done" in shown, err
    code, _, err = run("evaluate", out / "best.pth", "--workers", 0, **tools)
    assert code == 0, err
    report = json.loads((out / "evaluation" / "metrics.json").read_text())
    with open(out / "log.csv") as log:
        header, row = (line.strip().split(",") for line in log)
    for name in ("top1", "precision", "recall", "f1", "loss"):
        assert report[name] == pytest.approx(float(row[header.index(f"val_{name}")]), rel=1e-5)

    other = write_tiff(tmp_path / "rgb.tif", wrong[:3])
    void = write_tiff(tmp_path / "void.tif", np.full((5, 9, 9), 65535, np.uint16), nodata=65535)
    code, _, err = run("predict", out / "best.pth", root / "val", other, void, "--topk", 4, **tools)
    assert code == 0
    assert "rgb.tif has 3 bands of uint16, where 5 bands" in err and "void.tif holds nothing but nodata" in err
    predictions = json.loads((out / "predictions" / "predictions.json").read_text())["predictions"]
    assert len(predictions) == 24
    right = sum(p["topk"][0]["class"] == Path(p["image"]).parent.name for p in predictions)
    assert right / 24 == pytest.approx(report["top1"])

    eight = write_set(tmp_path / "eight", tiles, "uint8")
    code, _, err = run("evaluate", out / "best.pth", "--data", eight, **tools)
    assert code == 2 and "5 uint8 bands" in err and "5 uint16 bands" in err


def test_a_model_of_pictures_names_a_geotiff(one_thread, tiles, tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.yaml"
    settings = {**CONFIG, "model": {"name": "test_vim", "img_size": 32}, "train": {"device": "cpu"}}
    config.write_text(yaml.safe_dump(settings))
    for (split, name), members in tiles.items():
        (tmp_path / "set" / split / name).mkdir(parents=True)
        for i, tile in enumerate(members):
            Image.fromarray(tile).save(tmp_path / "set" / split / name / f"{i}.png")
    tools = {"capsys": capsys, "monkeypatch": monkeypatch}
    code, _, err = run("train", config, f"data.source={tmp_path / 'set'}", "--output", tmp_path / "out", **tools)
    assert code == 0, err
    tile = tiles["val", "car"][0].transpose(2, 0, 1)
    good = write_tiff(tmp_path / "good.tif", tile, nodata=255)
    deep = write_tiff(tmp_path / "deep.tif", tile.astype(np.uint16))
    void = write_tiff(tmp_path / "void.tif", np.full_like(tile, 255), nodata=255)
    code, shown, err = run("predict", tmp_path / "out" / "best.pth", good, deep, void, **tools)
    assert code == 0 and "good.tif" in shown
    assert "deep.tif is a raster of 3 bands of 16 bits" in err and "void.tif holds nothing but nodata" in err


def test_two_kinds_in_two_splits(tiles, tmp_path, capsys, monkeypatch):
    root = write_set(tmp_path / "set", tiles)
    for path in (root / "val").rglob("*.tif"):
        with rasterio.open(path) as file:
            bands = file.read()
        write_tiff(path, bands.astype(np.float32))
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    code, _, err = run(
        "train", config, f"data.source={root}", "--output", tmp_path / "out", capsys=capsys, monkeypatch=monkeypatch
    )
    assert code == 2 and "5 uint16 bands" in err and "5 float32 bands" in err


def test_png_goes_through_the_same_reader():
    # data.bands makes rasters of any format that GDAL reads.
    file = io.BytesIO()
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(pixels).save(file, "PNG")
    read = decode_raster(file.getvalue(), "x.png", read_profile(file.getvalue(), "x.png", [2]))
    np.testing.assert_allclose(read[..., 0], pixels[..., 1] / 255, rtol=1e-6)


# In memory


def test_rasters_in_memory_are_the_files(tiles, tmp_path):
    data = open_dataset(str(write_set(tmp_path / "set", tiles, nodata=0)), "train", in_chans=5)
    before = [data[i][0] for i in range(len(data))]
    assert keep_in_memory(data, progress=False) == [] and data.memory[0].dtype == np.float32
    for i, image in enumerate(before):
        np.testing.assert_array_equal(data[i][0], image)
    data[0][0][:] = -1  # a caller's own copy
    np.testing.assert_array_equal(data[0][0], before[0])
