"""Turns an official release file into one of ours: our names, safetensors, model and image size in its metadata.

python tools/convert_checkpoint.py vim_t_midclstok_76p1acc.pth vim_tiny.safetensors
python tools/convert_checkpoint.py epoch_500.pth rsmamba_aid.safetensors --model rsmamba_base
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from safetensors.torch import save_file

from vision_mamba.checkpoint import find_state_dict, read_checkpoint
from vision_mamba.engine.convert import convert, guess_model
from vision_mamba.errors import UserError, run_main
from vision_mamba.files import replacing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("official", type=Path, help="the authors' file (.pth, .pth.tar, .ckpt, .safetensors)")
    parser.add_argument("out", type=Path, help="the new file, .safetensors")
    parser.add_argument("--model", help="name of the model (default: the one whose tensors have the file's shapes)")
    parser.add_argument("--img-size", type=int, nargs="+", help="side, or height and width, where not the model's own")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights where the file has them")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing result")
    args = parser.parse_args(argv)
    if args.out.suffix != ".safetensors":
        raise UserError(f"{args.out} must end in .safetensors, the only format that is written")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists; --overwrite replaces it")
    if args.img_size and (len(args.img_size) > 2 or min(args.img_size) < 1):
        raise UserError(f"--img-size {args.img_size} must be one positive number, or height and width")

    try:
        state = find_state_dict(read_checkpoint(args.official), use_ema=args.ema, source=str(args.official))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    name = args.model
    if name is None:
        name = guess_model(state, args.official)
        print(f"{args.official} has the tensors of {name} and is taken for it (--model names another)")
    tensors, metadata = convert(state, name, args.official, img_size=args.img_size)
    with replacing(args.out) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors lets only the owner read
    print(
        f"wrote {args.out}: {name}, {metadata['num_classes']} classes, input {metadata['input_size']}, "
        f"{sum(tensor.numel() for tensor in tensors.values()) / 1e6:.2f} M values"
    )


if __name__ == "__main__":
    run_main(main)
