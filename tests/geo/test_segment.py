"""Whole rasters: blending against one pass, coordinates, nodata, areas, outlines, kill and resume, bad input."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

rasterio = pytest.importorskip("rasterio", reason="needs the extra geo (rasterio)")

from rasterio.transform import Affine, from_origin  # noqa: E402

from vision_mamba.data import open_dataset  # noqa: E402
from vision_mamba.errors import UserError  # noqa: E402
from vision_mamba.geo import Segmentor, segment_raster  # noqa: E402
from vision_mamba.geo.products import decimated, pixel_areas  # noqa: E402
from vision_mamba.geo.reader import SceneReader  # noqa: E402
from vision_mamba.geo.room import Room  # noqa: E402
from vision_mamba.geo.windows import Grid, blend_rows, blend_weights, starts  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "segment.py"
UTM = rasterio.crs.CRS.from_epsg(32617)
NORTH_UP = from_origin(404211.9, 3285142.9, 0.1, 0.1)
CLASSES = ("road", "tree", "roof")
MEAN, STD = (118.0, 116.0, 105.0), (50.0, 48.0, 47.0)


@pytest.fixture(scope="module")
def tiles():
    """Real aerial tiles, (n, 48, 48, 3) uint8."""
    data = open_dataset("builtin", "val")
    return np.stack([np.asarray(data[i][0]) for i in range(0, len(data), 2)])


def mosaic(tiles, height, width):
    rows, columns = -(-height // 48), -(-width // 48)
    picks = [tiles[i % len(tiles)] for i in range(rows * columns)]
    lines = [np.concatenate(picks[i * columns : (i + 1) * columns], 1) for i in range(rows)]
    return np.concatenate(lines)[:height, :width].transpose(2, 0, 1)


def write(path, bands, transform=NORTH_UP, crs=UTM, **options):
    profile = dict(driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2], dtype=bands.dtype)
    with rasterio.open(path, "w", **profile, transform=transform, crs=crs, **options) as file:
        file.write(bands)
    return path


def network(bands=3, classes=3):
    torch.manual_seed(0)
    layers = nn.Conv2d(bands, 8, 9, padding=4), nn.GELU(), nn.Conv2d(8, classes, 9, padding=4)
    return nn.Sequential(*layers).eval()


def segmentor(**options):
    return Segmentor(**{"model": network(), **options}, classes=CLASSES, mean=MEAN, std=STD)


def read(path):
    with rasterio.open(path) as file:
        return file.read()


def one_pass(bands):
    x = (torch.from_numpy(bands.astype(np.float32)) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    with torch.no_grad():
        return network()(x[None])[0].argmax(0).numpy()


@pytest.mark.parametrize(
    "height, width, window, overlap",
    [(50, 70, 16, 4), (33, 16, 16, 9), (10, 40, 16, 0), (40, 41, 16, 15), (7, 9, 16, 3)],
)
@pytest.mark.parametrize("kind", ["cosine", "gaussian"])
def test_blending_is_the_weighted_mean(height, width, window, overlap, kind):
    grid = Grid(height, width, window, overlap)
    weights = blend_weights(window, overlap, kind)
    torch.manual_seed(0)
    corners = [(y, x) for y in grid.tops for x in grid.lefts]
    scores = [torch.rand(2, window, window) * weights for _ in corners]
    total, weight = torch.zeros(2, height, width, dtype=torch.float64), torch.zeros(height, width, dtype=torch.float64)
    for (y, x), score in zip(corners, scores, strict=True):
        h, w = min(window, height - y), min(window, width - x)
        total[:, y : y + h, x : x + w] += score[:, :h, :w].double()
        weight[y : y + h, x : x + w] += weights[:h, :w].double()
    assert (weight > 0).all()
    blocks = [(top, block.clone()) for top, block in blend_rows(grid, range(len(grid.tops)), scores, weights)]
    assert [top for top, _ in blocks] == grid.tops
    assert torch.allclose(torch.cat([b for _, b in blocks], 1).double(), total / weight, atol=1e-5)
    # From the middle on: everything that the rows asked for need.
    rows = grid.rows_for(height // 2, height)
    mine = scores[rows.start * len(grid.lefts) :]
    later = [(top, block.clone()) for top, block in blend_rows(grid, rows, mine, weights)]
    again = torch.cat([b for _, b in later], 1)[:, height // 2 - later[0][0] :]
    assert torch.allclose(again.double(), (total / weight)[:, height // 2 :], atol=1e-5)


@pytest.mark.parametrize("overlap, panel", [(4, 24), (4, 36), (9, 7), (15, 3), (0, 16)])
def test_blending_group_by_group_is_the_same(monkeypatch, overlap, panel):
    """Groups of window columns, each handed what the one before shares with it: to the last bit, and in its memory."""
    torch.manual_seed(0)
    grid, weights = Grid(45, 90, 16, overlap), blend_weights(16, overlap, "cosine")
    scores = {(r, c): torch.rand(2, 16, 16) * weights for r in range(len(grid.tops)) for c in range(len(grid.lefts))}
    rooms, sizes = [Room() for _ in range(2)], set()

    def blend(columns, **edges):
        mine = [scores[r, c] for r in range(len(grid.tops)) for c in columns]
        blocks = blend_rows(grid, range(len(grid.tops)), mine, weights, columns=columns, **edges)
        return torch.cat([block.clone() for _, block in blocks], 1)

    whole = blend(range(len(grid.lefts)))
    monkeypatch.setattr("vision_mamba.geo.windows._PANEL", panel)
    assert len(grid.panels) > 1 and [c for columns in grid.panels for c in columns] == list(range(len(grid.lefts)))
    kept, pieces = {}, []

    def keep(row, edge):
        kept[row] = edge.clone()

    for columns in grid.panels:
        load, save = kept.get if pieces else None, keep if columns.stop < len(grid.lefts) else None
        piece = blend(columns, load_edge=load, save_edge=save, rooms=rooms)
        assert piece.shape[2] == len(grid.pixels(columns))
        pieces.append(piece)
        sizes.add(tuple(len(room._memory) for room in rooms))
    assert torch.equal(torch.cat(pieces, 2), whole)
    assert len(sizes) == 1  # the first group takes what the widest needs


def test_windows_cover_the_scene():
    assert starts(10, 16, 4) == [0] and starts(16, 16, 4) == [0] and starts(17, 16, 4) == [0, 1]
    assert starts(40, 16, 4) == [0, 12, 24]
    weights = blend_weights(64, 16, "cosine")[32]
    assert torch.allclose(weights[:16] + weights[-16:], torch.ones(16), atol=1e-6) and (weights[16:48] == 1).all()
    with pytest.raises(ValueError, match="blend='mean': allowed are 'cosine' and 'gaussian'"):
        blend_weights(64, 16, "mean")
    with pytest.raises(ValueError, match="window 64 and overlap 64"):
        Grid(100, 100, 64, 64)


def test_blended_windows_agree_with_one_pass(tiles, tmp_path):
    bands = mosaic(tiles, 700, 530)
    scene = write(tmp_path / "scene.tif", bands)
    whole = one_pass(bands)
    agreement = {}
    for overlap in (0, 32):
        out = tmp_path / str(overlap)
        report = segment_raster(scene, out, segmentor(), window=128, overlap=overlap, progress=False)
        agreement[overlap] = (read(report.files.classes)[0] == whole).mean()
    assert agreement[32] > 0.997 and agreement[0] < 0.98
    assert report.windows == len(starts(700, 128, 32)) * len(starts(530, 128, 32))


def test_interrupted_run_goes_on_in_groups_of_columns(tiles, tmp_path, monkeypatch):
    """A scene of several groups of window columns, stopped in one, is what one group makes of it; batch by batch too."""
    bands = mosaic(tiles, 1200, 700)
    bands[:, 200:300, 100:500] = 0
    scene = write(tmp_path / "scene.tif", bands, nodata=0)
    options = dict(window=256, overlap=64, progress=False, probabilities=True)
    one = segment_raster(scene, tmp_path / "one", segmentor(), batch_size=1, **options)
    monkeypatch.setattr("vision_mamba.geo.windows._PANEL", 192)
    groups = segment_raster(scene, tmp_path / "groups", segmentor(), batch_size=1, **options)
    in_threes = segment_raster(scene, tmp_path / "threes", segmentor(), batch_size=3, **options)
    assert one.windows == groups.windows == in_threes.windows == 24
    for name in ("classes", "confidence", "probabilities"):
        assert np.array_equal(read(getattr(one.files, name)), read(getattr(groups.files, name)))

    for batches in (1, 2, 4):  # and then it stops
        stopped, answers = segmentor(), iter([network()] * batches)
        stopped.model = lambda x, answers=answers: next(answers)(x)
        with pytest.raises(RuntimeError, match="StopIteration"):
            segment_raster(scene, tmp_path / "again", stopped, batch_size=3, resume=True, **options)
        assert not list((tmp_path / "again").glob("*.tif"))
    again = segment_raster(scene, tmp_path / "again", segmentor(), batch_size=3, resume=True, **options)
    for name in ("classes", "confidence", "probabilities"):
        assert np.array_equal(read(getattr(again.files, name)), read(getattr(in_threes.files, name)))
    assert again.windows < 24 and not list((tmp_path / "again").glob(".*"))


@pytest.mark.gpu
def test_graphs_segment_as_eager_passes_do(tiles, tmp_path):
    """On a GPU, and both as a CPU does it, but for the order of sums."""
    bands = mosaic(tiles, 700, 530)
    bands[:, :300, :300] = 0  # the first passes see nothing
    scene = write(tmp_path / "scene.tif", bands, nodata=0)
    options = dict(window=128, batch_size=3, tta="flips", probabilities=True, progress=False)
    on_cpu = segment_raster(scene, tmp_path / "cpu", segmentor(), **options)
    there = segmentor(device="cuda", model=network().cuda())
    eager = segment_raster(scene, tmp_path / "eager", there, cuda_graphs=False, **options)
    graphs = segment_raster(scene, tmp_path / "graphs", there, **options)
    for name in ("classes", "confidence", "probabilities"):
        assert np.array_equal(read(getattr(eager.files, name)), read(getattr(graphs.files, name)))
    found, wanted = (read(run.files.probabilities).astype(int) for run in (graphs, on_cpu))
    assert np.abs(found - wanted).max() <= 1 and (found != wanted).mean() < 0.01


@pytest.mark.gpu
def test_a_model_that_cannot_be_captured_runs_eagerly(tiles, tmp_path):
    scene = write(tmp_path / "scene.tif", mosaic(tiles, 300, 330))
    options, net = dict(window=128, progress=False), network().cuda()
    plain = segment_raster(scene, tmp_path / "plain", segmentor(device="cuda", model=net), **options)
    waits = segmentor(device="cuda", model=lambda x: net(x) + 0 * float(x.mean()))
    with pytest.raises(UserError, match="cannot be captured as a CUDA graph .*; leave cuda_graphs out"):
        segment_raster(scene, tmp_path / "waits", waits, cuda_graphs=True, **options)
    with pytest.warns(UserWarning, match="scene.tif: runs eagerly, for the model cannot be captured"):
        found = segment_raster(scene, tmp_path / "waits", waits, overwrite=True, **options)
    assert np.array_equal(read(found.files.classes), read(plain.files.classes))
    torch.rand(3, device="cuda"), torch.cuda.synchronize()  # random numbers are drawn as before


def test_graphs_want_a_gpu(tiles, tmp_path):
    scene = write(tmp_path / "scene.tif", mosaic(tiles, 100, 130))
    with pytest.raises(UserError, match="cuda_graphs wants a GPU, and the model is on cpu"):
        segment_raster(scene, tmp_path / "out", segmentor(), cuda_graphs=True)
    assert not (tmp_path / "out").exists()


def test_gdal_cache_is_bounded_while_it_runs(tiles, tmp_path):
    from rasterio.env import get_gdal_config

    scene, found, inner = write(tmp_path / "scene.tif", mosaic(tiles, 100, 130)), [], network()
    before = get_gdal_config("GDAL_CACHEMAX")
    watched = segmentor()
    watched.model = lambda x: (found.append(get_gdal_config("GDAL_CACHEMAX")), inner(x))[1]
    segment_raster(scene, tmp_path, watched, window=64, progress=False)
    assert set(found) == {40 * 2**20} and get_gdal_config("GDAL_CACHEMAX") == before


def test_picture_of_a_wide_scene(tmp_path, monkeypatch):
    """Read in groups of columns, every column comes from its own place."""
    ramp = np.broadcast_to(np.arange(1, 6001, dtype=np.uint16), (1, 40, 6000))
    with rasterio.open(write(tmp_path / "ramp.tif", ramp)) as scene:
        whole = decimated(scene, None)
        monkeypatch.setattr("vision_mamba.geo.products._COLUMNS", 512)
        groups = decimated(scene, None)
    step = 1 / (1600 * 0.96)  # of a pixel of the picture, between the 2nd and 98th percentile
    assert whole.shape == groups.shape == (11, 1600, 3) and np.abs(whole - groups).max() < 1.5 * step
    assert (np.diff(groups[0, :, 0]) >= 0).all()


def test_reader_agrees_with_plain_reads(tiles, tmp_path, monkeypatch):
    """Windows cut from rows that are read once are those that rasterio reads one by one, nodata and borders alike."""
    bands = mosaic(tiles, 300, 410).astype(np.float32)
    bands[1, 50:150, 30:200] = np.nan
    bands[:, 120:280, 150:400] = -9999
    monkeypatch.setattr("vision_mamba.geo.reader._READERS", 3)
    tiled, model = dict(tiled=True, blockxsize=64, blockysize=32), segmentor(eight_bit=False)
    for height, window, overlap, batch_size, options in (
        (300, 96, 24, 4, {}), (300, 128, 100, 5, tiled), (60, 512, 0, 2, {}), (300, 96, 24, 4, dict(tiled, compress="lzw")),
    ):  # fmt: skip
        path = write(tmp_path / "part.tif", bands[:, :height], nodata=-9999, **options)
        reader, grid = SceneReader(path, model), Grid(height, 410, window, overlap)
        rows, columns = range(len(grid.tops) // 2, len(grid.tops)), range(len(grid.lefts) // 3, len(grid.lefts))
        found = []
        for batch in reader.batches(grid, [(columns, rows)], batch_size):
            x = reader.normalised(batch)
            assert len(x) <= batch_size and x.dtype == torch.float32
            found += [(x[i].numpy(), batch.empty[i]) for i in batch.wanted]
        assert len(found) == len(rows) * len(columns)
        corners = [(grid.tops[r], grid.lefts[c]) for r in rows for c in columns]
        for (x, empty), (top, left) in zip(found, corners, strict=True):
            plain = bands[:, top : min(top + window, height), left : left + window]
            valid = np.isfinite(plain) & (plain != -9999)
            mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
            plain = np.where(valid, (plain - mean) / std, 0)
            short = [(0, 0), (0, window - plain.shape[1]), (0, window - plain.shape[2])]
            assert np.array_equal(x, np.pad(plain, short, mode="edge")) and empty == (not valid.any())


@pytest.mark.parametrize("transform", [NORTH_UP, NORTH_UP * Affine.rotation(30)], ids=["north_up", "rotated"])
def test_output_lies_where_the_scene_lies(tiles, tmp_path, transform):
    bands = mosaic(tiles, 1100, 600)
    bands[:, 600:] = 0
    scene = write(tmp_path / "scene.tif", bands, transform, nodata=0)
    report = segment_raster(scene, tmp_path, segmentor(), window=256, probabilities=True, progress=False)
    with rasterio.open(report.files.classes) as found:
        assert found.crs == UTM and found.transform == transform and found.shape == (1100, 600)
        assert found.nodata == 255 and found.overviews(1) and found.block_shapes == [(512, 512)]
        assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert [found.tags()[f"CLASS_{i}"] for i in range(3)] == list(CLASSES)
        assert len({found.colormap(1)[i] for i in range(3)}) == 3
        numbers = found.read(1)
    assert (numbers[600:] == 255).all() and (numbers[:600] < 3).all()
    probabilities, confidence = read(report.files.probabilities), read(report.files.confidence)[0]
    assert probabilities.shape == (3, 1100, 600)
    assert (probabilities[:, :600].argmax(0) == numbers[:600]).mean() > 0.98  # 1/254 steps tie now and then
    assert (probabilities[:, :600].max(0) == confidence[:600]).all() and (confidence[600:] == 255).all()
    assert report.files.picture.stat().st_size > 10_000
    rows = list(csv.DictReader(report.files.areas.open()))
    assert [int(row["pixels"]) for row in rows] == [(numbers == i).sum() for i in range(3)]
    assert [float(row["hectares"]) for row in rows] == pytest.approx(
        [int(row["pixels"]) * 0.01 / 1e4 for row in rows], abs=1e-4
    )
    assert list(report.hectares.values()) == pytest.approx(
        [(numbers == i).sum() * 0.01 / 1e4 for i in range(3)], rel=1e-6
    )
    assert not list(tmp_path.glob(".*"))


def test_areas_in_degrees():
    """The whole earth: 510 065 621.724 km2 on the WGS 84 ellipsoid; and a degree at 60 degrees north."""
    crs = rasterio.crs.CRS.from_epsg(4326)
    profile = dict(crs=crs, transform=from_origin(-180, 90, 0.5, 0.5), width=720, height=360)
    assert pixel_areas(profile).sum() * 720 / 1e6 == pytest.approx(510_065_621.724, rel=1e-9)
    one = pixel_areas(dict(crs=crs, transform=from_origin(0, 61, 1, 1), width=1, height=1))[0]
    # 111.4 km of latitude by 54.9 of longitude (at 60.5 degrees)
    assert one / 1e6 == pytest.approx(111.42 * 54.97, rel=2e-3)
    feet = rasterio.crs.CRS.from_epsg(2263)
    assert pixel_areas(dict(crs=feet, transform=NORTH_UP, width=1, height=1))[0] == pytest.approx(
        0.01 * 0.3048006096**2
    )
    assert pixel_areas(dict(crs=None, transform=NORTH_UP, width=1, height=1)) is None


def test_outlines_agree_with_the_pixels(tiles, tmp_path):
    pyogrio = pytest.importorskip("pyogrio", reason="needs the extra geo (pyogrio)")
    shapely = pytest.importorskip("shapely", reason="needs the extra geo (shapely)")
    scene = write(tmp_path / "scene.tif", mosaic(tiles, 240, 300))

    def outlines(**options):
        report = segment_raster(
            scene, tmp_path / "out", segmentor(), window=128, overwrite=True, progress=False, **options
        )
        meta, _, shapes, (numbers, names, sizes) = pyogrio.raw.read(report.files.polygons)
        return meta, shapely.from_wkb(shapes), numbers, names, sizes, report

    meta, shapes, numbers, names, sizes, report = outlines(polygons="gpkg", simplify=0)
    assert rasterio.crs.CRS.from_string(meta["crs"]) == UTM
    for i, name in enumerate(CLASSES):
        assert shapely.area(shapes[numbers == i]).sum() == pytest.approx(report.hectares[name] * 1e4, rel=1e-6)
        assert sizes[numbers == i].sum() == pytest.approx(report.hectares[name] * 1e4, rel=1e-6)
    assert set(names) <= set(CLASSES)
    _, simple, _, _, sizes_kept, _ = outlines(polygons="gpkg", simplify=1, min_area=0.5)
    assert 0 < len(simple) < len(shapes) and sizes_kept.min() >= 0.5
    assert shapely.get_num_coordinates(simple).sum() < shapely.get_num_coordinates(shapes[sizes >= 0.5]).sum() / 2
    meta, shapes, *_ = outlines(polygons="geojson", simplify=0)
    assert rasterio.crs.CRS.from_string(meta["crs"]).to_epsg() == 4326
    assert -82.2 < shapes[0].centroid.x < -81.8 and 29.6 < shapes[0].centroid.y < 29.8  # Ordway-Swisher, Florida


def test_views_and_scales(tiles, tmp_path):
    """A network that looks at one pixel sees the same in every view; scales change little."""
    scene = write(tmp_path / "scene.tif", mosaic(tiles, 200, 260))
    torch.manual_seed(0)
    plain = Segmentor(model=nn.Conv2d(3, 3, 1).eval(), classes=CLASSES, mean=MEAN, std=STD)
    maps = {}
    for name, options in dict(
        none={}, flips=dict(tta="flips"), turns=dict(tta="turns"), scales=dict(scales=(1, 1.5))
    ).items():
        report = segment_raster(scene, tmp_path / name, plain, window=96, progress=False, **options)
        maps[name] = read(report.files.classes)
    assert (maps["none"] == maps["flips"]).mean() > 0.999 and (maps["none"] == maps["turns"]).mean() > 0.999
    assert 0.9 < (maps["none"] == maps["scales"]).mean() < 1
    with pytest.raises(ValueError, match="tta='all': allowed are 'none', 'flips', 'turns'"):
        segment_raster(scene, tmp_path / "x", plain, tta="all")


def test_bands_of_sixteen_bits(tiles, tmp_path):
    """The same picture with its values times 40, in bands 4, 2, 5 of a uint16 raster."""
    bands = mosaic(tiles, 150, 200)
    wide = np.zeros((5, 150, 200), np.uint16)
    wide[[3, 1, 4]] = bands.astype(np.uint16) * 40
    scene, plain = write(tmp_path / "wide.tif", wide), write(tmp_path / "plain.tif", bands)
    report = segment_raster(
        scene, tmp_path, segmentor(bands=(4, 2, 5)), window=96, value_range=(0, 255 * 40), progress=False
    )
    expected = segment_raster(plain, tmp_path, segmentor(), window=96, progress=False)
    assert (read(report.files.classes) == read(expected.files.classes)).mean() > 0.999


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt2"
    torch.export.save(torch.export.export(network(), (torch.zeros(2, 3, 96, 96),)), path)
    return path


def command(exported, scene, out, *more):
    numbers = [*("--mean", *map(str, MEAN)), *("--std", *map(str, STD))]
    return [
        sys.executable, str(TOOL), str(exported), "-", str(scene), "--out", str(out), "--window", "96", "--overlap", "32",
        "--batch-size", "2", "--device", "cpu", "--classes", *CLASSES, *numbers, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_with_the_same_map(tiles, exported, tmp_path):
    scene = write(tmp_path / "scene.tif", mosaic(tiles, 2100, 224))  # rows of four windows: two full batches
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = tmp_path / "whole"
    done = subprocess.run(command(exported, scene, whole), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout and " ha" in done.stdout
    out = tmp_path / "killed"
    process = subprocess.Popen(command(exported, scene, out), env=environment, stderr=subprocess.DEVNULL)
    strip = out / ".scene.partial" / "000-000001.npy"
    while not strip.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(out.glob("*.tif"))
    same = dict(window=96, overlap=32, batch_size=2, progress=False)
    with pytest.raises(UserError, match="interrupted run; --resume goes on"):
        segment_raster(scene, out, segmentor(), **same)
    with pytest.raises(UserError, match="begun with another tta"):
        segment_raster(scene, out, segmentor(), **same, tta="flips", resume=True)
    again = subprocess.run(command(exported, scene, out, "--resume"), env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    for name in ("scene_classes.tif", "scene_confidence.tif"):
        assert np.array_equal(read(out / name), read(whole / name))
    assert not (out / ".scene.partial").exists()


@pytest.mark.slow
def test_two_processes_share_a_scene(tiles, exported, tmp_path):
    scene = write(tmp_path / "scene.tif", mosaic(tiles, 1300, 224))
    alone = segment_raster(scene, tmp_path / "alone", segmentor(), window=96, overlap=32, batch_size=2, progress=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launch + command(exported, scene, tmp_path / "both")[1:], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(read(tmp_path / "both" / "scene_classes.tif"), read(alone.files.classes))


def test_without_coordinates(tiles, tmp_path):
    from PIL import Image

    Image.fromarray(mosaic(tiles, 100, 130).transpose(1, 2, 0)).save(tmp_path / "photo.png")
    report = segment_raster(tmp_path / "photo.png", tmp_path, segmentor(), window=256, progress=False)
    assert report.hectares is None and sum(report.pixels.values()) == 13_000
    with pytest.raises(UserError, match="no coordinate system; write a GeoPackage"):
        segment_raster(
            tmp_path / "photo.png", tmp_path / "b", segmentor(), window=256, polygons="geojson", progress=False
        )


def test_bad_scenes_are_named(tiles, tmp_path):
    bands = mosaic(tiles, 100, 130)
    scene = write(tmp_path / "scene.tif", bands)
    four = write(tmp_path / "four.tif", np.concatenate([bands, bands[:1]]))
    with pytest.raises(UserError, match=r"four\.tif has 4 bands, the model reads 3; choose them, e\.g\. --bands 1 2 3"):
        segment_raster(four, tmp_path, segmentor())
    with pytest.raises(UserError, match=r"scene\.tif has 3 bands, numbered from 1; band 7"):
        segment_raster(scene, tmp_path, segmentor(bands=(1, 2, 7)))
    with pytest.raises(UserError, match=r"holds uint16.*--value-range"):
        segment_raster(write(tmp_path / "u16.tif", bands.astype(np.uint16)), tmp_path, segmentor())
    with pytest.raises(UserError, match="the first must be below the second"):
        segment_raster(scene, tmp_path, segmentor(), value_range=(5, 5))
    empty = write(tmp_path / "empty.tif", np.zeros_like(bands), nodata=0)
    with pytest.raises(UserError, match=r"empty\.tif holds nothing but nodata"):
        segment_raster(empty, tmp_path, segmentor(), window=64, progress=False)
    torn = tmp_path / "torn.tif"
    torn.write_bytes(write(tmp_path / "long.tif", mosaic(tiles, 600, 600)).read_bytes()[:200_000])
    with pytest.raises(UserError, match="cannot read"):
        segment_raster(torn, tmp_path, segmentor(), window=64, progress=False)
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(UserError, match=r"cannot read .*text\.tif"):
        segment_raster(tmp_path / "text.tif", tmp_path, segmentor())
    with pytest.raises(UserError, match="2 scores a pixel for 3 classes"):
        segment_raster(
            scene,
            tmp_path,
            Segmentor(model=network(3, 2), classes=CLASSES, mean=MEAN, std=STD),
            window=64,
            progress=False,
        )
    assert not list(tmp_path.glob("*_classes.tif"))
    segment_raster(scene, tmp_path / "out", segmentor(), window=64, progress=False)
    with pytest.raises(UserError, match=r"scene_classes\.tif exists; --overwrite replaces it"):
        segment_raster(scene, tmp_path / "out", segmentor(), window=64)
    with pytest.raises(ValueError, match="3 means, 2 standard deviations"):
        Segmentor(model=network(), classes=CLASSES, mean=MEAN, std=STD[:2])


def test_bands_of_different_types_are_refused_unless_one_is_chosen(tiles, tmp_path):
    """A VRT may have them; the type of its first band is not that of the others."""
    bands = mosaic(tiles, 100, 130)
    heights = bands[:1].astype(np.float32) * 10 + 0.5
    files = write(tmp_path / "a.tif", bands[:1]), write(tmp_path / "b.tif", heights)
    vrt = tmp_path / "mixed.vrt"
    source = (
        "<SimpleSource><SourceFilename>{}</SourceFilename><SourceBand>1</SourceBand>"
        '<SrcRect xOff="0" yOff="0" xSize="130" ySize="100"/><DstRect xOff="0" yOff="0" xSize="130" ySize="100"/>'
        "</SimpleSource>"
    )
    kinds = zip((1, 2), ("Byte", "Float32"), files, strict=True)
    lines = [f'<VRTRasterBand dataType="{k}" band="{n}">{source.format(f)}</VRTRasterBand>' for n, k, f in kinds]
    vrt.write_text(f'<VRTDataset rasterXSize="130" rasterYSize="100">{"".join(lines)}</VRTDataset>')
    with pytest.raises(UserError, match=r"bands of different types \(float32, uint8\)"):
        SceneReader(vrt, Segmentor(model=network(2), classes=CLASSES, mean=MEAN[:2], std=STD[:2]), None)
    one = Segmentor(model=network(1), classes=CLASSES, mean=MEAN[:1], std=STD[:1], bands=(2,), eight_bit=False)
    reader = SceneReader(vrt, one, None)
    grid = Grid(100, 130, 130, 0)
    (batch,) = reader.batches(grid, [(range(1), range(1))], 1)
    found = reader.normalised(batch).cpu()[0, 0, :100] * STD[0] + MEAN[0]
    torch.testing.assert_close(found, torch.from_numpy(heights[0]), rtol=1e-5, atol=1e-2)


def test_a_run_that_ended_while_results_were_written_is_resumed(tiles, tmp_path, monkeypatch):
    scene = write(tmp_path / "scene.tif", mosaic(tiles, 100, 130))
    whole = segment_raster(scene, tmp_path / "whole", segmentor(), window=64, progress=False)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vision_mamba.geo.products.quick_look", stop)
        with pytest.raises(KeyboardInterrupt):
            segment_raster(scene, tmp_path / "out", segmentor(), window=64, progress=False)
    assert (tmp_path / "out" / "scene_classes.tif").exists()
    with pytest.raises(UserError, match=r"scene_classes\.tif exists"):
        segment_raster(scene, tmp_path / "out", segmentor(), window=64, progress=False)
    resumed = segment_raster(scene, tmp_path / "out", segmentor(), window=64, resume=True, progress=False)
    assert resumed.hectares == whole.hectares
    assert np.array_equal(read(tmp_path / "out" / "scene_classes.tif"), read(tmp_path / "whole" / "scene_classes.tif"))
    assert not list((tmp_path / "out").glob(".*partial*"))


def test_full_disk_is_named(tiles, tmp_path, monkeypatch):
    scene = write(tmp_path / "scene.tif", mosaic(tiles, 100, 130))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vision_mamba.geo.parts.np.save", full)
    with pytest.raises(UserError, match="cannot write to .*No space left on device"):
        segment_raster(scene, tmp_path / "out", segmentor(), window=64, progress=False)
    assert not list((tmp_path / "out").glob("scene*"))


def test_tool_says_what_is_wrong(exported, tmp_path):
    done = subprocess.run(command(exported, tmp_path / "none.tif", tmp_path), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: no raster {tmp_path / 'none.tif'}\n"
