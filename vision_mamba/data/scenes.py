"""Remote-sensing scene sets as their authors distribute them: what they hold, checks, and reproducible split lists."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vision_mamba.data.images import decode_image, is_image_name
from vision_mamba.data.rasters import decode_raster, read_profile
from vision_mamba.data.sources import SPLIT_CLASSES, SPLIT_FOLDER
from vision_mamba.errors import UserError, nearest

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class SceneSet:
    """One data set.

    Attributes:
        title: its name, with the number of classes and images and their format.
        origin: where the authors give it out.
        layout: what the archive or folder looks like; folders above the class folders do not matter.
        licence: on what terms.
        classes: images of each class folder, under the authors' names.
        split: part of each class in each split, and where the ratio comes from.
        split_source: see ``split``.
        bands, dtype: of a raster file; None for 8-bit pictures.
        library: ``module:Class`` that downloads the set, or "".
        md5: of the archive that the library downloads, by file name.
    """

    title: str
    origin: str
    layout: str
    licence: str
    classes: Mapping[str, int]
    split: Mapping[str, float]
    split_source: str
    bands: int | None = None
    dtype: str | None = None
    library: str = ""
    md5: Mapping[str, str] = field(default_factory=dict)


def _each(count: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), count)


_EUROSAT = {
    "AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500,
    "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000,
}  # fmt: skip
_EUROSAT_LICENCE = "MIT (the data set); Copernicus Sentinel-2 data, free and open"
_EUROSAT_SPLIT = "80/20, as Helber et al. 2019 train"
_RSMAMBA = "as the RSMamba paper (Chen et al. 2024)"

SCENE_SETS: dict[str, SceneSet] = {
    "ucmerced": SceneSet(
        "UC Merced Land Use: 21 classes x 100 images, tif, 256x256 RGB (a few some pixels smaller)",
        "http://weegee.vision.ucmerced.edu/datasets/landuse.html, UCMerced_LandUse.zip",
        "UCMerced_LandUse/Images/<class>/<class>00.tif",
        "public domain imagery (USGS National Map); cite Yang and Newsam 2010",
        _each(
            100,
            "agricultural airplane baseballdiamond beach buildings chaparral denseresidential forest freeway "
            "golfcourse harbor intersection mediumresidential mobilehomepark overpass parkinglot river runway "
            "sparseresidential storagetanks tenniscourt",
        ),
        {"train": 0.7, "val": 0.3},
        f"70/30, {_RSMAMBA}",
        library="torchgeo.datasets:UCMerced",
        md5={"UCMerced_LandUse.zip": "5b7ec56793786b6dc8a908e8854ac0e4"},
    ),
    "aid": SceneSet(
        "AID: 30 classes, 10,000 images (220 to 420 a class), jpg, 600x600",
        "https://captain-whu.github.io/AID/, AID.zip (or its parts)",
        "AID/<Class>/<class>_1.jpg",
        "research use (imagery of Google Earth); cite Xia et al. 2017",
        {
            "Airport": 360,
            "BareLand": 310,
            "BaseballField": 220,
            "Beach": 400,
            "Bridge": 360,
            "Center": 260,
            "Church": 240,
            "Commercial": 350,
            "DenseResidential": 410,
            "Desert": 300,
            "Farmland": 370,
            "Forest": 250,
            "Industrial": 390,
            "Meadow": 280,
            "MediumResidential": 290,
            "Mountain": 340,
            "Park": 350,
            "Parking": 390,
            "Playground": 370,
            "Pond": 420,
            "Port": 380,
            "RailwayStation": 260,
            "Resort": 290,
            "River": 410,
            "School": 300,
            "SparseResidential": 300,
            "Square": 330,
            "Stadium": 290,
            "StorageTanks": 360,
            "Viaduct": 420,
        },  # fmt: skip
        {"train": 0.5, "val": 0.5},
        f"50/50, {_RSMAMBA}",
    ),
    "resisc45": SceneSet(
        "NWPU-RESISC45: 45 classes x 700 images, jpg, 256x256",
        "https://gcheng-nwpu.github.io/, NWPU-RESISC45.rar (unpack it first)",
        "NWPU-RESISC45/<class>/<class>_001.jpg",
        "research use (imagery of Google Earth); cite Cheng, Han and Lu 2017",
        _each(
            700,
            "airplane airport baseball_diamond basketball_court beach bridge chaparral church circular_farmland cloud "
            "commercial_area dense_residential desert forest freeway golf_course ground_track_field harbor "
            "industrial_area intersection island lake meadow medium_residential mobile_home_park mountain overpass "
            "palace parking_lot railway railway_station rectangular_farmland river roundabout runway sea_ice ship "
            "snowberg sparse_residential stadium storage_tank tennis_court terrace thermal_power_station wetland",
        ),
        {"train": 0.7, "val": 0.3},
        f"70/30, {_RSMAMBA}",
        library="torchgeo.datasets:RESISC45",
        md5={"NWPU-RESISC45.zip": "75206b2e16446591afa88e2628744886"},
    ),
    "eurosat": SceneSet(
        "EuroSAT, RGB: 10 classes, 27,000 images (2,000 to 3,000 a class), jpg, 64x64",
        "https://github.com/phelber/EuroSAT, EuroSAT.zip or EuroSAT_RGB.zip",
        "2750/<Class>/<Class>_1.jpg, or EuroSAT_RGB/<Class>/<Class>_1.jpg",
        _EUROSAT_LICENCE,
        _EUROSAT,
        {"train": 0.8, "val": 0.2},
        _EUROSAT_SPLIT,
        library="torchvision.datasets:EuroSAT",
        md5={"EuroSAT.zip": "c8fa014336c82ac7804f0398fcb19387"},
    ),
    "eurosat_ms": SceneSet(
        "EuroSAT, 13 bands of Sentinel-2: 10 classes, 27,000 images, tif, uint16, 64x64; bands B01 ... B12, B8A",
        "https://github.com/phelber/EuroSAT, EuroSATallBands.zip or EuroSAT_MS.zip",
        "ds/images/remote_sensing/otherDatasets/sentinel_2/tif/<Class>/<Class>_1.tif, or EuroSAT_MS/<Class>/...",
        _EUROSAT_LICENCE,
        _EUROSAT,
        {"train": 0.8, "val": 0.2},
        _EUROSAT_SPLIT,
        bands=13,
        dtype="uint16",
        library="torchgeo.datasets:EuroSAT",
        md5={"EuroSATallBands.zip": "5ac12b3b2557aa56e1826e981e8e200e"},
    ),
    "whu_rs19": SceneSet(
        "WHU-RS19: 19 classes, 1,005 images (50 to 61 a class), jpg, 600x600",
        "https://captain-whu.github.io/BED4RS/, WHU-RS19.zip",
        "WHU-RS19/<Class>/<class>-01.jpg",
        "research use (imagery of Google Earth); cite Xia et al. 2010",
        {
            "Airport": 55,
            "Beach": 50,
            "Bridge": 52,
            "Commercial": 56,
            "Desert": 50,
            "Farmland": 50,
            "footballField": 50,
            "Forest": 53,
            "Industrial": 53,
            "Meadow": 61,
            "Mountain": 50,
            "Park": 50,
            "Parking": 50,
            "Pond": 54,
            "Port": 53,
            "railwayStation": 50,
            "Residential": 54,
            "River": 56,
            "Viaduct": 58,
        },  # fmt: skip
        {"train": 0.6, "val": 0.4},
        "60/40, the larger of the two usual ratios",
    ),
    "rsscn7": SceneSet(
        "RSSCN7: 7 classes x 400 images, jpg, 400x400",
        "https://github.com/palewithout/RSSCN7, downloaded as a zip",
        "RSSCN7-master/<class>/a001.jpg; the class folders are aGrass, bField and so on",
        "none stated; cite Zou et al. 2015",
        _each(400, "aGrass bField cIndustry dRiverLake eForest fResident gParking"),
        {"train": 0.5, "val": 0.5},
        "50/50, the usual ratio",
    ),
}


@dataclass(frozen=True)
class SourceFile:
    """An image of a source: its path there, its class, and how to read it."""

    path: str
    label: str
    read: Callable[[], bytes]
    on_disk: Path | None = None


@contextmanager
def open_source(spec: SceneSet, source: Path) -> Iterator[tuple[list[SourceFile], list[str]]]:
    """The images of a folder or an archive, and lines on those that belong to no class.

    A class is the deepest folder in an image's path that has the name of one. Files named as macOS's or Windows' own
    are passed over.

    Raises:
        UserError: the source does not exist, or is no folder and no archive that can be read.
    """
    if source.is_dir():
        entries: dict[str, tuple[Callable[[], bytes], Path | None]] = {}
        for folder, subfolders, names in os.walk(source, followlinks=True):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                relative = path.relative_to(source).as_posix()
                entries[relative] = (functools.partial(_read, source, relative, path.read_bytes), path)
        yield _by_class(spec, entries)
        return
    if not source.exists():
        raise UserError(f"{source} does not exist; give the folder or the archive that the authors distribute")
    if not source.name.lower().endswith(_ARCHIVES):
        raise UserError(
            f"{source.name} is not a folder and none of {', '.join(_ARCHIVES)}; unpack it (a .rar with unrar or 7z) "
            "and give the folder"
        )
    with ExitStack() as stack:
        try:
            if source.name.lower().endswith(".zip"):
                zipped = stack.enter_context(zipfile.ZipFile(source))
                members = {m.filename: functools.partial(zipped.read, m) for m in zipped.infolist() if not m.is_dir()}
            else:
                tar = stack.enter_context(tarfile.open(source))
                members = {m.name: functools.partial(_read_member, tar, m) for m in tar.getmembers() if m.isfile()}
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"{source} cannot be read as an archive: {error}; download it again") from None
        yield _by_class(
            spec, {path: (functools.partial(_read, source, path, read), None) for path, read in members.items()}
        )


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # of a regular file there always is one
    return file.read()


def _read(source: Path, path: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except Exception as error:  # zipfile, tarfile and zlib have their own types; an encrypted zip is a RuntimeError
        raise UserError(f"cannot read image {path} of {source}: {error}; download it again") from None


def _by_class(
    spec: SceneSet, entries: Mapping[str, tuple[Callable[[], bytes], Path | None]]
) -> tuple[list[SourceFile], list[str]]:
    files: list[SourceFile] = []
    strangers: Counter[str] = Counter()
    for path, (read, on_disk) in entries.items():
        *folders, base = path.removeprefix("./").split("/")
        if not is_image_name(base) or "__MACOSX" in folders:
            continue
        label = next((f for f in reversed(folders) if f in spec.classes), None)
        if label is None:
            strangers[folders[-1] if folders else ""] += 1
        else:
            files.append(SourceFile(path, label, read, on_disk))
    found = {f.label for f in files}
    lines = []
    for folder, count in sorted(strangers.items()):
        hint = nearest(folder, [c for c in spec.classes if c not in found])
        what = (
            f"folder {folder!r} ({count} images) is no class of this set" if folder else f"{count} images lie outside"
        )
        lines.append(what + hint)
    return files, lines


def count_problems(spec: SceneSet, files: Sequence[SourceFile], *, partial: bool) -> list[str]:
    """Lines on classes that are missing, on wrong counts, and on names that occur twice in a class.

    Args:
        spec: what the set should hold.
        files: the images found.
        partial: a part of the set is expected: fewer images and classes are right, more are not.
    """
    counts = Counter(f.label for f in files)
    lines = []
    missing = [name for name in spec.classes if not counts[name]]
    if missing and not partial:
        lines.append(f"{len(missing)} of {len(spec.classes)} classes are missing: {_some(missing)}")
    wrong = [
        f"{name} {counts[name]} (not {expected})"
        for name, expected in spec.classes.items()
        if counts[name] and (counts[name] > expected or (counts[name] < expected and not partial))
    ]
    if wrong:
        lines.append(f"{len(wrong)} classes have another number of images: {_some(wrong)}")
    names = Counter((f.label, _base(f.path)) for f in files)
    twice = [f"{label}/{base}" for (label, base), count in names.items() if count > 1]
    if twice:
        lines.append(f"{len(twice)} names occur twice in their class: {_some(twice)}")
    return lines


def check_image(spec: SceneSet, file: SourceFile, data: bytes) -> None:
    """Raises UserError unless an image decodes, and a raster has the set's bands and type."""
    if spec.bands is None:
        decode_image(data, file.path)
        return
    profile = read_profile(data, file.path)
    if (profile.count, profile.dtype) != (spec.bands, spec.dtype):
        raise UserError(f"{file.path} has {profile.count} {profile.dtype} bands, not {spec.bands} {spec.dtype}")
    decode_raster(data, file.path, profile)


def parse_ratios(text: str) -> dict[str, float]:
    """``train=0.5,val=0.5`` -> ratios; UserError where it is not of that form or exceeds 1."""
    ratios: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(train|val|test)=(0?\.\d+|1|1\.0+)\s*", part)
        if not match or match[1] in ratios:
            raise UserError(f"cannot read the split {text!r}; write as in train=0.7,val=0.2,test=0.1, or folders")
        ratios[match[1]] = float(match[2])
    if "train" not in ratios or sum(ratios.values()) > 1 + 1e-9:
        raise UserError(f"split {text!r} must name train, and its parts sum to 1 at most")
    return ratios


def split_by_hash(files: Sequence[SourceFile], ratios: Mapping[str, float]) -> dict[str, list[SourceFile]]:
    """Each class's images, ordered by the SHA-1 of ``<class>/<file name>``, cut by the ratios; the same everywhere.

    Raises:
        UserError: a class would have no image in one of the splits.
    """
    splits: dict[str, list[SourceFile]] = {name: [] for name in ratios}
    for label in sorted({f.label for f in files}):
        members = [f for f in files if f.label == label]
        members.sort(key=lambda f: hashlib.sha1(f"{f.label}/{_base(f.path)}".encode()).digest())
        done, total = 0, 0.0
        for name, ratio in ratios.items():
            total += ratio
            end = round(total * len(members))
            if end == done:
                raise UserError(f"class {label} has {len(members)} images, too few for a split {name}={ratio:g}")
            splits[name] += members[done:end]
            done = end
    return splits


def split_by_folders(files: Sequence[SourceFile]) -> dict[str, list[SourceFile]]:
    """Splits as the source has them, by the folder train, val or test in each image's path.

    Raises:
        UserError: an image lies in no such folder, or there is no train.
    """
    splits: dict[str, list[SourceFile]] = {}
    for file in files:
        own = next((_SPLIT_NAMES[part] for part in file.path.split("/") if part in _SPLIT_NAMES), None)
        if own is None:
            raise UserError(f"{file.path} lies in no folder train, val or test; split by ratio (--split train=0.5,...)")
        splits.setdefault(own, []).append(file)
    if "train" not in splits:
        raise UserError(f"the source has no folder train, only {', '.join(splits)}")
    return splits


def split_by_lists(
    files: Sequence[SourceFile], lists: Mapping[str, Path], *, partial: bool
) -> dict[str, list[SourceFile]]:
    """Splits as given by lists of the authors or of others.

    A line begins with an image's path or file name, with or without class folder; a class or an index after it is
    passed over, and so is the extension, as the 13-band EuroSAT is split by lists of its jpg names.

    Args:
        files: the images.
        lists: a text file for each split.
        partial: names of images that are not there are left out, not an error.

    Raises:
        UserError: a list cannot be read, names an image that is not there, or one that another list names too.
    """
    known: dict[str, list[SourceFile]] = {}
    for file in files:
        stem = _stem(file.path)
        known.setdefault(stem, []).append(file)
        known.setdefault(f"{file.label}/{stem}", []).append(file)
    splits: dict[str, list[SourceFile]] = {}
    taken: dict[str, str] = {}
    for split, path in lists.items():
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read split list {path}: {error}") from None
        chosen: list[SourceFile] = []
        missing = []
        for line in lines:
            name = line.split("\t")[0].split(",")[0].strip().replace("\\", "/")
            name = name if is_image_name(name) else name.rpartition(" ")[0]
            parts = name.split("/")
            keys = [f"{parts[-2]}/{_stem(name)}"] if len(parts) > 1 else [_stem(name)]
            found = known.get(keys[0], [])
            if len(found) > 1:
                raise UserError(f"{name} of {path} may be {found[0].path} or {found[1].path}; name the class folder")
            if not found:
                missing.append(line)
                continue
            if found[0].path in taken:
                raise UserError(f"{name} is in {path} and in {taken[found[0].path]}")
            taken[found[0].path] = str(path)
            chosen.append(found[0])
        if missing and (not partial or not chosen):
            raise UserError(
                f"split list {path} names {len(missing)} of {len(lines)} images that are not there, first "
                f"{missing[0]!r}{_nearest_file(missing[0], files)}"
            )
        splits[split] = chosen
    return splits


def classes_of(splits: Mapping[str, Sequence[SourceFile]]) -> list[str]:
    """The classes of the training split, sorted.

    Raises:
        UserError: a split is empty, or has a class that training has no image of.
    """
    known = sorted({f.label for f in splits["train"]})
    for split, files in splits.items():
        strange = sorted({f.label for f in files} - set(known))
        if not files or strange:
            what = f"has images of class {strange[0]}, of which train has none" if strange else "is empty"
            raise UserError(f"the split {split} {what}; give other lists or another --split")
    return known


def _nearest_file(line: str, files: Sequence[SourceFile]) -> str:
    labels = {f.label for f in files}
    folder = line.replace("\\", "/").rpartition("/")[0].rpartition("/")[2]
    if folder and folder not in labels:
        return f": there is no class {folder!r}{nearest(folder, labels)}"
    return nearest(_base(line), (_base(f.path) for f in files if folder in ("", f.label)))


def write_split_lists(folder: Path, splits: Mapping[str, Sequence[SourceFile]], classes: Sequence[str]) -> None:
    """Writes ``splits/<split>.txt`` and ``splits/classes.txt`` below ``folder``, for ``open_dataset``."""
    lists = folder / SPLIT_FOLDER
    lists.mkdir(parents=True, exist_ok=True)
    (lists / SPLIT_CLASSES).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    for split, files in splits.items():
        rows = sorted(f"{image_path(f)}\t{f.label}\n" for f in files)
        (lists / f"{split}.txt").write_text("".join(rows), encoding="utf-8")


def image_path(file: SourceFile) -> str:
    """Where an image lies in a prepared set."""
    return f"images/{file.label}/{_base(file.path)}"


def place(file: SourceFile, data: bytes, folder: Path) -> None:
    """Puts an image into a prepared set: a hard link where it is a file and the file system allows, else a copy."""
    target = folder / image_path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.on_disk is not None:
        try:
            os.link(file.on_disk, target)
        except OSError:
            shutil.copyfile(file.on_disk, target)
    else:
        target.write_bytes(data)


def _base(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _stem(path: str) -> str:
    return _base(path).rpartition(".")[0]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
