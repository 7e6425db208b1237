"""Sweeps: two path sets on the built-in images, restarted; several at once; the table; wrong input before training."""

import csv
import json
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from vision_mamba.engine import sweep as module
from vision_mamba.engine.config import config_to_dict
from vision_mamba.engine.sweep import plan, read_variants, sweep, vary
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
    assert "snake-seed0: done before" in stdout and "[1/1] model.kwargs.paths [hilbert, local2_reverse]" in stdout
    assert stdout.count("M parameters, ") == 1 and f"written to {output}: runs.csv, table.md" in stdout

    rows = list(csv.DictReader((output / "runs.csv").open()))
    assert [(row[KEY], row["seed"], row["folder"]) for row in rows] == [
        ("snake", "0", "snake-seed0"),
        ("[hilbert, local2_reverse]", "0", "hilbert-local2_reverse-seed0"),
    ]
    for row in rows:
        log = list(csv.DictReader((output / row["folder"] / "log.csv").open()))
        assert float(row["top1"]) == pytest.approx(float(log[-1]["val_top1"]), abs=1e-6)
        assert float(row["f1"]) == pytest.approx(float(log[-1]["val_f1"]), abs=1e-6)
        assert float(row["train_loss"]) == float(log[-1]["train_loss"])
        assert float(row["images_per_s"]) == float(log[-1]["images_per_s"])
        config = yaml.safe_load((output / row["folder"] / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == 2e-3 and config["train"]["seed"] == 0
    assert config["model"]["kwargs"] == {"embed_dim": 16, "depth": 2, "paths": ["hilbert", "local2_reverse"]}
    table = (output / "table.md").read_text()
    assert table in stdout and f"| snake | 1 | {100 * float(rows[0]['top1']):.2f} |" in table

    # Another recipe in the same folder would mix runs that are not comparable.
    code, _, stderr = run(recipe, "optimizer.lr=1e-3", *arguments[2:], capsys=capsys)
    assert code == 2 and "snake-seed0 holds a run of another configuration (optimizer.lr differ)" in stderr


def test_seeds_come_after_variants_and_are_averaged(recipe, tmp_path, monkeypatch):
    trained = []

    def train(config, output, resume):
        assert resume == "auto"
        trained.append((config.model.kwargs["paths"], config.train.seed))
        top1 = {"raster": 0.5, "snake": 0.7}[config.model.kwargs["paths"]] + 0.02 * config.train.seed
        output.mkdir(parents=True)
        return {
            "last": {"top1": top1, "f1": top1 - 0.1, "loss": 1.0},
            "best": {"top1": top1 + 0.1, "f1": top1},
            "best_epoch": 1,
            "train_loss": 2.0 + config.train.seed,
            "images_per_s": 1000.0 + 100 * config.train.seed,
            "parameters": 1_230_000,
        }

    monkeypatch.setattr(module, "train", train)
    runs = plan(recipe, vary(KEY, ["raster", "snake"]), [0, 1], [], tmp_path / "out")
    table = sweep(runs, KEY, tmp_path / "out")
    assert trained == [("raster", 0), ("snake", 0), ("raster", 1), ("snake", 1)]
    # The standard deviation of 50 and 52, of two values: sqrt(2).
    rest = "2.5000 ± 0.7071 | 1.23 | 1050 ± 71 |"
    assert table.splitlines()[2:] == [
        f"| raster | 2 | 51.00 ± 1.41 | 41.00 ± 1.41 | 61.00 ± 1.41 | {rest}",
        f"| snake | 2 | 71.00 ± 1.41 | 61.00 ± 1.41 | 81.00 ± 1.41 | {rest}",
    ]
    assert {line.count("|") for line in table.splitlines()} == {9}
    (tmp_path / "out" / "snake-seed0" / "result.json").unlink()
    (tmp_path / "out" / "snake-seed0").rmdir()
    assert sweep(runs, KEY, tmp_path / "out") == table and trained[4:] == [("snake", 0)]
    (tmp_path / "out" / "raster-seed1" / "result.json").write_text(json.dumps({"top1": 1})[:5])
    with pytest.raises(UserError, match="result.json is damaged: delete it"):
        sweep(runs, KEY, tmp_path / "out")


VARIANTS = {
    "deit": {"model.name": "test_vit", "model.kwargs": {"patch_size": 8}},
    "wide": {"model.name": "test_vit", "model.kwargs": {"embed_dim": 96}},
    "none": {},
}


@pytest.fixture
def one_thread(monkeypatch):
    """In this process and those it starts: sums over other numbers of threads have other bits."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_several_at_once_are_the_same_runs(recipe, tmp_path, capfd, one_thread):
    """Also variants of several keys, and a run whose loss is infinite from the start."""
    file = tmp_path / "variants.yaml"
    file.write_text(yaml.safe_dump(VARIANTS, sort_keys=False))
    assert list(read_variants(file)) == ["deit", "wide", "none"]
    variants = read_variants(file, ["wide", "deit"])
    overrides = ["data.num_workers=0"]
    one = sweep(plan(recipe, variants, [0], overrides, tmp_path / "one"), "variant", tmp_path / "one")
    capfd.readouterr()

    broken = {**variants, "broken": ["optimizer.lr=1e30", "schedule.epochs=2"]}
    runs = plan(recipe, broken, [0], overrides, tmp_path / "two")
    with pytest.raises(
        UserError, match=r"1 of 3 runs failed .*table.md.; broken-seed0: training stopped at .*loss nan"
    ):
        sweep(runs, "variant", tmp_path / "two", jobs=2, every_s=0.5)
    shown = capfd.readouterr().out
    assert "wide-seed0: done" in shown and "broken-seed0: failed: training stopped" in shown
    assert "0/3 done; wide-seed0 0/1, deit-seed0 0/1" in shown  # and nothing that the runs themselves print
    assert "M parameters" not in shown and "M parameters" in (tmp_path / "two" / "wide-seed0.txt").read_text()

    rows = [list(csv.DictReader((tmp_path / name / "runs.csv").open())) for name in ("one", "two")]
    for both in rows:
        for row in both:
            del row["images_per_s"]
    assert rows[0] == rows[1] and [row["variant"] for row in rows[0]] == ["wide", "deit"]
    assert rows[0][0]["parameters"] != rows[0][1]["parameters"]
    assert one.splitlines()[:2] == (tmp_path / "two" / "table.md").read_text().splitlines()[:2]


@pytest.mark.slow
def test_a_run_ends_with_the_sweep_that_started_it(recipe, tmp_path):
    """However that ends: a killed process closes its pipes."""
    (run,) = plan(recipe, {"long": ["schedule.epochs=100000"]}, [0], [], tmp_path)
    process = module._start(run, 0, 1)
    for _ in range(600):
        if module._epochs(run):
            break
        time.sleep(0.2)
    assert process.poll() is None and module._epochs(run)
    process.stdin.close()
    assert process.wait(30) == 1
    assert module._error(run, -9).startswith("killed by signal 9")


def test_jobs_take_the_gpus_in_turn(recipe, tmp_path, monkeypatch):
    started = []

    class Process:
        returncode = 0

        def __init__(self, command, env, **_):
            started.append((Path(command[-1]).name, env.get("CUDA_VISIBLE_DEVICES")))

        def poll(self):
            return 0

    monkeypatch.setattr(module.subprocess, "Popen", Process)
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(module, "_write_table", lambda *_: None)
    (tmp_path / "table.md").write_text("")
    for visible, expected in ((None, ["0", "1", "0", "1"]), ("5,GPU-7", ["5", "GPU-7", "5", "GPU-7"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        started.clear()
        runs = plan(recipe, vary("optimizer.lr", ["1", "2", "3", "4"]), [0], ["train.device=auto"], tmp_path)
        sweep(runs, "optimizer.lr", tmp_path, jobs=4)
        assert [device for _, device in started] == expected
        assert [name for name, _ in started] == ["1-seed0", "2-seed0", "3-seed0", "4-seed0"]


def test_mistakes_are_found_before_the_first_run(recipe, tmp_path):
    def wrong(message, values, seeds=(0,), key=KEY):
        with pytest.raises(UserError, match=message):
            plan(recipe, vary(key, values), seeds, [], tmp_path / "out")

    wrong("cannot be created with.*unknown scan path 'snak'", ["raster", "snak"])
    wrong("the value snake .* is given twice", ["snake", "raster", "snake"])
    wrong("the seed 3 is given twice", ["snake"], (3, 4, 3))
    wrong("takes values only; put section.key=value before it", ["snake", "optimizer.lr=1"])
    wrong("unknown config key 'optimizer.rate'", ["1"], key="optimizer.rate")
    wrong("out of range", ["-1"], key="optimizer.lr")
    assert not (tmp_path / "out").exists()


def test_mistakes_in_variants_are_found_before_the_first_run(recipe, tmp_path):
    file = tmp_path / "variants.yaml"

    def wrong(message, tree, *names):
        file.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        with pytest.raises(UserError, match=message) as caught:
            plan(recipe, read_variants(file, names), [0], [], tmp_path / "out")
        assert "\n" not in str(caught.value)

    wrong("variants.yaml cannot be read", "{")
    wrong("must map names to keys", "[a, b]")
    wrong("must map names to keys", {"a": 3})
    wrong("has no variant 'dei'; did you mean 'deit'", VARIANTS, "dei")
    wrong("unknown config key 'model.nam'", {"a": {"model.nam": "x"}})
    wrong("unknown model.name 'test_vitt'", {"a": {"model.name": "test_vitt"}})
    wrong("the variant a-b is given twice", {"a b": {}, "a/b": {}})
    file.unlink()
    with pytest.raises(UserError, match="variants.yaml cannot be read"):
        read_variants(file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["aid128_models", "aid128_rsmamba_ablation"])
def test_the_comparison_at_128_pixels_can_be_built(name, tmp_path):
    configs = Path(__file__).parents[1] / "configs"
    variants = read_variants(configs / "variants" / f"{name}.yaml")
    recipe = configs / "classification" / "aid128_comparison.yaml"
    runs = plan(recipe, variants, [0, 1, 2], ["data.source=somewhere"], tmp_path / "out")
    assert len(runs) == 3 * len(variants)
    # They differ in the model alone: one recipe for all.
    trees = [{**config_to_dict(run.config), "model": None} for run in runs[: len(variants)]]
    assert all(tree == trees[0] for tree in trees)
    models = [{**config_to_dict(run.config)["model"], "name": None, "kwargs": None} for run in runs]
    assert all(model == models[0] for model in models)


def test_not_under_torchrun(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        sweep(plan(recipe, vary(KEY, ["raster"]), [0], [], tmp_path), KEY, tmp_path)


def test_tool_without_values(recipe, capsys):
    code, _, stderr = run(recipe, "--vary", KEY, capsys=capsys)
    assert code == 2 and "--vary model.kwargs.paths needs one or more values" in stderr
    code, _, stderr = run(recipe, "--vary", KEY, "raster", "--jobs", 0, capsys=capsys)
    assert code == 2 and "--jobs must be at least 1" in stderr
    code, _, stderr = run(recipe, "--variants", "nowhere.yaml", capsys=capsys)
    assert code == 2 and "variants file nowhere.yaml cannot be read" in stderr
