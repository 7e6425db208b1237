"""Trains variants of one recipe, each with the same seeds, and tabulates top-1, F1, speed and size.

python tools/sweep.py configs/classification/vim_tiny_aid128.yaml data.source=aid_128.tar \\
    --vary model.kwargs.paths raster snake hilbert morton local2 atrous2 diagonal --seeds 0 1 2
python tools/sweep.py configs/classification/quickstart.yaml --vary optimizer.lr 1e-3 2e-3 4e-3
python tools/sweep.py configs/classification/aid128_comparison.yaml data.source=aid_128.tar \\
    --variants configs/variants/aid128_models.yaml --seeds 0 1 2 --jobs 6

A file of variants maps names to keys, for runs that differ in more than one:
    deit_tiny: {model.name: deit_tiny_patch16_224, model.kwargs: {patch_size: 8}}

Start it again to go on: what has ended is not repeated, and more variants or seeds may be given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vision_mamba.engine.sweep import plan, read_variants, sweep, vary
from vision_mamba.errors import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see configs/classification/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set in all runs")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vary", nargs="+", metavar=("KEY", "VALUE"), help="the key that varies, and its values (YAML)")
    what.add_argument(
        "--variants", nargs="+", metavar=("FILE", "NAME"), help="YAML file of variants, and which (default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at the same time (default: 1); they take the GPUs in turn, several may share one",
    )
    parser.add_argument("--output", type=Path, help="folder of the runs (default: output/sweep_<config>_<what varies>)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    if args.vary:
        title, *values = args.vary
        if not values:
            raise UserError(f"--vary {title} needs one or more values after the key")
        variants, name = vary(title, values), title.rpartition(".")[2]
    else:
        file, *names = args.variants
        variants, title, name = read_variants(file, names), "variant", Path(file).stem
    output = args.output or Path("output") / f"sweep_{Path(args.config).stem}_{name}"
    runs = plan(args.config, variants, args.seeds, args.overrides, output)
    table = sweep(runs, title, output, jobs=args.jobs)
    print(f"\n{table}\nwritten to {output}: runs.csv, table.md and a folder for each run")


if __name__ == "__main__":
    run_main(main)
