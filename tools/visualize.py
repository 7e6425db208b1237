"""Shows scan paths, effective receptive fields and class activation maps, as PNG files.

python tools/visualize.py paths
python tools/visualize.py paths --image photo.jpg --grid 14 14 --names raster snake hilbert local7_column_reverse
python tools/visualize.py erf output/quickstart/best.pth --images photos/*.jpg
python tools/visualize.py cam output/quickstart/best.pth --images photos/*.jpg
python tools/visualize.py cam output/quickstart/best.pth --class car
python tools/visualize.py cam vim_t.pth --model vim_tiny_patch16_224 --norms

Without images it takes the examples that come with the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from vision_mamba.data import builtin_path, decode_image
from vision_mamba.engine import visualize
from vision_mamba.engine.evaluate import TrainedModel, add_model_arguments, choose_device, load_trained
from vision_mamba.errors import UserError, nearest, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="paths|erf|cam")

    paths = commands.add_parser("paths", help="scan paths over an image, a panel each")
    paths.add_argument("--image", type=Path, help="what to draw them on (default: a built-in example)")
    paths.add_argument("--names", nargs="+", default=visualize.EXAMPLES, help="scan paths (default: one of each kind)")
    paths.add_argument("--grid", type=int, nargs=2, default=(8, 8), metavar=("ROWS", "COLUMNS"), help="default: 8 8")
    paths.add_argument("--out", type=Path, default=Path("output/paths.png"), help="default: %(default)s")
    paths.set_defaults(run=draw_paths)

    erf = commands.add_parser("erf", help="effective receptive field, with random weights and with the checkpoint's")
    erf.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    erf.set_defaults(run=draw_receptive_fields)
    cam = commands.add_parser("cam", help="what a classifier looks at: Grad-CAM")
    cam.add_argument("--class", dest="label", help="class to explain (default: the most likely of each image)")
    cam.add_argument("--norms", action="store_true", help="norms of the last features instead of Grad-CAM")
    cam.set_defaults(run=draw_activations)
    for name, command in (("erf", erf), ("cam", cam)):
        add_model_arguments(command, batch_size=8)
        command.add_argument("--images", type=Path, nargs="+", help="files (default: the built-in examples)")
        command.add_argument("--out", type=Path, help=f"PNG file (default: {name}.png beside the checkpoint)")

    args = parser.parse_args(argv)
    args.run(args)


def draw_paths(args: argparse.Namespace) -> None:
    if min(args.grid) < 1:
        raise UserError("--grid needs rows and columns of at least 1")
    path = args.image or examples()[0]
    try:
        image = decode_image(path.read_bytes(), str(path), 3)
        visualize.plot_paths(image, args.names, tuple(args.grid), args.out)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    print(f"wrote {args.out}: {len(args.names)} paths over {args.grid[0]} x {args.grid[1]} tokens")


def draw_receptive_fields(args: argparse.Namespace) -> None:
    trained, images, autocast = open_model(args)
    torch.manual_seed(args.seed)
    models = {"random weights": trained.untrained(), "checkpoint": trained.model}
    fields = {}
    for title, model in models.items():
        with autocast:
            fields[title] = visualize.receptive_field(model.to(images.device), images, batch_size=args.batch_size)
        shares = (0.2, 0.3, 0.5, 0.99)
        sides = ", ".join(f"{share:.0%} in {visualize.central_share(fields[title], share):.0%}" for share in shares)
        print(f"{title}: share of the gradient in so much of the side, around the centre: {sides}")
    out = args.out or Path(args.checkpoint).parent / "erf.png"
    visualize.plot_receptive_fields(fields, out)
    print(f"wrote {out}: mean over {len(images)} images")


def draw_activations(args: argparse.Namespace) -> None:
    if args.norms and args.label:
        raise UserError("--norms are of no class; leave --class out")
    trained, images, autocast = open_model(args)
    wanted = None
    if args.label:
        if args.label not in trained.classes:
            hint = nearest(args.label, trained.classes)
            raise UserError(f"--class {args.label!r} is none of the model's {len(trained.classes)} classes{hint}")
        wanted = trained.classes.index(args.label)
    maps, captions = [], [path.name[-24:] for path in args.images or examples()]
    for batch in images.split(args.batch_size):
        with autocast:
            if args.norms:
                maps.append(visualize.feature_norm(trained.model, batch))
                continue
            targets = None if wanted is None else torch.full((len(batch),), wanted)
            heat, classes, probabilities = visualize.grad_cam(trained.model, batch, targets)
        start = sum(map(len, maps))
        maps.append(heat)
        for i, (index, probability) in enumerate(zip(classes.tolist(), probabilities.tolist(), strict=True), start):
            captions[i] += f"\n{trained.classes[index][:24]} {probability:.2f}"
    pictures = visualize.displayable(images, trained.data_config["mean"], trained.data_config["std"])
    out = args.out or Path(args.checkpoint).parent / "cam.png"
    visualize.plot_overlays(pictures, torch.cat(maps), captions, out)
    print(f"wrote {out}: {len(captions)} images")


def open_model(args: argparse.Namespace) -> tuple[TrainedModel, torch.Tensor, Any]:
    """The model and the transformed images on the device, and the autocast to run under."""
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    device, amp_dtype = choose_device(args.device, args.amp)
    trained = load_trained(args.checkpoint, name=args.model, img_size=args.img_size, use_ema=not args.no_ema)
    if trained.num_frames is not None:
        raise UserError(f"{trained.description} takes clips; only models of images are shown")
    if not hasattr(trained.model, "forward_intermediates"):
        raise UserError(f"{trained.name} has no forward_intermediates, which gives the feature maps")
    print(trained.description)
    trained.model.to(device)
    transform = trained.transform()
    try:
        images = torch.stack([transform(trained.read(path)) for path in args.images or examples()])
    except OSError as error:
        raise UserError(f"--images: {error}") from None
    return trained, images.to(device), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)


def examples() -> list[Path]:
    return sorted((builtin_path().parent / "examples").glob("*.jpg"))


if __name__ == "__main__":
    run_main(main)
