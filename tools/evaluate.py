"""Measures a trained classifier: top-1, top-5, precision, recall, F1, loss, a table per class, the confusion, speed.

python tools/evaluate.py output/quickstart/best.pth
python tools/evaluate.py vim_t.pth --model vim_tiny_patch16_224 --data path/to/imagenet --amp bf16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vision_mamba.data import create_loader
from vision_mamba.engine.evaluate import add_model_arguments, choose_device, evaluate, load_trained, write_report
from vision_mamba.errors import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, batch_size=64)
    parser.add_argument("--data", help="image set: folder, .tar, shards, hfds:NAME, builtin (default: as in training)")
    parser.add_argument("--split", default="val", help="split of the image set (default: %(default)s)")
    parser.add_argument("--val-fraction", type=float, help="part held out by training, where the set has no splits")
    parser.add_argument("--split-dir", help="folder of split lists (default: splits/ in the image set)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: evaluation/ beside the checkpoint)")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        raise UserError("--batch-size must be at least 1 and --workers at least 0")

    device, amp_dtype = choose_device(args.device, args.amp)
    trained = load_trained(args.checkpoint, name=args.model, img_size=args.img_size, use_ema=not args.no_ema)
    source = args.data or trained.source
    if source is None:
        raise UserError(f"{args.checkpoint} does not say what it was trained on; give the image set with --data")
    data = trained.open_dataset(source, args.split, val_fraction=args.val_fraction, split_dir=args.split_dir)
    print(f"{trained.description}\n{data!r}")
    loader = create_loader(
        data,
        batch_size=args.batch_size,
        train=False,
        transform=trained.transform(raster=data.profile is not None),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    result = evaluate(
        trained.prepared(device), loader, num_classes=len(trained.classes), device=device, amp_dtype=amp_dtype
    )

    width = min(max(17, *(len(name) for name in trained.classes)), 40)
    print(f"\n{'class':<{width}}  precision  recall      f1  images")
    for name, row in zip(trained.classes, result["per_class"], strict=True):
        rates = f"{row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1']:6.3f}"
        print(f"{name[:width]:<{width}}  {rates}  {row['support']:6d}")
    rates = f"{result['precision']:9.3f}  {result['recall']:6.3f}  {result['f1']:6.3f}"
    print(f"{'mean over classes':<{width}}  {rates}  {result['images']:6d}")
    top5 = f"top-5 {result['top5']:.2%}, " if "top5" in result else ""
    print(
        f"\ntop-1 {result['top1']:.2%}, {top5}precision {result['precision']:.2%}, recall {result['recall']:.2%}, "
        f"F1 {result['f1']:.2%} (means over classes), loss {result['loss']:.4f} on {result['images']} images, "
        f"{result['images_per_second']:.0f} images/s ({device.type}, batch {args.batch_size}, amp {args.amp})"
    )
    files = write_report(
        result,
        trained.classes,
        args.out or Path(args.checkpoint).parent / "evaluation",
        checkpoint=str(args.checkpoint),
        model=trained.description,
        data=data.where,
        input_size=list(trained.data_config["input_size"]),
        amp=args.amp,
        device=device.type,
    )
    print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    run_main(main)
