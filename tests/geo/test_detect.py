"""Objects of a whole raster: each once, wherever the windows lie, and where it is on the map."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

rasterio = pytest.importorskip("rasterio", reason="needs the extra geo (rasterio)")
pyogrio = pytest.importorskip("pyogrio", reason="needs the extra geo (pyogrio)")
shapely = pytest.importorskip("shapely", reason="needs the extra geo (shapely)")

from rasterio.transform import from_origin  # noqa: E402

from vision_mamba.errors import UserError  # noqa: E402
from vision_mamba.geo import Detector, detect_raster  # noqa: E402

UTM = rasterio.crs.CRS.from_epsg(32635)


def bright_squares(x):
    """The boxes of connected bright pixels; those cut by the window's border come out cut, as with any detector."""
    from scipy import ndimage

    found = []
    for image in x:
        labelled, count = ndimage.label(image[0].numpy() > 0)
        boxes = [(c.start, r.start, c.stop, r.stop) for r, c in ndimage.find_objects(labelled)]
        kinds = [int(image[1][labelled == i + 1].mean() > 0) for i in range(count)]
        scores = torch.linspace(0.9, 0.6, count)
        found.append((torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), scores, torch.tensor(kinds)))
    return found


def detector(**options):
    return Detector(model=bright_squares, classes=("car", "bus"), mean=(128, 128, 128), std=(1, 1, 1), **options)


@pytest.fixture
def scene(tmp_path):
    """Squares of 10 and 16 pixels all over a scene of 500 x 620, none touching another."""
    bands = np.zeros((3, 500, 620), np.uint8)
    random = np.random.RandomState(0)
    boxes, kinds = [], []
    for row in range(20):
        for column in range(24):
            y, x = row * 25 + random.randint(8), column * 25 + random.randint(8)
            kind = random.randint(2)
            side = 10 + 6 * kind
            bands[0, y : y + side, x : x + side] = 255
            bands[1, y : y + side, x : x + side] = 255 * kind
            boxes.append((x, y, x + side, y + side))
            kinds.append(kind)
    path = tmp_path / "scene.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=500, width=620, dtype="uint8", crs=UTM,
        transform=from_origin(500000, 5970000, 0.5, 0.5),
    ) as file:  # fmt: skip
        file.write(bands)
    return path, np.array(boxes), np.array(kinds)


@pytest.mark.parametrize("window, overlap", [(128, 32), (200, 50), (700, 100), (97, 40)])
def test_every_object_once(scene, tmp_path, window, overlap):
    path, boxes, kinds = scene
    found = detect_raster(path, tmp_path / "out", detector(), window=window, overlap=overlap, progress=False)
    order = np.lexsort((found.boxes[:, 0], found.boxes[:, 1]))
    expected = np.lexsort((boxes[:, 0], boxes[:, 1]))
    assert np.array_equal(found.boxes.numpy()[order], boxes[expected])
    assert np.array_equal(found.labels.numpy()[order], kinds[expected])


def test_results_on_the_map_and_in_pixels(scene, tmp_path):
    path, boxes, kinds = scene
    found = detect_raster(path, tmp_path / "out", detector(), window=256, progress=False)
    meta, _, shapes, (numbers, names, scores) = pyogrio.raw.read(found.files[0])
    assert rasterio.crs.CRS.from_string(meta["crs"]) == UTM
    shapes = shapely.from_wkb(shapes)
    assert len(shapes) == len(boxes) and set(names) == {"car", "bus"} and (numbers == (names == "bus")).all()
    areas = {shape: (5.0**2, 8.0**2)[number] for shape, number in zip(shapes, numbers, strict=True)}
    assert all(shape.area == pytest.approx(area) for shape, area in areas.items())
    left, top = boxes[:, 0].min(), boxes[:, 1].min()
    assert min(s.bounds[0] for s in shapes) == 500000 + left * 0.5
    assert max(s.bounds[3] for s in shapes) == 5970000 - top * 0.5
    results = json.loads(found.files[1].read_text())
    assert len(results) == len(boxes) and {r["category_id"] for r in results} == {1, 2}
    assert sorted(r["bbox"][2] for r in results) == sorted((boxes[:, 2] - boxes[:, 0]).tolist())
    assert found.files[2].stat().st_size > 1000
    assert scores.max() <= 0.9
    with pytest.raises(UserError, match=r"scene_objects\.gpkg exists; --overwrite replaces it"):
        detect_raster(path, tmp_path / "out", detector(), window=256)


def test_nothing_found(scene, tmp_path):
    path, *_ = scene
    found = detect_raster(path, tmp_path / "out", detector(), window=256, score=0.95, progress=False)
    assert len(found.boxes) == 0 and json.loads(found.files[1].read_text()) == []
    assert len(pyogrio.raw.read(found.files[0])[2]) == 0


#: A process that looks for the squares, slowly enough to be killed in between.
PROCESS = """
import sys, time
from tests.geo.test_detect import bright_squares, detector
from vision_mamba.engine.distributed import start_processes, stop_processes
from vision_mamba.geo import detect_raster

def slowly(x):
    time.sleep(float(sys.argv[3]))
    return bright_squares(x)

_, rank, world_size = start_processes("cpu")
slow = detector()
slow.model = slowly
found = detect_raster(sys.argv[1], sys.argv[2], slow, window=97, overlap=40, batch_size=3, progress=False,
    resume=True, rank=rank, world_size=world_size)
sys.stdout.write(f"saw {found.windows}\\n")  # in one piece: two processes share the pipe
stop_processes()
"""


def start(launcher, path, out, seconds, **options):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    call = [*launcher, sys.executable, "-c", PROCESS, str(path), str(out), str(seconds)]
    return subprocess.Popen(call, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, **options)


def written(folder):
    """COCO results, and what a reader sees of the GeoPackage (the file holds its time of writing)."""
    text = (folder / "scene_objects.json").read_text()
    _, _, shapes, columns = pyogrio.raw.read(folder / "scene_objects.gpkg")
    return text, [bytes(shape) for shape in shapes], [list(column) for column in columns]


@pytest.mark.slow
def test_killed_run_goes_on_and_finds_the_same(scene, tmp_path):
    path, *_ = scene
    whole = detect_raster(path, tmp_path / "whole", detector(), window=97, overlap=40, batch_size=3, progress=False)
    out = tmp_path / "killed"
    process = start([], path, out, 0.2)
    part = out / ".scene_objects.partial" / "000-000002.npy"
    while not part.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(out.glob("scene*"))
    same = dict(window=97, overlap=40, batch_size=3, progress=False)
    with pytest.raises(UserError, match="interrupted run; --resume goes on"):
        detect_raster(path, out, detector(), **same)
    with pytest.raises(UserError, match="begun with another score;"):
        detect_raster(path, out, detector(), **same, score=0.5, resume=True)
    again = detect_raster(path, out, detector(), **same, resume=True)
    assert 0 < again.windows < whole.windows
    assert written(out) == written(tmp_path / "whole")
    assert not (out / ".scene_objects.partial").exists()


@pytest.mark.slow
def test_two_processes_share_a_scene(scene, tmp_path):
    """Objects on the border between their rows too are found once."""
    path, boxes, _ = scene
    whole = detect_raster(path, tmp_path / "whole", detector(), window=97, overlap=40, batch_size=3, progress=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29618"]
    process = start([*launch, "--no-python"], path, tmp_path / "both", 0)
    text, _ = process.communicate()
    assert process.returncode == 0
    seen = [int(number) for number in re.findall(r"saw (\d+)\n", text)]
    # Each saw its rows alone, and at most two windows before them that complete a batch.
    assert len(seen) == 2 and max(seen) < 0.6 * whole.windows
    assert written(tmp_path / "both") == written(tmp_path / "whole") and len(whole.boxes) == len(boxes)


def test_groups_of_columns(scene, tmp_path, monkeypatch):
    path, boxes, kinds = scene
    monkeypatch.setattr("vision_mamba.geo.windows._PANEL", 160)
    found = detect_raster(path, tmp_path / "out", detector(), window=128, overlap=32, batch_size=3, progress=False)
    order, expected = (np.lexsort((b[:, 0], b[:, 1])) for b in (found.boxes, boxes))
    assert np.array_equal(found.boxes.numpy()[order], boxes[expected])
    assert np.array_equal(found.labels.numpy()[order], kinds[expected])


def test_full_disk_is_named(scene, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vision_mamba.geo.parts.np.save", full)
    with pytest.raises(UserError, match="cannot write to .*No space left on device"):
        detect_raster(scene[0], tmp_path / "out", detector(), window=128, progress=False)
    assert not list((tmp_path / "out").glob("scene*"))
