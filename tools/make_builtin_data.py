"""Cuts the built-in image set from two openly licensed sources.

    python tools/make_builtin_data.py SOURCES

SOURCES holds `aerial_cars/` (drone frames of Minsk, 1280x720, with COCO boxes of vehicles) and `large_scenes/`
(airborne images of Yellowstone with boxes of tree crowns). They come from

- github.com/jekhor/aerial-cars-dataset, commit d2ed927fe2b06e4794e90d6320152b940808ddd9: the author's own `DJI*`
  frames, resized from 1920x1080, YOLO boxes converted;
- the PyPI package deepforest 2.1.0: NEON imagery, recoded from PNG to JPEG.

Each tile is a window of 64x64 source pixels, reduced to 48x48. Its class follows from the boxes: a car or a crown
lies near the middle, or no box touches the window. Training and validation never share pixels: cars and streets
are validated on a flight of their own (`DJI-00760`), trees and meadow on a horizontal band of each image. The
result is the same every time, byte for byte for one version of Pillow.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

WINDOW, TILE, QUALITY = 64, 48, 85
VAL_CLIP = "DJI-00760"
VAL_BAND = (0.45, 0.68)  # of the height of the tree images
CAR = 1  # category id; the others are bus, minibus and truck
# The streets vary most and the meadows least.
PER_CLASS = {
    "train": {"car": 700, "street": 850, "meadow": 400, "tree": 450},
    "val": {"car": 140, "street": 140, "meadow": 140, "tree": 140},
}
EXAMPLES = 3  # validation tiles a class that are also plain files, to try prediction on

Box = tuple[float, float, float, float, int]
OUTPUT = Path(__file__).parents[1] / "vision_mamba" / "data" / "builtin" / "minsk_yellowstone.tar"


def read_boxes(path: Path) -> dict[str, list[Box]]:
    """Boxes (left, top, right, bottom, category) of each image of a COCO file."""
    coco = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    boxes: dict[str, list[Box]] = {name: [] for name in names.values()}
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        boxes[names[annotation["image_id"]]].append((x, y, x + w, y + h, annotation["category_id"]))
    return boxes


def touches(box: Box, x: int, y: int, margin: int = 0) -> bool:
    """Whether a box overlaps the window at (x, y), grown by a margin in pixels."""
    return (
        min(box[2], x + WINDOW + margin) > max(box[0], x - margin)
        and min(box[3], y + WINDOW + margin) > max(box[1], y - margin)
    )  # fmt: skip


def window_near(box: Box, image: Image.Image, spread: float, rng: random.Random) -> tuple[int, int] | None:
    """A window with its centre within `spread` windows of the box's, or None where it leaves the image."""
    reach = spread * WINDOW
    x = int((box[0] + box[2]) / 2 + rng.uniform(-reach, reach) - WINDOW / 2)
    y = int((box[1] + box[3]) / 2 + rng.uniform(-reach, reach) - WINDOW / 2)
    return (x, y) if 0 <= x <= image.width - WINDOW and 0 <= y <= image.height - WINDOW else None


def cut(image: Image.Image, x: int, y: int) -> Image.Image:
    return image.crop((x, y, x + WINDOW, y + WINDOW))


def city_tiles(root: Path, rng: random.Random):
    """Yields (split, class, tile) of the drone frames."""
    for part in ("train", "val"):
        for name, boxes in sorted(read_boxes(root / "annotations" / f"instances_{part}.json").items()):
            split = "val" if name.startswith(VAL_CLIP) else "train"
            image = Image.open(root / part / name).convert("RGB")
            others = [b for b in boxes if b[4] != CAR]
            for box in boxes:
                if box[4] == CAR:
                    for _ in range(2 if split == "train" else 1):
                        at = window_near(box, image, 0.27, rng)
                        if at and not any(touches(b, *at) for b in others):
                            yield split, "car", cut(image, *at)
                # The street beside a vehicle, without any.
                wanted = 2
                for _ in range(16):
                    at = window_near(box, image, 1.4, rng) if wanted else None
                    if at and not any(touches(b, *at, margin=3) for b in boxes):
                        tile = cut(image, *at)
                        red, green, blue = np.asarray(tile, dtype=np.float32).mean((0, 1))
                        if 2 * green - red - blue <= 12:  # not a flower bed
                            wanted -= 1
                            yield split, "street", tile


def tree_tiles(root: Path, rng: random.Random):
    """Yields (split, class, tile) of the airborne images."""
    for name, boxes in sorted(read_boxes(root / "annotations" / "instances_trees.json").items()):
        if not name.startswith("2019_YELL"):
            continue
        image = Image.open(root / "trees" / name).convert("RGB")
        low, high = (round(f * image.height) for f in VAL_BAND)

        def split_of(y: int, low: int = low, high: int = high) -> str | None:
            if low <= y and y + WINDOW <= high:
                return "val"
            return "train" if y + WINDOW <= low or y >= high else None

        for box in boxes:
            at = window_near(box, image, 0.2, rng)
            if at and split_of(at[1]):
                yield split_of(at[1]), "tree", cut(image, *at)
        if "541000" in name:
            continue  # what is not forest there is a road
        for _ in range(6000):
            x, y = rng.randrange(image.width - WINDOW), rng.randrange(image.height - WINDOW)
            if split_of(y) and not any(touches(b, x, y, 4) for b in boxes):
                tile = cut(image, x, y)
                if (np.asarray(tile.convert("L")) < 90).mean() <= 0.25:  # not the shadow of a wood
                    yield split_of(y), "meadow", tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder with aerial_cars/ and large_scenes/")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="tar file to write")
    args = parser.parse_args()
    rng = random.Random(0)
    groups: dict[tuple[str, str], list[Image.Image]] = {}
    for split, label, tile in (
        *city_tiles(args.sources / "aerial_cars", rng),
        *tree_tiles(args.sources / "large_scenes", rng),
    ):
        groups.setdefault((split, label), []).append(tile)
    examples = args.out.parent / "examples"
    examples.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(args.out.name + ".tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for (split, label), tiles in sorted(groups.items()):
            chosen = rng.sample(tiles, min(len(tiles), PER_CLASS[split][label]))
            for number, tile in enumerate(chosen):
                encoded = io.BytesIO()
                tile.resize((TILE, TILE), Image.Resampling.LANCZOS).save(
                    encoded, "JPEG", quality=QUALITY, optimize=True
                )
                member = tarfile.TarInfo(f"{split}/{label}/{label}_{number:03d}.jpg")
                member.size, member.mode = encoded.tell(), 0o644
                encoded.seek(0)
                tar.addfile(member, encoded)
                if split == "val" and number < EXAMPLES:
                    (examples / f"{label}_{number}.jpg").write_bytes(encoded.getvalue())
    os.replace(temporary, args.out)
    counts = Counter({f"{s}/{c}": min(len(t), PER_CLASS[s][c]) for (s, c), t in groups.items()})
    size = args.out.stat().st_size / 1e6
    print(f"{sum(counts.values())} tiles, {size:.2f} MB: {dict(sorted(counts.items()))}")
    print(f"written to {args.out} and {examples}")


if __name__ == "__main__":
    main()
