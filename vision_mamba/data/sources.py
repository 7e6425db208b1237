"""Image sets by name: one map-style dataset class over folders, tars, shards and Hugging Face sets.

A source is described once, as a list of named samples with integer targets, plus a function that reads one
sample's bytes. Everything else (decoding, checks, ordering) is shared, so every source gives the same images,
the same class order and the same errors. Map-style access to tars and shards is what makes a resumed run exact.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from vision_mamba.data.images import IMAGE_EXTENSIONS, PICTURE_CHANNELS, decode_image, is_image_name, raster_kind
from vision_mamba.data.memory import PixelMemory
from vision_mamba.data.rasters import RasterProfile, decode_raster, is_tiff_name, read_profile
from vision_mamba.errors import UserError, nearest

_SYNONYMS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "test"),
    "test": ("test", "testing"),
}
_ALL_SPLITS = frozenset(name for names in _SYNONYMS.values() for name in names)
_CLASS_LIST = "classnames.txt"
SPLIT_FOLDER, SPLIT_CLASSES = "splits", "classes.txt"


class Store(Protocol):
    """Where the bytes of samples lie."""

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...


class ImageSet(torch.utils.data.Dataset):
    """Images with integer targets, in a fixed order.

    Attributes:
        classes: class names; a target is an index into them.
        targets: the target of each sample.
        in_chans: channels of the images.
        where: what was opened, for messages.
        profile: what the files have in common where they are rasters; None where they are pictures (8-bit grey,
            colour or four bands).
        memory: the decoded images, where ``keep_in_memory`` has read them; None reads the files each time.
    """

    def __init__(
        self,
        store: Store,
        targets: Sequence[int],
        classes: Sequence[str],
        *,
        in_chans: int,
        where: str,
        profile: RasterProfile | None = None,
    ) -> None:
        self.store = store
        self.targets = list(targets)
        self.classes = list(classes)
        self.in_chans = in_chans
        self.where = where
        self.profile = profile
        self.memory: PixelMemory | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def filename(self, index: int) -> str:
        """The name of a sample, as a user can find it (``shard.tar:member`` inside a tar)."""
        return self.store.name(index)

    def read(self, index: int) -> bytes:
        """A sample's file; UserError names one that cannot be read."""
        try:
            return self.store.read(index)
        except OSError as error:
            raise UserError(f"cannot read image {self.filename(index)}: {error.strerror or error}") from None

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        """The image and its target: a PIL image, or of a raster what ``decode_raster`` gives.

        Raises:
            UserError: the file cannot be read, or is of another kind than the set; it is named.
        """
        if self.memory is None:
            return self._decode(index), self.targets[index]
        pixels = self.memory[index]
        if self.profile is not None:
            return pixels.copy(), self.targets[index]
        if pixels.shape[2:] == (4,):  # fromarray would take the fourth band for an alpha channel
            return Image.frombytes("RGBX", pixels.shape[1::-1], pixels.tobytes()), self.targets[index]
        return Image.fromarray(pixels), self.targets[index]

    def pixels(self, index: int) -> np.ndarray:
        """The image as an array: (H, W, channels) or of grey pictures (H, W), uint8; of a raster (H, W, bands) float32.

        Not to be written to. Raises as indexing does.
        """
        return np.asarray(self._decode(index)) if self.memory is None else self.memory[index]

    def _decode(self, index: int) -> Image.Image | np.ndarray:
        name, data = self.filename(index), self.read(index)
        if self.profile is not None:
            return decode_raster(data, name, self.profile)
        if is_tiff_name(name) and (kind := raster_kind(data)):
            raise UserError(
                f"{name} is a raster of {kind}, but the set began with 8-bit pictures; use files of one kind, or name "
                "the bands to read all as rasters (data.bands)"
            )
        return decode_image(data, name, self.in_chans)

    def __repr__(self) -> str:
        return f"{len(self)} images, {len(self.classes)} classes, from {self.where}"


def open_dataset(
    source: str,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    image_key: str | None = None,
    target_key: str | None = None,
    in_chans: int | None = 3,
    val_fraction: float | None = None,
    split_dir: str | None = None,
    bands: Sequence[int | str] | None = None,
) -> ImageSet:
    """Opens one split of an image set and checks its structure.

    Sources:
        ``builtin``: the images that come with the package.
        A folder: ``root/<split>/<class>/**/image`` (ImageNet's layout too), or ``root/<class>/**/image`` with
            ``val_fraction``. ``val`` is also found as valid, validation, eval or test; ``train`` as training.
        A folder with split lists: ``root/splits/<split>.txt``, as tools/prepare_data.py writes them. A line is a path
            below the root, a tab and a class; without a class it is the name of the image's folder.
            ``splits/classes.txt``, where there is one, names all classes in target order.
        A plain ``.tar`` of such a folder; read in place, never unpacked.
        WebDataset shards: a folder of ``.tar`` files, one ``.tar``, or a pattern such as
            ``shards/{split}-{000..010}.tar``. A sample is an image and a ``.cls`` member (index or class name).
            Names come from ``classes``, from a ``classnames.txt`` beside the shards, or are the labels themselves.
        Hugging Face datasets: ``hfds:<name or local path>`` (also ``hf:``): a hub name, a folder written by
            ``save_to_disk``, a folder or a file of parquet.

    Args:
        source: see above.
        split: ``train``, ``val``, ``test``, or the source's own name of a split.
        classes: names in target order, normally ``open_dataset(source, "train").classes`` or a checkpoint's.
            A class of the source that is not among them is an error. None takes the source's own, sorted.
        image_key: column of the image (Hugging Face, default ``image``) or extension (shards, default any).
        target_key: column of the label (default ``label``) or extension (default ``cls``).
        in_chans: channels of an image: 1, 3 or 4 for pictures; rasters may have any number. None takes all bands of
            .tif files, and 3 of other pictures.
        val_fraction: for a folder or tar without split folders, and for shards or Hugging Face sets without
            such a split: the part of each class's images that is ``val``, chosen by a hash of their names.
        split_dir: for a folder: where its split lists are, if not in ``root/splits``.
        bands: bands of rasters, by number from 1 or by description; as many as ``in_chans``. None takes all.

    Files are read as rasters where ``bands`` is given, where ``in_chans`` is a number that no picture has, and where
    the first .tif file holds more than 8-bit grey or colour, or declares nodata. All must then be of one type.

    Raises:
        UserError: the source or the split is missing, or its structure, its classes or its bands are wrong.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} must lie between 0 and 1")
    prefix, _, rest = source.partition(":")
    if prefix in ("hfds", "hf") and rest:
        store, labels, known, where = _open_hugging_face(
            rest, split, image_key or "image", target_key or "label", val_fraction
        )
    elif source == "builtin":
        store, labels, known, where = _open_tar_tree([builtin_path()], split, None)
    else:
        root = Path(source).expanduser()
        lists = Path(split_dir).expanduser() if split_dir else root / SPLIT_FOLDER
        if root.is_dir() and (split_dir or any(lists.glob("*.txt"))):
            store, labels, known, where = _open_lists(root, lists, split)
        else:
            store, labels, known, where = _open_path(source, split, image_key, target_key, val_fraction)
    if split_dir and not isinstance(store, FileStore):
        raise UserError(f"split lists ({split_dir}) go with a folder of images, which {source} is not")
    names, targets = _to_targets(labels, known, classes, where)
    dataset = ImageSet(store, targets, names, in_chans=in_chans or 3, where=where)
    profile = _find_profile(dataset, in_chans, bands)
    if profile is not None:
        dataset.profile, dataset.in_chans = profile, len(profile.bands)
    return dataset


def _find_profile(dataset: ImageSet, in_chans: int | None, bands: Sequence[int | str] | None) -> RasterProfile | None:
    """The raster profile of a set, from the header of one file; None for pictures."""
    index = 0
    if bands is None and (in_chans is None or in_chans in PICTURE_CHANNELS):
        index = next((i for i in range(len(dataset)) if is_tiff_name(dataset.filename(i))), -1)
        if index < 0 or (in_chans is not None and raster_kind(dataset.read(index)) is None):
            return None
    name = dataset.filename(index)
    profile = read_profile(dataset.read(index), name, bands)
    if in_chans is not None and len(profile.bands) != in_chans:
        picked = f"{len(profile.bands)} bands are picked" if bands else f"{name} has {profile.count} band(s)"
        raise UserError(
            f"{picked}, but in_chans={in_chans} (the model's): set model.in_chans={len(profile.bands)}, or pick "
            f"{in_chans} bands with data.bands"
        )
    return profile


def builtin_path() -> Path:
    """The tar file of the built-in set."""
    return Path(str(resources.files("vision_mamba.data") / "builtin" / "minsk_yellowstone.tar"))


def check_head(dataset: ImageSet, num_classes: int) -> None:
    """Raises UserError unless the dataset has as many classes as the model's head."""
    if len(dataset.classes) != num_classes:
        raise UserError(
            f"{dataset.where} has {len(dataset.classes)} classes, but the model's head has {num_classes}; "
            f"set num_classes={len(dataset.classes)}, or give the data that the model was trained for"
        )


def check_images(dataset: ImageSet, *, progress: bool = True, num_workers: int = 0) -> list[str]:
    """Decodes every image.

    Args:
        dataset: the set to check.
        progress: show a bar.
        num_workers: processes; 0 reads in the caller's.

    Returns:
        One line for each file that cannot be read, is of another kind than the set, or is a raster of nothing but
        nodata; an empty list when all is well.
    """
    from tqdm import tqdm

    loader = torch.utils.data.DataLoader(
        _Complaints(dataset),
        batch_size=16,
        num_workers=num_workers,
        collate_fn=list,
        # Without a generator of its own, DataLoader draws from the global one.
        generator=torch.Generator(),
    )
    bad: list[str] = []
    with tqdm(total=len(dataset), desc="check images", unit="img", disable=None if progress else True) as bar:
        for lines in loader:
            bad += filter(None, lines)
            bar.update(len(lines))
    return bad


class _Complaints(torch.utils.data.Dataset):
    """What is wrong with each sample of a set, as a line; ``""`` where nothing is."""

    def __init__(self, dataset: ImageSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        try:
            self.dataset[index]
        except UserError as error:
            return str(error)
        return ""


def _to_targets(
    labels: Sequence[str | int], known: Sequence[str] | None, wanted: Sequence[str] | None, where: str
) -> tuple[list[str], list[int]]:
    """Class names and integer targets from labels that are names, or indices into ``known``."""
    if not labels:
        raise UserError(f"no images in {where}; image files end in {', '.join(sorted(IMAGE_EXTENSIONS))}")
    indices = [label for label in labels if isinstance(label, int)]
    words: list[str]
    if indices:
        low, high = min(indices), max(indices)
        known = list(known or wanted or map(str, range(high + 1)))
        if low < 0 or high >= len(known):
            raise UserError(
                f"{where} has class index {low if low < 0 else high}, but there are {len(known)} class names; "
                "give the names of all classes"
            )
        if wanted is None or list(wanted) == known:
            return known, indices
        words = [known[i] for i in indices]
    else:
        words = [str(label) for label in labels]
    names = list(wanted) if wanted is not None else list(known or sorted(set(words)))
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"class {repeated[0]!r} is named more than once in the list of classes")
    index = {name: i for i, name in enumerate(names)}
    strangers = sorted(set(words) - index.keys())
    if strangers:
        more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
        raise UserError(
            f"class {strangers[0]!r}{more} of {where} is not among the {len(names)} classes known from "
            f"training{nearest(strangers[0], names) or '; remove it or add it to the training split'}"
        )
    return names, [index[word] for word in words]


# Folders with split lists


def _open_lists(root: Path, folder: Path, split: str):
    stems = sorted(p.stem for p in folder.glob("*.txt") if p.name != SPLIT_CLASSES)
    own = _find_split(split, stems)
    if own is None:
        found = f" (found: {', '.join(stems)})" if stems else ""
        raise UserError(f"{folder} has no split list {split}.txt{found}{nearest(split, stems)}")
    path = folder / f"{own}.txt"
    rows = read_split_list(path)
    if not rows:
        raise UserError(f"split list {path} names no images; write it again with tools/prepare_data.py")
    known = None
    if (folder / SPLIT_CLASSES).is_file():
        known = [line.strip() for line in (folder / SPLIT_CLASSES).read_text().splitlines() if line.strip()]
        strange = sorted({label for _, label in rows} - set(known))
        if strange:
            raise UserError(
                f"class {strange[0]!r} of {path} is not in {folder / SPLIT_CLASSES}{nearest(strange[0], known)}"
            )
        lacking = [name for name in known if name not in {label for _, label in rows}]
        if own in _SYNONYMS["train"] and lacking:
            raise UserError(f"class {lacking[0]!r} of {folder / SPLIT_CLASSES} has no image in {path}")
    names = [name for name, _ in rows]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"split list {path} names {twice[0]} more than once; remove the repeated line")
    _check_listed(root, names, path)
    return FileStore(root, names), [label for _, label in rows], known, str(path)


def read_split_list(path: Path) -> list[tuple[str, str]]:
    """The (image path, class) rows of a split list; see ``open_dataset``.

    Raises:
        UserError: the file cannot be read, or a line has no class and no folder to name one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read split list {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, label = line.strip().partition("\t")
        name, label = name.strip().replace("\\", "/"), label.strip()
        if not tab:
            label = name.split("/")[-2] if "/" in name else ""
        if not label:
            raise UserError(f"line {number} of {path} has no class: {line.strip()!r}; write path, tab, class")
        rows.append((name, label))
    return rows


def _check_listed(root: Path, names: Sequence[str], path: Path) -> None:
    """Raises UserError unless every file exists; folders are listed once, as a stat a file would take minutes."""
    listed: dict[str, frozenset[str]] = {}
    missing = []
    for name in names:
        folder, _, base = name.rpartition("/")
        if folder not in listed:
            try:
                listed[folder] = frozenset(os.listdir(root / folder))
            except OSError:
                listed[folder] = frozenset()
        if base not in listed[folder]:
            missing.append(name)
    if not missing:
        return
    # The first part of the path that does not exist is where the slip is.
    parent, *rest = root, *missing[0].split("/")
    while len(rest) > 1 and (parent / rest[0]).is_dir():
        parent, rest = parent / rest[0], rest[1:]
    beside = os.listdir(parent) if parent.is_dir() else []
    what = "folder" if len(rest) > 1 else "file"
    hint = nearest(rest[0], beside)
    hint = f": no {what} {rest[0]!r} in {parent}{hint}" if hint or what == "folder" else ""
    raise UserError(
        f"{path} names {len(missing)} of {len(names)} images that {root} lacks, the first {missing[0]}{hint}"
    )


# Folders and tars that hold root/<split>/<class>/image


class FileStore:
    """Images that are files below a root."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = str(root), list(names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()


class TarStore:
    """Images that are members of uncompressed tars, read at their offsets.

    ``os.pread`` keeps no file position, so one descriptor may be shared by forked workers and by threads.
    """

    def __init__(self, members: Sequence[tuple[str, str, int, int]]) -> None:
        """Args: members: (tar path, member name, offset in bytes, size in bytes)."""
        self.members = list(members)
        self._open: dict[str, int] = {}

    def name(self, index: int) -> str:
        tar, member, _, _ = self.members[index]
        return f"{tar}:{member}"

    def read(self, index: int) -> bytes:
        tar, _, offset, size = self.members[index]
        if tar not in self._open:
            self._open[tar] = os.open(tar, os.O_RDONLY)
        return os.pread(self._open[tar], size, offset)

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_open": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _open_path(source: str, split: str, image_key: str | None, target_key: str | None, val_fraction: float | None):
    if "{" in source:
        shards = _expand_shards(source, split)
        return _open_shards(shards, source, split, image_key, target_key, None)
    path = Path(source).expanduser()
    if path.is_dir():
        split_dir = _find_split(split, [p.name for p in path.iterdir() if p.is_dir()])
        shards = sorted((path / split_dir).glob("*.tar")) if split_dir else []
        if split_dir and shards:
            return _open_shards(shards, str(path / split_dir), split, image_key, target_key, None)
        shards = sorted(path.glob("*.tar"))
        if shards:
            names = _SYNONYMS.get(split, (split,))
            own = next((m for n in names if (m := [s for s in shards if s.name.startswith(n)])), None)
            if own is None and any(s.name.startswith(tuple(_ALL_SPLITS)) for s in shards):
                raise UserError(f"no shards of split {split!r} in {path}; name them {split}-000.tar and so on")
            return _open_shards(own or shards, str(path), split, image_key, target_key, None if own else val_fraction)
        return _open_folder(path, split, val_fraction)
    if not path.exists():
        raise UserError(f"data source {source!r} does not exist; give a folder, a .tar, shards, hfds:NAME or builtin")
    if not path.name.endswith(".tar"):
        raise UserError(f"data source {source} is not a folder or an uncompressed .tar; unpack it first")
    if any(not m.name.rsplit("/", 1)[-1].startswith(".") and m.name.endswith(".cls") for m in _tar_members(path)):
        return _open_shards([path], str(path), split, image_key, target_key, val_fraction)
    return _open_tar_tree([path], split, val_fraction)


def _open_folder(root: Path, split: str, val_fraction: float | None):
    files, folders = [], []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        if relative == ".":
            # Another split's files need not be listed: ImageNet's train folder has 1.3 million.
            own = _find_split(split, subfolders)
            if own or _ALL_SPLITS & set(subfolders):
                folders += [name for name in subfolders if name != own]
                subfolders[:] = [own] if own else []
            relative = ""
        else:
            folders.append(relative)
            relative += "/"
        files += [relative + name for name in names if is_image_name(name)]
    chosen, labels, where = _select_split(files, folders, str(root), split, val_fraction)
    return FileStore(root, [files[i] for i in chosen]), labels, None, where


def _open_tar_tree(tars: Sequence[Path], split: str, val_fraction: float | None):
    tar = tars[0]
    members = _tar_members(tar)
    files = [m for m in members if m.isfile() and is_image_name(m.name)]
    names = [_clean(m.name) for m in files]
    folders = {_clean(m.name) for m in members if m.isdir()} | {n.rsplit("/", 1)[0] for n in names if "/" in n}
    folders = {f for f in folders if f and not any(part.startswith(".") for part in f.split("/"))}
    # A tar usually holds one folder of the set's name; the layout begins below it.
    depth = 0
    while True:
        tops = {f.split("/")[depth] for f in folders if f.count("/") >= depth}
        below = any(f.count("/") > depth for f in folders) and all(n.count("/") > depth + 1 for n in names)
        if len(tops) != 1 or tops & _ALL_SPLITS or split in tops or not below:
            break
        depth += 1
    names = ["/".join(n.split("/")[depth:]) for n in names]
    folders = {"/".join(f.split("/")[depth:]) for f in folders} - {""}
    chosen, labels, where = _select_split(names, sorted(folders), str(tar), split, val_fraction)
    picked = [files[i] for i in chosen]
    return TarStore([(str(tar), m.name, m.offset_data, m.size) for m in picked]), labels, None, where


def _clean(name: str) -> str:
    return name.removeprefix("./").strip("/")


def _tar_members(path: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read {path} as an uncompressed tar: {error}; unpack it or write it again") from None
    end = max((m.offset_data + m.size for m in members), default=0)
    if end > os.path.getsize(path):
        raise UserError(f"{path} is cut short (its last member ends at byte {end}); copy it again")
    return members


def _select_split(
    files: Sequence[str], folders: Sequence[str], root: str, split: str, val_fraction: float | None
) -> tuple[list[int], list[str], str]:
    """Indices of the files of a split, sorted by name, with their class names."""
    tops = sorted({f.split("/", 1)[0] for f in folders})
    own = _find_split(split, tops)
    if own is not None:
        where, start = f"{root}/{own}" if not root.endswith(".tar") else f"{root}:{own}", len(own) + 1
    elif set(tops) & _ALL_SPLITS:
        found = ", ".join(sorted(set(tops) & _ALL_SPLITS))
        raise UserError(f"{root} has no split {split!r} (found: {found}); add the folder {root}/{split}")
    elif split not in _SYNONYMS:
        raise UserError(f"{root} has no split {split!r}{nearest(split, tops)}")
    elif val_fraction is None and tops:
        raise UserError(
            f"{root} has no folder {split!r}; make {root}/train and {root}/val, or set val_fraction to split the "
            "classes found there"
        )
    else:
        where, start = root, 0
    prefix = f"{own}/" if own else ""
    inside = sorted((f, i) for i, f in enumerate(files) if f.startswith(prefix))
    stray = [f for f, _ in inside if "/" not in f[start:]]
    if stray:
        raise UserError(
            f"{len(stray)} images lie directly in {where} (first: {stray[0]}); move them into folders named by class"
        )
    class_folders = {f[start:].split("/", 1)[0] for f in folders if f.startswith(prefix)} - {""}
    if not class_folders:
        raise UserError(f"no class folders in {where}; expected {where}/<class>/<image>")
    empty = sorted(class_folders - {f[start:].split("/", 1)[0] for f, _ in inside})
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(f"class folder {where}/{empty[0]}{more} holds no images; fill it or remove it")
    labels = [f[start:].split("/", 1)[0] for f, _ in inside]
    keep = list(range(len(inside)))
    if own is None:
        keep = _hash_split([f for f, _ in inside], labels, split, val_fraction or 0.0)
    return [inside[k][1] for k in keep], [labels[k] for k in keep], where


def _find_split(split: str, names: Iterable[str]) -> str | None:
    names = set(names)
    return next((n for n in (split, *_SYNONYMS.get(split, ())) if n in names), None)


def _hash_split(names: Sequence[str], labels: Sequence[Any], split: str, val_fraction: float) -> list[int]:
    """Indices of one half of a split that is the same on every machine: each class's names by their SHA-1."""
    if split not in ("train", "val"):
        raise UserError(f"val_fraction makes the splits 'train' and 'val', not {split!r}")
    by_class: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        by_class.setdefault(label, []).append(i)
    val: set[int] = set()
    for label, members in by_class.items():
        if len(members) < 2:
            raise UserError(f"class {label!r} has one image; val_fraction needs two or more a class")
        members.sort(key=lambda i: hashlib.sha1(names[i].encode()).digest())
        count = min(max(1, round(val_fraction * len(members))), len(members) - 1)
        val.update(members[:count])
    return [i for i in range(len(labels)) if (i in val) == (split == "val")]


# WebDataset shards


def _expand_shards(pattern: str, split: str) -> list[Path]:
    candidates = [pattern]
    if "{split}" in pattern:
        candidates = [pattern.replace("{split}", name) for name in _SYNONYMS.get(split, (split,))]
    for candidate in candidates:
        paths = [Path(p).expanduser() for p in _expand_braces(candidate)]
        missing = [p for p in paths if not p.is_file()]
        if not missing:
            return paths
        if len(missing) < len(paths):
            raise UserError(f"shard {missing[0]} of {pattern} does not exist ({len(missing)} of {len(paths)} missing)")
    raise UserError(f"none of the shards {pattern} exists for split {split!r}")


def _expand_braces(pattern: str) -> list[str]:
    """``a-{08..10}.tar`` -> a-08.tar, a-09.tar, a-10.tar; ``{x,y}`` too; as the shell does."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        parts = [str(i).zfill(width) for i in range(int(span[1]), int(span[2]) + 1)]
    else:
        parts = match[1].split(",")
        if len(parts) < 2:
            raise UserError(f"cannot read {{{match[1]}}} in {pattern}; write {{000..010}}, {{a,b}} or {{split}}")
    return [p for part in parts for p in _expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def _open_shards(
    shards: Sequence[Path],
    where: str,
    split: str,
    image_key: str | None,
    target_key: str | None,
    val_fraction: float | None,
):
    if where.endswith(".tar") and val_fraction is None and split in ("train", "val") and len(shards) == 1:
        # One file cannot be both splits; its name may say which it is.
        stem = shards[0].name
        other = {"train": "val", "val": "train"}[split]
        if stem.startswith(_SYNONYMS[other]) or not stem.startswith(_SYNONYMS[split]):
            raise UserError(
                f"{where} has no split {split!r}; name the shards by split ({split}-000.tar), or set val_fraction"
            )
    wanted = {f".{k}" for k in image_key.replace(";", " ").split()} if image_key else IMAGE_EXTENSIONS
    target_key = target_key or "cls"
    members: list[tuple[str, str, int, int]] = []
    labels: list[str | int] = []
    for shard in shards:
        images: dict[str, tarfile.TarInfo] = {}
        classes: dict[str, tarfile.TarInfo] = {}
        for m in _tar_members(shard):
            folder, _, base = m.name.rpartition("/")
            stem, _, extension = base.partition(".")  # WebDataset's rule: the key ends at the first dot
            if not m.isfile() or not stem:
                continue
            if extension == target_key:
                classes[f"{folder}/{stem}"] = m
            elif f".{extension.lower()}" in wanted:
                images[f"{folder}/{stem}"] = m
        for key, m in images.items():
            if key not in classes:
                raise UserError(f"{shard}:{m.name} has no .{target_key} member; write one, or set target_key")
            members.append((str(shard), m.name, m.offset_data, m.size))
        store = TarStore([(str(shard), classes[k].name, classes[k].offset_data, classes[k].size) for k in images])
        labels += [store.read(i).decode().strip() for i in range(len(images))]
    if labels and all(re.fullmatch(r"-?\d+", str(label)) for label in labels):
        labels = [int(label) for label in labels]
    known = None
    class_list = shards[0].parent / _CLASS_LIST
    if class_list.is_file():
        known = [line.strip() for line in class_list.read_text().splitlines() if line.strip()]
    if val_fraction is not None:
        keep = _hash_split([f"{Path(t).name}:{n}" for t, n, _, _ in members], labels, split, val_fraction)
        members, labels = [members[k] for k in keep], [labels[k] for k in keep]
    return TarStore(members), labels, known, where


# Hugging Face datasets


class HuggingFaceStore:
    """Images that are a column of a Hugging Face dataset, undecoded."""

    def __init__(self, table: Any, column: str, where: str) -> None:
        self.table, self.column, self.where = table, column, where

    def name(self, index: int) -> str:
        return f"{self.where}[{index}]"

    def read(self, index: int) -> bytes:
        cell = self.table[index][self.column]
        if cell.get("bytes"):
            return cell["bytes"]
        with open(cell["path"], "rb") as file:
            return file.read()


def _open_hugging_face(name: str, split: str, image_key: str, target_key: str, val_fraction: float | None):
    import datasets

    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix == ".parquet":
            found = datasets.load_dataset("parquet", data_files=str(path))["train"]
        elif path.is_dir() or not name.startswith((".", "/", "~")):
            found = datasets.load_dataset(str(path) if path.is_dir() else name)
        else:
            raise UserError(f"data source hfds:{name} does not exist")
    except UserError:
        raise
    except Exception as error:  # the hub client and the builders raise many types, some of many lines
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot open hfds:{name}: {line}; check the name, the path and the network") from None

    where = f"hfds:{name}"
    split_here = isinstance(found, datasets.Dataset)
    if not split_here:
        own = _find_split(split, found)
        if own is None and val_fraction is not None and list(found) == ["train"]:
            own, split_here = "train", True
        elif split == "train" and val_fraction is not None and list(found) == ["train"]:
            split_here = True
        if own is None:
            raise UserError(f"{where} has no split {split!r} (found: {', '.join(found)}); name one of these")
        found, where = found[own], f"{where}/{own}"
    for key, option in ((image_key, "image_key"), (target_key, "target_key")):
        if key not in found.column_names:
            raise UserError(
                f"{where} has no column {key!r} (found: {', '.join(found.column_names)}); set {option}"
                f"{nearest(key, found.column_names)}"
            )
    found = found.cast_column(image_key, datasets.Image(decode=False))
    feature = found.features[target_key]
    labels = list(found[target_key])
    if labels and not isinstance(labels[0], (int, str)):
        raise UserError(f"column {target_key!r} of {where} is not a class index or name; set target_key")
    if split_here:
        if val_fraction is None and split not in _SYNONYMS:
            raise UserError(f"{where} has no split {split!r}; it is one table, use val_fraction")
        if val_fraction is None:
            raise UserError(f"{where} is one table without splits; set val_fraction to make 'train' and 'val'")
        keep = _hash_split([str(i) for i in range(len(labels))], labels, split, val_fraction)
        found, labels = found.select(keep), [labels[k] for k in keep]
    return HuggingFaceStore(found, image_key, where), labels, getattr(feature, "names", None), where
