"""tools/prepare_data.py and the split lists that it writes: archives, checks, reproducible splits, bad input."""

import hashlib
import importlib.util
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_mamba.data import open_dataset, scenes
from vision_mamba.errors import UserError, run_main

TOOL = Path(__file__).parents[1] / "tools" / "prepare_data.py"
COUNTS = {"Airport": 6, "BareLand": 4, "storageTanks": 5}
TOY = scenes.SceneSet(
    "a toy", "nowhere", "TOY/<Class>/<image>.jpg", "none", COUNTS, {"train": 0.5, "val": 0.5}, "50/50"
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(scenes.SCENE_SETS, "toy", TOY)


@pytest.fixture
def source(tmp_path):
    """TOY/<Class>/<class>_<n>.jpg of real pixels, with what operating systems leave behind."""
    tiles = open_dataset("builtin", "val")
    number = 0
    for name, count in COUNTS.items():
        (tmp_path / "TOY" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "TOY" / name / f"{name.lower()}_{i}.jpg").write_bytes(tiles.read(number))
            number += 31
    (tmp_path / "TOY" / "Airport" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "TOY" / "Airport" / "._airport_0.jpg").write_bytes(b"x")
    (tmp_path / "TOY" / "readme.txt").write_text("x")
    return tmp_path / "TOY"


def prepare(*arguments, capsys):
    """Exit code, stdout and stderr of the tool."""
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: module.main([str(a) for a in arguments]))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pack(source, path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(source.rglob("*")):
                archive.write(file, f"some/where/{file.relative_to(source.parent)}")
            archive.writestr("__MACOSX/TOY/Airport/a.jpg", b"x")
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            tar.add(source, "TOY")
    return path


# What is written


def test_folder_and_archives_give_the_same_set(source, tmp_path, capsys):
    places = [source, *(pack(source, tmp_path / f"t{end}") for end in (".zip", ".tar", ".tar.gz"))]
    written = []
    for i, place in enumerate(places):
        code, out, err = prepare("toy", place, "--out", tmp_path / str(i), capsys=capsys)
        assert code == 0, err
        assert "15 images, 3 classes, all read" in out
        written.append(contents(tmp_path / str(i)))
    assert all(other == written[0] for other in written[1:])
    assert written[0]["splits/classes.txt"].decode().split() == sorted(COUNTS)
    assert written[0]["images/Airport/airport_3.jpg"] == (source / "Airport" / "airport_3.jpg").read_bytes()
    assert len([name for name in written[0] if name.startswith("images/")]) == 15
    assert os.path.samefile(source / "Airport" / "airport_3.jpg", tmp_path / "0" / "images/Airport/airport_3.jpg")


def test_the_split_is_by_sha1_of_class_and_name(source, tmp_path, capsys):
    code, out, err = prepare(
        "toy", source, "--out", tmp_path / "o", "--split", "train=0.5,val=.25,test=0.25", capsys=capsys
    )
    assert code == 0, err
    expected = {"train": [], "val": [], "test": []}
    for name, count in COUNTS.items():
        paths = [f"{name}/{name.lower()}_{i}.jpg" for i in range(count)]
        paths.sort(key=lambda p: hashlib.sha1(p.encode()).hexdigest())
        first, second = round(0.5 * count), round(0.75 * count)
        for split, part in (("train", paths[:first]), ("val", paths[first:second]), ("test", paths[second:])):
            expected[split] += [f"images/{p}\t{name}" for p in part]
    for split, lines in expected.items():
        assert (tmp_path / "o" / "splits" / f"{split}.txt").read_text().splitlines() == sorted(lines)
        data = open_dataset(str(tmp_path / "o"), split)
        assert data.classes == sorted(COUNTS) and len(data) == len(lines)
        assert all(data.classes[t] in data.filename(i) for i, t in enumerate(data.targets))
        assert f"{split}: {len(lines)} images" in out


def test_the_sources_own_folders(source, tmp_path, capsys):
    for name in COUNTS:
        for split, part in (("training", 2), ("validation", 9)):
            (tmp_path / "again" / split / name).mkdir(parents=True)
            for file in sorted((source / name).glob("[a-z]*.jpg"))[:part]:
                os.rename(file, tmp_path / "again" / split / name / file.name)
    code, _, err = prepare("toy", tmp_path / "again", "--out", tmp_path / "o", "--split", "folders", capsys=capsys)
    assert code == 0, err
    assert len(open_dataset(str(tmp_path / "o"), "train")) == 6 and len(open_dataset(str(tmp_path / "o"), "val")) == 9
    code, _, err = prepare("toy", tmp_path / "o", "--out", tmp_path / "p", "--split", "folders", capsys=capsys)
    assert code == 2 and "no folder train, val or test" in err


def test_lists_of_others(source, tmp_path, capsys):
    # As RSMamba's (class folder and name), torchgeo's (name alone), and with an index or another extension.
    (tmp_path / "train.txt").write_text("Airport/airport_1.jpg\nBareLand\\bareland_2.jpg 1\n\nstoragetanks_1.tif\n")
    (tmp_path / "val.txt").write_text("storagetanks_0.tif\nairport_2.jpg\n")
    lists = ["--split-file", f"train={tmp_path / 'train.txt'}", f"val={tmp_path / 'val.txt'}"]
    code, out, err = prepare("toy", source, "--out", tmp_path / "o", *lists, capsys=capsys)
    assert code == 0, err
    assert "in no split: 10 images" in out
    assert (tmp_path / "o/splits/val.txt").read_text().splitlines() == [
        "images/Airport/airport_2.jpg\tAirport",
        "images/storageTanks/storagetanks_0.jpg\tstorageTanks",
    ]
    (tmp_path / "val.txt").write_text("\n")
    assert "the split val is empty" in prepare("toy", source, "--out", tmp_path / "p", *lists, capsys=capsys)[2]
    (tmp_path / "val.txt").write_text("Airport/airport_1.jpg\n")
    assert "airport_1.jpg is in" in prepare("toy", source, "--out", tmp_path / "p", *lists, capsys=capsys)[2]
    (tmp_path / "val.txt").write_text("Airprt/airport_3.jpg\nAirport/airport_99.jpg\n")
    code, _, err = prepare("toy", source, "--out", tmp_path / "p", *lists, capsys=capsys)
    assert code == 2 and "2 of 2 images" in err and "no class 'Airprt'; did you mean 'Airport'?" in err
    (tmp_path / "val.txt").write_text("Airport/airport_4.jpg\nAirport/airport_99.jpg\n")
    assert prepare("toy", source, "--out", tmp_path / "p", *lists, "--partial", capsys=capsys)[0] == 0
    (tmp_path / "train.txt").write_text("BareLand/bareland_2.jpg\n")
    code, _, err = prepare("toy", source, "--out", tmp_path / "q", *lists, "--partial", capsys=capsys)
    assert code == 2 and "the split val has images of class Airport, of which train has none" in err
    assert {p.name for p in tmp_path.iterdir()} == {"TOY", "o", "p", "train.txt", "val.txt"}


def test_partial_sets(source, tmp_path, capsys):
    (source / "Airport" / "airport_0.jpg").unlink()
    for file in (source / "BareLand").iterdir():
        file.unlink()
    code, _, err = prepare("toy", source, "--out", tmp_path / "o", capsys=capsys)
    assert (
        code == 2
        and "1 of 3 classes are missing: BareLand" in err
        and "Airport 5 (not 6)" in err
        and "--partial" in err
    )
    assert not (tmp_path / "o").exists()
    code, _, err = prepare("toy", source, "--out", tmp_path / "o", "--partial", capsys=capsys)
    assert code == 0, err
    assert open_dataset(str(tmp_path / "o"), "train").classes == ["Airport", "storageTanks"]


# What is found wrong


def test_every_problem_is_named_and_nothing_is_written(source, tmp_path, capsys):
    os.rename(source / "BareLand", source / "BareLnd")
    whole = (source / "Airport" / "airport_1.jpg").read_bytes()
    (source / "Airport" / "airport_1.jpg").write_bytes(whole[:300])
    (source / "Airport" / "airport_2.jpg").write_bytes(b"")
    (source / "storageTanks" / "more.jpg").write_bytes(whole)
    (source / "x" / "Airport").mkdir(parents=True)
    (source / "x" / "Airport" / "airport_5.jpg").write_bytes(whole)
    (source / "lost.jpg").write_bytes(whole)
    before = sorted(tmp_path.rglob("*"))
    for place in (source, pack(source, tmp_path / "t.zip")):
        code, _, err = prepare("toy", place, "--out", tmp_path / "o", "--partial", capsys=capsys)
        assert code == 2
        for words in (
            "folder 'BareLnd' (4 images) is no class of this set; did you mean 'BareLand'?",
            "2 classes have another number of images: Airport 7 (not 6), storageTanks 6 (not 5)",
            "1 names occur twice in their class: Airport/airport_5.jpg",
            "airport_1.jpg",
            "airport_2.jpg",
            "1 images lie outside" if place == source else "folder 'TOY' (1 images) is no class",
        ):
            assert words in err, (words, err)
        assert err.splitlines()[-1].startswith("error: this is not toy")
        assert sorted(p for p in tmp_path.rglob("*") if p.name != "t.zip") == before


def test_long_lists_of_problems_are_cut(source, tmp_path, capsys):
    for file in source.rglob("[a-z]*_*.jpg"):
        file.write_bytes(b"text")
    code, _, err = prepare("toy", source, "--out", tmp_path / "o", capsys=capsys)
    assert code == 2 and err.count("cannot read image") == 10 and "and 5 more like these" in err
    assert "15 of 15 images that cannot be used" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["set.rar"], "unpack it (a .rar with unrar or 7z)"),
        (["torn.zip"], "torn.zip cannot be read as an archive"),
        (["torn.tar"], "torn.tar cannot be read as an archive"),
        (["empty"], "expected TOY/<Class>/<image>.jpg"),
        (["TOY", "--split", "train=0.5,vall=0.5"], "cannot read the split"),
        (["TOY", "--split", "train=0.9,val=0.5"], "sum to 1 at most"),
        (["TOY", "--split", "train=0.9,val=0.1"], "class BareLand has 4 images, too few for a split val=0.1"),
        (["TOY", "--split-file", "trian=x.txt"], "must be train=FILE"),
        (["TOY", "--split-file", "val=x.txt"], "must name a list for train"),
        (["TOY", "--split-file", "train=x.txt"], "cannot read split list x.txt"),
        (["TOY", "--split", "folders", "--split-file", "train=x.txt"], "choose one"),
        (["TOY", "--out", "TOY"], "exists and is not empty"),
        (["TOY", "--download"], "no library downloads this set"),
    ],
)
def test_mistakes_are_one_line(source, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "Arport").mkdir(parents=True)
    (tmp_path / "set.rar").write_bytes(b"Rar!")
    (tmp_path / "torn.tar").write_bytes(b"not a tar")
    (tmp_path / "torn.zip").write_bytes(pack(source, tmp_path / "whole.zip").read_bytes()[:2000])
    code, _, err = prepare("toy", "--out", "o", *arguments, capsys=capsys)
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_damaged_member_of_an_archive(source, tmp_path, capsys):
    data = bytearray(pack(source, tmp_path / "t.zip").read_bytes())
    whole = (source / "BareLand" / "bareland_1.jpg").read_bytes()
    data[data.index(whole) + 40] ^= 255
    (tmp_path / "t.zip").write_bytes(data)
    code, _, err = prepare("toy", tmp_path / "t.zip", "--out", tmp_path / "o", capsys=capsys)
    assert code == 2 and "bareland_1.jpg of" in err and "1 of 15 images" in err and not (tmp_path / "o").exists()


# The catalogue


def test_counts_are_those_of_the_papers():
    expected = {"ucmerced": (21, 2100), "aid": (30, 10000), "resisc45": (45, 31500), "eurosat": (10, 27000),
                "eurosat_ms": (10, 27000), "whu_rs19": (19, 1005), "rsscn7": (7, 2800)}  # fmt: skip
    for name, (classes, images) in expected.items():
        spec = scenes.SCENE_SETS[name]
        assert (len(spec.classes), sum(spec.classes.values())) == (classes, images), name
        assert sum(spec.split.values()) == pytest.approx(1)


def test_help_tells_where_each_set_comes_from(capsys):
    code, out, _ = prepare("--help", capsys=capsys)
    assert code == 0
    for name, spec in scenes.SCENE_SETS.items():
        assert f"\n  {name}\n" in out and spec.origin in out and spec.layout in out and spec.licence in out


def test_thirteen_bands(tmp_path, capsys):
    rasterio = pytest.importorskip("rasterio")
    bands = np.random.default_rng(0).integers(1, 4000, (13, 8, 8)).astype(np.uint16)

    def write(path, values):
        path.parent.mkdir(parents=True, exist_ok=True)
        profile = {"driver": "GTiff", "height": 8, "width": 8, "count": len(values), "dtype": values.dtype.name}
        with rasterio.open(path, "w", **profile, transform=rasterio.Affine(10, 0, 0, 0, -10, 0)) as file:
            file.write(values)

    for label in ("Forest", "River"):
        for i in range(5):
            write(tmp_path / "tif" / label / f"{label}_{i}.tif", bands)
    arguments = ["eurosat_ms", tmp_path / "tif", "--out", tmp_path / "o", "--partial"]
    write(tmp_path / "tif" / "River" / "River_5.tif", bands[:12])
    write(tmp_path / "tif" / "River" / "River_6.tif", bands.astype(np.float32))
    code, _, err = prepare(*arguments, capsys=capsys)
    assert code == 2 and "River_5.tif has 12 uint16 bands, not 13 uint16" in err and "13 float32 bands" in err
    for i in (5, 6):
        (tmp_path / "tif" / "River" / f"River_{i}.tif").unlink()
    assert prepare(*arguments, capsys=capsys)[0] == 0
    data = open_dataset(str(tmp_path / "o"), "train", in_chans=13)
    assert len(data) == 8
    np.testing.assert_array_equal(data[0][0], bands.transpose(1, 2, 0))


def test_download_by_torchvision(tmp_path, capsys, monkeypatch):
    import torchvision

    def download(self):
        for label in ("Forest", "River"):
            (Path(self._data_folder) / label).mkdir(parents=True)
            for i in range(5):
                file = io.BytesIO()
                Image.new("RGB", (8, 8), (i, 0, 0)).save(file, "JPEG")
                (Path(self._data_folder) / label / f"{label}_{i}.jpg").write_bytes(file.getvalue())

    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", download)
    arguments = ["eurosat", tmp_path / "s", "--out", tmp_path / "o", "--partial", "--download"]
    code, out, err = prepare(*arguments, capsys=capsys)
    assert code == 0, err
    assert "10 images, 2 classes" in out


def test_the_archives_checksum_is_told(source, tmp_path, capsys, monkeypatch):
    path = pack(source, tmp_path / "t.zip")
    known = {"t.zip": hashlib.md5(path.read_bytes()).hexdigest()}
    for md5, words in ((known, "t.zip: the file that torchgeo"), ({"t.zip": "0"}, "t.zip: not the file")):
        spec = scenes.SceneSet(*list(vars(TOY).values())[:7], library="torchgeo.datasets:Toy", md5=md5)
        monkeypatch.setitem(scenes.SCENE_SETS, "toy", spec)
        code, out, _ = prepare("toy", path, "--out", tmp_path / words[7:10].strip(), capsys=capsys)
        assert code == 0 and words in out


# Split lists as a source


@pytest.fixture
def prepared(source, tmp_path, capsys):
    assert prepare("toy", source, "--out", tmp_path / "set", capsys=capsys)[0] == 0
    return tmp_path / "set"


def error_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        open_dataset(*map(str, args), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_listed_image_that_is_missing(prepared):
    lines = (prepared / "splits/val.txt").read_text().splitlines()
    first = lines[0].split("\t")[0]
    (prepared / first).unlink()
    assert f"names 1 of {len(lines)} images" in error_of(prepared, "val") and first in error_of(prepared, "val")


def test_a_folder_misspelt_against_the_list(prepared):
    os.rename(prepared / "images/BareLand", prepared / "images/BareLnd")
    message = error_of(prepared, "train")
    assert "no folder 'BareLand'" in message and "did you mean 'BareLnd'" in message


def test_a_class_misspelt_in_the_list(prepared):
    edit(prepared / "splits/val.txt", "\tstorageTanks", "\tstorageTank")
    assert "'storageTank'" in error_of(prepared, "val") and "did you mean 'storageTanks'" in error_of(prepared, "val")


def test_other_faults_of_lists(prepared):
    assert "no split list test.txt (found: train, val)" in error_of(prepared, "test")
    text = (prepared / "splits/train.txt").read_text()
    first = text.splitlines()[0]
    (prepared / "splits/train.txt").write_text(text + first)
    assert "more than once" in error_of(prepared, "train")
    (prepared / "splits/train.txt").write_text("airport.jpg\n")
    assert "line 1" in error_of(prepared, "train") and "has no class" in error_of(prepared, "train")
    (prepared / "splits/train.txt").write_text("\n")
    assert "names no images" in error_of(prepared, "train")
    (prepared / "splits/train.txt").write_text(first)
    assert "'BareLand'" in error_of(prepared, "train") and "has no image" in error_of(prepared, "train")
    (prepared / "splits/train.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot read split list" in error_of(prepared, "train")


def test_lists_elsewhere_and_classes_by_folder(prepared, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.txt").write_text("images/Airport/airport_0.jpg\nimages/BareLand/bareland_1.jpg\n")
    data = open_dataset(str(prepared), "train", split_dir=str(tmp_path / "lists"))
    assert data.classes == ["Airport", "BareLand"] and data.targets == [0, 1]
    assert "go with a folder" in error_of("builtin", "train", split_dir=str(tmp_path / "lists"))
    assert "no split list train.txt" in error_of(prepared, "train", split_dir=str(tmp_path / "none"))


def test_an_image_in_both_splits_is_named(prepared):
    from vision_mamba.engine.build import open_data
    from vision_mamba.engine.config import config_from_dict

    config = config_from_dict({"data": {"source": str(prepared)}})
    train, val = open_data(config)
    assert len(train) + len(val) == 15 and train.classes == val.classes
    with open(prepared / "splits/val.txt", "a") as file:
        file.write((prepared / "splits/train.txt").read_text().splitlines()[0])
    with pytest.raises(UserError, match="1 images are in .*train.txt and in .*val.txt"):
        open_data(config)
