"""Sweeps: two path sets on the built-in images, restarted; the table; wrong input before anything is trained."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from vision_mamba.engine import sweep as module
from vision_mamba.engine.sweep import plan, sweep
from vision_mamba.errors import UserError

TOOL = Path(__file__).parents[1] / "tools" / "sweep.py"
KEY = "model.kwargs.paths"
SETTINGS = {
    "model": {"name": "test_vim", "img_size": 32, "kwargs": {"embed_dim": 16, "depth": 2}},
    # The smaller split stands for both: what is learned is of no interest here.
    "data": {
        "source": "builtin",
        "train_split": "val",
        "batch_size": 64,
        "num_workers": 0,
        "check_images": False,
    },
    "schedule": {"epochs": 1, "warmup_epochs": 0},
    "train": {"device": "cpu"},
    "output": {"tensorboard": False, "plots": False},
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def run(*arguments, capsys):
    """Exit code, stdout and stderr of the tool."""
    argv, sys.argv = sys.argv, [str(TOOL), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = argv
    return ended.value.code, *capsys.readouterr()


def test_two_path_sets_on_the_builtin_images(recipe, tmp_path, capsys):
    output = tmp_path / "sweep"
    arguments = (recipe, "optimizer.lr=2e-3", "--output", output, "--vary", KEY, "snake")
    code, stdout, stderr = run(*arguments, capsys=capsys)
    assert code == 0, stderr
    # Restarted with one more: the first is not trained again.
    code, stdout, stderr = run(*arguments, "[hilbert, local2_reverse]", capsys=capsys)
    assert code == 0, stderr
    assert "[1/2] model.kwargs.paths=snake, seed 0 (done before)" in stdout
    assert stdout.count("M parameters, ") == 1 and f"written to {output}: runs.csv, table.md" in stdout

    rows = list(csv.DictReader((output / "runs.csv").open()))
    assert [(row[KEY], row["seed"], row["folder"]) for row in rows] == [
        ("snake", "0", "snake-seed0"),
        ("[hilbert, local2_reverse]", "0", "hilbert-local2_reverse-seed0"),
    ]
    for row in rows:
        log = list(csv.DictReader((output / row["folder"] / "log.csv").open()))
        assert float(row["top1"]) == pytest.approx(float(log[-1]["val_top1"]), abs=1e-6)
        config = yaml.safe_load((output / row["folder"] / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == 2e-3 and config["train"]["seed"] == 0
    assert config["model"]["kwargs"] == {"embed_dim": 16, "depth": 2, "paths": ["hilbert", "local2_reverse"]}
    table = (output / "table.md").read_text()
    assert table in stdout and f"| snake | 1 | {100 * float(rows[0]['top1']):.2f} |" in table

    # Another recipe in the same folder would mix runs that are not comparable.
    code, _, stderr = run(recipe, "optimizer.lr=1e-3", *arguments[2:], capsys=capsys)
    assert code == 2 and "snake-seed0 holds a run of another configuration (optimizer.lr differ)" in stderr


def test_seeds_come_after_values_and_are_averaged(recipe, tmp_path, monkeypatch):
    trained = []

    def train(config, output, resume):
        assert resume == "auto"
        trained.append((config.model.kwargs["paths"], config.train.seed))
        top1 = {"raster": 0.5, "snake": 0.7}[config.model.kwargs["paths"]] + 0.02 * config.train.seed
        output.mkdir(parents=True)
        return {"last": {"top1": top1, "loss": 1.0}, "best": {"top1": top1 + 0.1}, "best_epoch": 1}

    monkeypatch.setattr(module, "train", train)
    runs = plan(recipe, KEY, ["raster", "snake"], [0, 1], [], tmp_path / "out")
    table = sweep(runs, KEY, tmp_path / "out")
    assert trained == [("raster", 0), ("snake", 0), ("raster", 1), ("snake", 1)]
    # The standard deviation of 50 and 52, of two values: sqrt(2).
    assert table.splitlines()[2:] == [
        "| raster | 2 | 51.00 ± 1.41 | 61.00 ± 1.41 |",
        "| snake | 2 | 71.00 ± 1.41 | 81.00 ± 1.41 |",
    ]
    (tmp_path / "out" / "snake-seed0" / "result.json").unlink()
    (tmp_path / "out" / "snake-seed0").rmdir()
    assert sweep(runs, KEY, tmp_path / "out") == table and trained[4:] == [("snake", 0)]
    (tmp_path / "out" / "raster-seed1" / "result.json").write_text(json.dumps({"top1": 1})[:5])
    with pytest.raises(UserError, match="result.json is damaged: delete it"):
        sweep(runs, KEY, tmp_path / "out")


def test_mistakes_are_found_before_the_first_run(recipe, tmp_path):
    def wrong(message, values, seeds=(0,), key=KEY):
        with pytest.raises(UserError, match=message):
            plan(recipe, key, values, seeds, [], tmp_path / "out")

    wrong("cannot be created with.*unknown scan path 'snak'", ["raster", "snak"])
    wrong("the value snake .* is given twice", ["snake", "raster", "snake"])
    wrong("the seed 3 .* is given twice", ["snake"], (3, 4, 3))
    wrong("takes values only; put section.key=value before it", ["snake", "optimizer.lr=1"])
    wrong("unknown config key 'optimizer.rate'", ["1"], key="optimizer.rate")
    wrong("out of range", ["-1"], key="optimizer.lr")
    assert not (tmp_path / "out").exists()


def test_not_under_torchrun(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        sweep(plan(recipe, KEY, ["raster"], [0], [], tmp_path), KEY, tmp_path)


def test_tool_without_values(recipe, capsys):
    code, _, stderr = run(recipe, "--vary", KEY, capsys=capsys)
    assert code == 2 and "--vary model.kwargs.paths needs one or more values" in stderr
