"""Trains a classifier from a YAML configuration.

python tools/train.py configs/classification/quickstart.yaml
python tools/train.py CONFIG data.source=path/to/images optimizer.lr=1e-4 --output output/mine
python tools/train.py CONFIG --resume auto
torchrun --nproc-per-node 8 tools/train.py CONFIG data.source=path/to/imagenet
"""

import argparse
import os
from pathlib import Path

from vision_mamba.engine.checkpoint import LAST
from vision_mamba.engine.config import help_table, load_config
from vision_mamba.engine.train import train
from vision_mamba.errors import UserError, run_main


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="YAML file, see configs/classification/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: continue the run in the output folder, if any; or a run's folder or checkpoint",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the run; short for output.dir=DIR")
    parser.add_argument("--help-config", action="store_true", help="print every configuration key and exit")
    args = parser.parse_intermixed_args()
    if args.help_config:
        print(help_table())
        return None
    if args.config is None:
        parser.error("a configuration file is needed")
    overrides = args.overrides + ([f"output.dir={args.output}"] if args.output else [])
    config = load_config(args.config, overrides)
    output = Path(config.output.dir or Path("output") / Path(args.config).stem)
    resume = args.resume
    try:
        if resume not in (None, "auto"):
            # A run goes on where it lies: its log and its best weights are beside the checkpoint.
            resume = Path(resume) / LAST if Path(resume).is_dir() else Path(resume)
            if config.output.dir and output.resolve() != resume.parent.resolve():
                raise UserError(f"--resume {args.resume} continues in {resume.parent}; leave out --output {output}")
            output = resume.parent
        train(config, output, resume=resume)
    except UserError:
        # Every process of a torchrun comes to the same error; one of them tells it.
        if int(os.environ.get("RANK", "0")) == 0:
            raise
        return 2
    return None


if __name__ == "__main__":
    run_main(main)
