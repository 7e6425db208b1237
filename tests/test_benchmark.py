"""The benchmark: rows, ratios, files; a model that fails does not end the rest. No time is asserted."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vision_mamba.engine import benchmark as module
from vision_mamba.engine.benchmark import Bench, benchmark, measure
from vision_mamba.errors import UserError, run_main

TOOL = Path(__file__).parents[1] / "tools" / "benchmark.py"


def run(*arguments, capsys):
    """Exit code, stdout and stderr of the tool."""
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: tool.main([str(a) for a in arguments]))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_tool(tmp_path, capsys):
    out = tmp_path / "bench"
    code, stdout, stderr = run(
        "test_vmamba", "--peer", "test_vit", "--img-size", 32, 64, "--batch-size", 2, 1, "--train", "--runs", 2,
        "--device", "cpu", "--out", out, capsys=capsys,
    )  # fmt: skip
    assert code == 0, stderr
    report = json.loads((out / "benchmark.json").read_text())
    rows = report["rows"]
    keys = [(r["size"], r["batch"], r["what"], r["model"]) for r in rows]
    names = ("test_vmamba", "test_vit")
    assert keys == [(*s, w, m) for s in ((32, 2), (64, 1)) for w in ("inference", "training") for m in names]
    assert report["versions"]["torch"] == torch.__version__ and "threads" in report["device"]
    for row, peer in zip(rows[::2], rows[1::2], strict=True):
        assert row["error"] is None and row["mode"] == "eager" and row["mib"] is None and row["memory_ratio"] is None
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["peer_images_per_s"] == peer["images_per_s"]
        assert row["speed_ratio"] == row["images_per_s"] / peer["images_per_s"] and peer["speed_ratio"] == 1
    with open(out / "benchmark.csv") as file:
        table = list(csv.DictReader(file))
    assert [float(r["speed_ratio"]) for r in table] == [r["speed_ratio"] for r in rows]
    assert Image.open(out / "benchmark.png").format == "PNG"
    assert sorted(p.name for p in out.iterdir()) == ["benchmark.csv", "benchmark.json", "benchmark.png"]
    assert all(f"{r['images_per_s']:.1f}" in stdout for r in rows)


def test_a_row_out_of_memory_is_reported_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    def forward(self, x):
        if x.shape[-1] > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return torch.zeros(len(x), 1, requires_grad=True)

    real = module.create_any_size

    def create(name, args):
        model = real(name, args)
        if name == "test_vit":
            model.forward = forward.__get__(model)
        return model

    monkeypatch.setattr(module, "create_any_size", create)
    code, stdout, stderr = run(
        "test_resnet", "--peer", "test_vit", "--img-size", 64, 32, "--runs", 1, "--device", "cpu", "--out", tmp_path,
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, stderr
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    errors = {(r["model"], r["size"]): r["error"] for r in rows}
    assert errors.pop(("test_vit", 64)) == "out of memory" and set(errors.values()) == {None} and len(errors) == 3
    assert [r["speed_ratio"] is None for r in rows] == [True, True, False, False]  # none without the peer's number
    assert stdout.count("out of memory") == 1


def test_a_size_that_a_model_refuses_is_a_row(capsys):
    rows = list(benchmark(["test_vim", "test_vmamba"], [(72, 1)], device="cpu", runs=1))
    assert [row["model"] for row in rows if row["error"]] == ["test_vim"] and "72" in rows[0]["error"]
    assert rows[1]["images_per_s"] > 0 and rows[1]["peer"] is None and rows[1]["speed_ratio"] is None


def test_checkpointing_is_of_training():
    rows = list(benchmark(["test_vim"], [(64, 1)], device="cpu", training=True, checkpointing=True, runs=1))
    modes = [(row["what"], row["mode"]) for row in rows if row["error"] is None]
    assert modes == [("inference", "eager"), *(("training", mode) for mode in ("eager", "checkpointed", "selective"))]


def test_turns():
    """Each runs as often as was asked for, in turns, after one run to warm up; `once` runs once in all."""
    order = []

    class Recorder(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append((self.name, self.training, torch.is_grad_enabled()))
            return x.clone().requires_grad_()

    x = torch.zeros(2, 1)
    found = measure(
        {n: lambda n=n: Bench(Recorder(n), x, training=n == "c", mode="eager") for n in "abc"}, 2, once="b"
    )  # fmt: skip
    assert "".join(name for name, *_ in order) == "ac" + "abc" + "ac"
    assert {(train, grad) for name, train, grad in order if name == "c"} == {(True, True)}
    assert {(train, grad) for name, train, grad in order if name != "c"} == {(False, False)}
    assert all(found[n]["images_per_s"] == pytest.approx(2e3 / found[n]["ms"]) for n in "abc")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["test_vmambaa"], "did you mean 'test_vmamba'"),
        (["test_vim", "--peer", "test_vitt"], "did you mean 'test_vit'"),
        (["test_vim", "--img-size", 32, 64, "--batch-size", 1, 2, 3], "3 values for 2 sizes"),
        (["test_vim", "--img-size", 0], "at least 1"),
        (["test_vim", "--graph"], "CUDA graphs need a GPU"),
        (["test_vim", "--checkpointing"], "give --train with --checkpointing"),
    ],
)
def test_mistakes_are_one_line_and_measure_nothing(tmp_path, capsys, arguments, words):
    code, _, err = run(*arguments, "--device", "cpu", "--out", tmp_path / "none", capsys=capsys)
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_unknown_model_is_known_at_once():
    with pytest.raises(UserError, match="no_such_model"):
        benchmark(["no_such_model"], [(32, 1)], device="cpu")  # before the first row is asked for


def test_two_processes_beside_one(tmp_path):
    out = tmp_path / "ddp.json"
    arguments = "--device cpu --models test_vim --size 64 --batch-size 2 --runs 2 --steps 1 --out".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "benchmarks.ddp", *arguments, str(out)],
        cwd=TOOL.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["processes"] == 2 and row["one_images_per_s"] > 0 and row["all_images_per_s"] > 0
    assert f"{row['all_images_per_s'] / row['one_images_per_s']:.2f}x" in done.stdout


def test_models_beside_each_peer(tmp_path):
    """A row for each of our models and each peer; what is committed is what the families' files give."""
    from benchmarks import models

    common = {"what": "training", "size": 224, "batch": 8, "mode": "compiled"}
    rows = [
        {**common, "model": "official", "error": "out of memory"},
        {**common, "model": "rsmamba_base", "images_per_s": 5.0, "mib": 7.0},
        {**common, "model": "deit_tiny_patch16_224", "images_per_s": 6.0, "mib": 8.0},
    ]
    report = {"device": "X", "torch": "2", "commit": "c", "command": "run", "date": "2026-01-02", "rows": rows}
    (tmp_path / "rsmamba-x1.json").write_text(json.dumps(report))
    (tmp_path / "vim-x1.json").write_text(json.dumps({**report, "date": "2026-01-01", "torch": "1", "rows": []}))
    found = models.with_peers("x1", tmp_path)
    assert (found["device"], found["torch"], found["date"]) == ("X", "2", "2026-01-02")
    ours = {"model": "rsmamba_base", "img_size": 224, "batch": 8, "mode": "training", "compiled": True}
    assert [row["peer"] for row in found["rows"]] == ["official", "deit_tiny_patch16_224"]
    assert all(ours.items() <= row.items() and row["images_per_s"] == 5.0 for row in found["rows"])
    assert found["rows"][0]["error"] == "out of memory" and found["rows"][0]["peer_images_per_s"] is None
    assert (found["rows"][1]["peer_images_per_s"], found["rows"][1]["peer_peak_mib"]) == (6.0, 8.0)
    for device in ("h100", "h200", "cpu"):
        recorded = json.loads((models.RESULTS / f"models-{device}.json").read_text())
        assert recorded == models.with_peers(device), f"models-{device}.json is stale"
