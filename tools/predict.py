"""Names what is in images or videos: a table in the terminal, predictions.json, predictions.csv and a contact sheet.

    python tools/predict.py output/quickstart/best.pth photos/ more/*.jpg
    python tools/predict.py vim_t.pth --model vim_tiny_patch16_224 cat.jpg --topk 3
    python tools/predict.py videomamba_t16_k400_f8_res224.pth --model videomamba_tiny_f8 clip.mp4 videos/

GeoTIFF tiles of any band count and number type are read where the model was trained on such. A model of clips takes
videos: as many frames as it wants, evenly spread, the centre of each (needs PyAV: pip install av). A file that cannot
be read, or holds nothing but nodata, is reported and skipped. The exit status is 2 only where none could be read.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vision_mamba.data import import_av, is_image_name, is_video_name, preview
from vision_mamba.engine.evaluate import add_model_arguments, choose_device, load_trained
from vision_mamba.engine.plots import plot_contact_sheet, replacing
from vision_mamba.errors import UserError, run_main

_SHEET = 60  # images on the contact sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, batch_size=16)
    parser.add_argument(
        "images", nargs="+", help="image files (videos for a model of clips), folders (searched through) or globs"
    )
    parser.add_argument("--topk", type=int, default=5, help="classes an image (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: predictions/ beside the checkpoint)")
    args = parser.parse_args(argv)
    if args.topk < 1 or args.batch_size < 1:
        raise UserError("--topk and --batch-size must be at least 1")

    device, amp_dtype = choose_device(args.device, args.amp)
    trained = load_trained(args.checkpoint, name=args.model, img_size=args.img_size, use_ema=not args.no_ema)
    if trained.num_frames is not None:
        import_av()
    paths = find_files(args.images, videos=trained.num_frames is not None)
    model, transform = trained.prepared(device), trained.transform()
    topk = min(args.topk, len(trained.classes))
    kind = "images" if trained.num_frames is None else "videos"
    print(trained.description)

    predictions, skipped, thumbnails = [], [], []
    width = min(max(len(str(path)) for path in paths), 60)
    for start in range(0, len(paths), args.batch_size):
        read, batch = [], []
        for path in paths[start : start + args.batch_size]:
            try:
                image = trained.read(path)
            except (UserError, OSError) as error:
                skipped.append({"image": str(path), "error": str(error)})
                print(f"skipped: {error}", file=sys.stderr)
                continue
            read.append(path)
            batch.append(transform(image))
            if len(thumbnails) < _SHEET:
                thumbnails.append(_thumbnail(image))
        if not read:
            continue
        with torch.no_grad(), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(torch.stack(batch).to(device))
        scores, indices = logits.float().softmax(-1).topk(topk)
        for path, row_scores, row_indices in zip(read, scores.tolist(), indices.tolist(), strict=True):
            top = [
                {"class": trained.classes[i], "index": i, "score": score}
                for i, score in zip(row_indices, row_scores, strict=True)
            ]
            predictions.append({"image": str(path), "topk": top})
            line = "  ".join(f"{t['class']} {t['score']:.3f}" for t in top)
            print(f"{str(path)[-width:]:<{width}}  {line}")
    if not predictions:
        raise UserError(f"none of the {len(paths)} {kind} could be read; see the lines above")

    out = args.out or Path(args.checkpoint).parent / "predictions"
    files = [out / "predictions.json", out / "predictions.csv", out / "contact_sheet.png"]
    with replacing(files[0]) as temporary:
        report = {"model": trained.description, "predictions": predictions, "skipped": skipped}
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(files[1]) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "rank", "class", "index", "score"))
        for p in predictions:
            writer.writerows(
                (p["image"], rank, t["class"], t["index"], t["score"]) for rank, t in enumerate(p["topk"], 1)
            )
    captions = [
        f"{Path(p['image']).name[-24:]}\n{p['topk'][0]['class'][:24]} {p['topk'][0]['score']:.2f}"
        for p in predictions[: len(thumbnails)]
    ]
    plot_contact_sheet(thumbnails, captions, files[2])
    shown = f" (the first {len(thumbnails)} {kind})" if len(predictions) > len(thumbnails) else ""
    print(f"{len(predictions)} {kind}, {len(skipped)} skipped; wrote " + ", ".join(map(str, files)) + shown)


def find_files(arguments: list[str], *, videos: bool = False) -> list[Path]:
    """The image (or video) files that files, folders and globs name, each once, in order.

    Raises:
        UserError: an argument that names nothing, or a folder without images.
    """
    kind, fits = ("video", is_video_name) if videos else ("image", is_image_name)
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            some = sorted(p for p in path.rglob("*") if p.is_file() and fits(p.name))
            if not some:
                raise UserError(f"folder {argument} holds no {kind}s")
        elif path.exists():
            some = [path]
        else:
            some = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
            if not some:
                raise UserError(f"no {kind} {argument}; give a file, a folder or a glob that matches something")
        found.update(dict.fromkeys(some))
    return list(found)


def _thumbnail(image: Image.Image | np.ndarray | list[Image.Image]) -> Image.Image:
    if isinstance(image, list):
        image = image[len(image) // 2]
    small = (preview(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    small.thumbnail((256, 256))
    return small


if __name__ == "__main__":
    run_main(main)
