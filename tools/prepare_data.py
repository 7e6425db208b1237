"""Checks a remote-sensing scene set as its authors distribute it, and writes it with reproducible split lists.

    python tools/prepare_data.py aid AID.zip --out data/aid
    python tools/prepare_data.py resisc45 NWPU-RESISC45 --out data/resisc45 --split train=0.2,val=0.8
    python tools/prepare_data.py ucmerced UCMerced_LandUse.zip --out data/uc --split-file train=train.txt val=val.txt
    python tools/prepare_data.py aid aid_128.tar --out data/aid_128 --partial --split folders
    python tools/train.py CONFIG data.source=data/aid

SOURCE is the folder or the archive (.zip, .tar, .tar.gz). Checked are the classes, the number of images of each,
and that every image can be read; every problem is listed, and nothing is written where there is one. The result:

    DIR/images/<class>/<image>      hard links where SOURCE is a folder on the same file system, else copies
    DIR/splits/<split>.txt          path, tab, class; each class by the SHA-1 of <class>/<image>, the first part train
    DIR/splits/classes.txt          the classes in label order
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from vision_mamba.data import scenes
from vision_mamba.errors import UserError, run_main

_SHOWN = 10  # problems of one kind that are listed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_catalogue(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=tuple(scenes.SCENE_SETS), help="which set; see below")
    parser.add_argument("source", type=Path, help="folder or archive")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--split",
        help="parts of each class, such as train=0.5,val=0.5, or 'folders' to keep the source's (default: below)",
    )
    parser.add_argument(
        "--split-file", nargs="+", metavar="SPLIT=FILE", help="lists to split by, such as train=train.txt val=val.txt"
    )
    parser.add_argument("--partial", action="store_true", help="accept a part of the set: fewer images or classes")
    parser.add_argument(
        "--download", action="store_true", help="fetch the set into SOURCE first, with torchvision or torchgeo"
    )
    args = parser.parse_args(argv)
    spec = scenes.SCENE_SETS[args.name]
    if args.split and args.split_file:
        raise UserError("--split and --split-file are both given: choose one")
    ratios = None if args.split == "folders" else scenes.parse_ratios(args.split) if args.split else dict(spec.split)
    lists = _split_files(args.split_file) if args.split_file else None
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} exists and is not empty; remove it or give another folder")
    if args.download:
        download(spec, args.source)
    if args.source.name in spec.md5 and args.source.is_file():
        same = _md5(args.source) == spec.md5[args.source.name]
        print(f"{args.source.name}: {'the' if same else 'not the'} file that {spec.library.split('.')[0]} downloads")

    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    try:
        with scenes.open_source(spec, args.source) as (files, problems):
            if not files:
                raise UserError(
                    f"{args.source} holds no class folder of {args.name}; expected {spec.layout}"
                    + (f"; {problems[0]}" if problems else "")
                )
            problems += scenes.count_problems(spec, files, partial=args.partial)
            if lists is not None:
                splits = scenes.split_by_lists(files, lists, partial=args.partial)
            elif ratios is None:
                splits = scenes.split_by_folders(files)
            else:
                splits = scenes.split_by_hash(files, ratios) if not problems else {}
            classes = scenes.classes_of(splits) if splits else []
            unreadable = []
            for file in tqdm(files, desc="read", unit="img", disable=None):
                try:
                    data = file.read()
                    scenes.check_image(spec, file, data)
                except UserError as error:
                    unreadable.append(str(error))
                    continue
                if not problems:
                    scenes.place(file, data, temporary)
        if problems or unreadable:
            _complain(args.name, problems, unreadable, len(files), args.partial)
        scenes.write_split_lists(temporary, splits, classes)
        if args.out.exists():
            args.out.rmdir()
        os.replace(temporary, args.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    used = sum(map(len, splits.values()))
    print(f"{args.name}: {len(files)} images, {len(classes)} classes, all read")
    for split, members in splits.items():
        counts = Counter(file.label for file in members).values()
        print(f"  {split}: {len(members)} images, {min(counts)} to {max(counts)} a class")
    if used < len(files):
        print(f"  in no split: {len(files) - used} images")
    print(f"wrote {args.out}; train with data.source={args.out}")


def download(spec: scenes.SceneSet, root: Path) -> None:
    """Lets torchvision or torchgeo fetch a set into ``root``; UserError where neither knows it or it fails."""
    if not spec.library:
        raise UserError(f"no library downloads this set; get it from {spec.origin}")
    module, _, name = spec.library.partition(":")
    package = module.split(".")[0]
    try:
        dataset = getattr(importlib.import_module(module), name)
    except ImportError:
        raise UserError(f"--download needs {package} for this set: pip install {package}; or {spec.origin}") from None
    try:
        if package == "torchvision":
            dataset(root=str(root), download=True)
        else:
            for split in ("train", "val", "test"):
                dataset(root=str(root), split=split, download=True)
    except Exception as error:  # URL errors, checksums, and the libraries' own types
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{spec.library} could not download: {line}; get it from {spec.origin}") from None


def _complain(name: str, problems: list[str], unreadable: list[str], images: int, partial: bool) -> None:
    for lines in (problems, unreadable):
        for line in lines[:_SHOWN]:
            print(f"problem: {line}", file=sys.stderr)
        if len(lines) > _SHOWN:
            print(f"problem: ... and {len(lines) - _SHOWN} more like these", file=sys.stderr)
    what = [f"{len(problems)} problem{'s' * (len(problems) > 1)} with its folders"] * bool(problems)
    what += [f"{len(unreadable)} of {images} images that cannot be used"] * bool(unreadable)
    remedy = "mend or download it again" + ("" if partial else ", or give --partial if it is a part of the set")
    raise UserError(f"this is not {name} as its authors distribute it: {' and '.join(what)} (above); {remedy}")


def _split_files(arguments: list[str]) -> dict[str, Path]:
    lists = {}
    for argument in arguments:
        split, equals, path = argument.partition("=")
        if not equals or split not in ("train", "val", "test"):
            raise UserError(f"--split-file {argument} must be train=FILE, val=FILE or test=FILE")
        lists[split] = Path(path).expanduser()
    if "train" not in lists:
        raise UserError("--split-file must name a list for train")
    return lists


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _catalogue() -> str:
    lines = ["sets:"]
    for name, spec in scenes.SCENE_SETS.items():
        lines += ["", f"  {name}", f"    {spec.title}", f"    from      {spec.origin}", f"    layout    {spec.layout}"]
        lines += [f"    licence   {spec.licence}", f"    split     {spec.split_source}"]
        if spec.library:
            lines.append(f"    download  {spec.library.replace(':', '.')}")
    lines += ["", "The RSMamba paper's own lists (its repository's datainfo/<SET>/{train,val}.txt) and torchgeo's"]
    lines += ["(uc_merced-train.txt, resisc45-train.txt, eurosat-train.txt ...) are taken by --split-file."]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
