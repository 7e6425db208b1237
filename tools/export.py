"""Writes a model to one file for other programs: .pt2 (torch.export) or .onnx, checked against the model.

    python tools/export.py output/quickstart/best.pth vim.onnx
    python tools/export.py vim_t.pth vim_t.pt2 --model vim_tiny_patch16_224
    python tools/export.py vmamba_tiny_s1l8 vmamba.onnx --pretrained --dynamic-size

The file is for inference in float32. It takes any number of images at once (--no-dynamic-batch: one). An .onnx file
runs in onnxruntime with no code of ours; a .pt2 file needs `import vision_mamba` before torch.export.load. Mean, std,
class names and input size are in the file as JSON (metadata "vision_mamba"; in .pt2 the extra file vision_mamba.json).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vision_mamba.engine.evaluate import load_trained
from vision_mamba.engine.export import check_suffix, describe, example_size, export_model, new_model
from vision_mamba.errors import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a timm model name, a checkpoint of tools/train.py, or weights (with --model)")
    parser.add_argument("out", type=Path, help="the file to write, ending in .pt2 or .onnx")
    parser.add_argument("--model", help="timm model name, where the checkpoint does not say it")
    parser.add_argument("--pretrained", action="store_true", help="published weights, where SOURCE is a model's name")
    parser.add_argument("--img-size", type=int, nargs="+", help="another image size: side, or height and width")
    parser.add_argument(
        "--dynamic-batch", action=argparse.BooleanOptionalAction, default=True, help="any number of images at once"
    )
    parser.add_argument("--dynamic-size", action="store_true", help="images of any size, where the model allows it")
    parser.add_argument("--no-ema", action="store_true", help="take the raw weights where averaged ones exist")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    check_suffix(args.out)
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists; --overwrite replaces it")

    if Path(args.source).exists() or Path(args.source).suffix in (".pth", ".pt", ".safetensors"):
        if args.pretrained:
            raise UserError("--pretrained is for a model's name; a checkpoint has weights of its own")
        trained = load_trained(args.source, name=args.model, img_size=args.img_size, use_ema=not args.no_ema)
    else:
        trained = new_model(args.source, img_size=args.img_size, pretrained=args.pretrained)
    print(trained.description)
    report = export_model(
        trained.model,
        args.out,
        input_size=example_size(trained),
        dynamic_batch=args.dynamic_batch,
        dynamic_size=args.dynamic_size,
        about=describe(trained),
    )
    print(f"wrote {report.path}: {report.size / 1e6:.1f} MB, {report.nodes} operators, in {report.seconds:.0f} s")
    for check in report.checks:
        shape = " x ".join(map(str, check.shape))
        print(
            f"  random images {shape}: differs from the model by at most {check.largest:.1e}, {check.relative:.1e} RMS"
        )


if __name__ == "__main__":
    run_main(main)
