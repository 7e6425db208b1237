"""Trains one recipe with several values of one key, each with the same seeds, and tabulates top-1.

python tools/sweep.py configs/classification/vim_tiny_aid128.yaml data.source=aid_128.tar \\
    --vary model.kwargs.paths raster snake hilbert morton local2 atrous2 diagonal --seeds 0 1 2
python tools/sweep.py configs/classification/quickstart.yaml --vary optimizer.lr 1e-3 2e-3 4e-3

Start it again to go on: what has ended is not repeated, and more values or seeds may be given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vision_mamba.engine.sweep import plan, sweep
from vision_mamba.errors import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see configs/classification/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set in all runs")
    parser.add_argument(
        "--vary", nargs="+", required=True, metavar=("KEY", "VALUE"), help="the key that varies, and its values (YAML)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: output/sweep_<config>_<key>)")
    args = parser.parse_args(argv)
    key, *values = args.vary
    if not values:
        raise UserError(f"--vary {key} needs one or more values after the key")
    output = args.output or Path("output") / f"sweep_{Path(args.config).stem}_{key.rpartition('.')[2]}"
    table = sweep(plan(args.config, key, values, args.seeds, args.overrides, output), key, output)
    print(f"\n{table}\nwritten to {output}: runs.csv, table.md and a folder for each run")


if __name__ == "__main__":
    run_main(main)
