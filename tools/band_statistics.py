"""Measures each band of an image set: mean, standard deviation, range, percentiles; nodata is left out.

    python tools/band_statistics.py path/to/EuroSAT_MS --out eurosat_ms.yaml
    python tools/train.py CONFIG data.source=path/to/EuroSAT_MS data.statistics=eurosat_ms.yaml model.in_chans=13

Images of 8 bits count as 0..1, others in their own units, as in training. The file is for data.statistics.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from vision_mamba.data import band_statistics, open_dataset
from vision_mamba.errors import UserError, run_main
from vision_mamba.files import replacing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="image set, as data.source")
    parser.add_argument("--split", default="train", help="split to measure (default: %(default)s)")
    parser.add_argument("--split-dir", help="folder of split lists, as data.split_dir")
    parser.add_argument("--val-fraction", type=float, help="part held out by training, where the set has no splits")
    parser.add_argument(
        "--bands", nargs="+", metavar="BAND", help="numbers (from 1) or names of bands (default: all of them)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("statistics.yaml"), help="YAML file (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.workers < 0:
        raise UserError("--workers must be at least 0")

    bands = [int(b) if b.isdigit() else b for b in args.bands] if args.bands else None
    options = {"split_dir": args.split_dir, "val_fraction": args.val_fraction}
    data = open_dataset(args.source, args.split, in_chans=None, bands=bands, **options)
    print(f"{data!r}, {'rasters' if data.profile else 'pictures'} of {data.in_chans} bands")
    result = band_statistics(data, num_workers=args.workers, progress=sys.stderr.isatty())
    print(f"{'band':>4}  {'name':12}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}{'2 %':>12}{'98 %':>12}")
    columns = [result[k] for k in ("mean", "std", "min", "max")] + [result["percentiles"][p] for p in ("2", "98")]
    for number, name, *row in zip(result["bands"], result["names"], *columns, strict=True):
        print(f"{number:>4}  {name[:12]:12}" + "".join(f"{value:12.5g}" for value in row))
    print(f"{result['images']} images, {result['dtype']}, {result['nodata']:.2%} nodata")
    with replacing(args.out) as temporary:
        temporary.write_text(yaml.safe_dump(result, sort_keys=False, default_flow_style=None, width=120))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
