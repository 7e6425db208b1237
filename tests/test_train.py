"""The training loop: what a run writes, exact resumption, wrong input, several processes. All of it tiny."""

import csv
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vision_mamba.engine import build, checkpoint, evaluate
from vision_mamba.engine.checkpoint import read_training_state
from vision_mamba.engine.config import load_config
from vision_mamba.engine.train import train
from vision_mamba.errors import UserError

TOOL = Path(__file__).parents[1] / "tools" / "train.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SETTINGS = {
    "model": {"name": "test_vit", "img_size": 32, "drop_path_rate": 0.1},
    "data": {"batch_size": 8, "num_workers": 0},
    "augment": {"mixup": 0.2, "cutmix": 0.5, "color_jitter": 0.3, "reprob": 0.3},
    "schedule": {"epochs": 2, "warmup_epochs": 1},
    "train": {"device": "cpu", "ema_decay": 0.9, "accumulate": 2, "checkpoint_every": 1},
    "output": {"tensorboard": False, "plots": False},
}


@pytest.fixture(autouse=True)
def one_thread():
    # Sums are split by thread: runs that are compared bit for bit must agree on their number.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_images(root, classes=3, train=16, val=7):
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., label % 3] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def settings(tmp_path, images):
    """Path of a configuration file for the tiny run."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "data": {**SETTINGS["data"], "source": str(images)}}))
    return path


def run(settings, output, *overrides, resume=None):
    return train(load_config(settings, overrides), Path(output), resume=resume)


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def differences(a, b, name=""):
    """Names of the leaves in which two nested structures differ, tensors compared bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        return [d for k in a.keys() | b.keys() for d in differences(a.get(k), b.get(k), f"{name}.{k}")]
    if isinstance(a, list):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}[{i}]")]
    return [] if a == b else [name]


def test_a_run_writes_everything(settings, tmp_path, capsys):
    result = run(settings, tmp_path / "out", "output.tensorboard=true", "output.plots=true", "train.knn_baseline=true")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "best.pth", "last.pth", "config.yaml", "log.csv", "per_class.csv", "curves.png", "confusion.png", "tensorboard",
    }  # fmt: skip
    rows = read_log(tmp_path / "out")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[1]["ema_top1"]) == result["last"]["top1"]

    last, best = read(tmp_path / "out" / "last.pth"), read(tmp_path / "out" / "best.pth")
    assert last["format"] == "vision_mamba/1"
    assert last["arch"] == "test_vit"
    assert last["model_args"] == {"img_size": 32, "in_chans": 3, "num_classes": 3}
    assert last["classes"] == ["class0", "class1", "class2"]
    assert last["data_config"]["input_size"] == [3, 32, 32]
    assert last["epoch"] == 2
    assert "optimizer" not in best
    assert not differences(last["state_dict_ema"], best["state_dict_ema"])
    shown = capsys.readouterr().out
    assert "nearest neighbours" in shown
    assert "written to" in shown


def test_a_finished_run_without_its_log_is_reported_again(settings, tmp_path):
    """As when last.pth alone was copied from another machine."""
    first = run(settings, tmp_path / "out")
    (tmp_path / "out" / "log.csv").unlink()
    again = run(settings, tmp_path / "out", resume="auto")
    assert again["last"]["top1"] == first["last"]["top1"] and again["train_loss"] is None


def test_killed_runs_end_with_the_same_weights(settings, tmp_path):
    overrides = ["schedule.epochs=20"]
    run(settings, tmp_path / "whole", *overrides)
    out = tmp_path / "killed"
    # Images from memory are the same images, and where they come from may change.
    command = [sys.executable, TOOL, settings, *overrides, "data.cache=true", "--output", out, "--resume", "auto"]
    rng = random.Random(0)
    stops = []
    for _ in range(3):
        with open(tmp_path / "stderr", "w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=ENVIRONMENT)
        before = (out / "last.pth").stat().st_mtime_ns if (out / "last.pth").exists() else 0
        while not (out / "last.pth").exists() or (out / "last.pth").stat().st_mtime_ns == before:
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        state = read(out / "last.pth")
        stops.append((state["epoch"], state["step_in_epoch"]))
    assert stops == sorted(stops)
    assert stops[-1] < (20, 0)
    # What a writer killed in mid-write leaves, whether or not one of the above was.
    (out / ".last.77.pth").write_bytes(b"half a file")
    with open(out / "log.csv", "a") as log:
        log.write("19,0.00")
    run(settings, out, *overrides, resume="auto")

    whole, killed = read(tmp_path / "whole" / "last.pth"), read(out / "last.pth")
    assert not differences(whole, killed)
    assert not differences(read(tmp_path / "whole" / "best.pth"), read(out / "best.pth"))
    assert not list(out.glob(".*"))
    logs = [read_log(tmp_path / "whole"), read_log(out)]
    for row in (row for log in logs for row in log):
        del row["images_per_s"]
    assert logs[0] == logs[1]


def test_two_processes_do_not_write_to_one_run(settings, tmp_path):
    command = [sys.executable, TOOL, settings, "--output", tmp_path / "out", "--resume", "auto"]
    holder = "import sys; from vision_mamba.files import only_writer\nwith only_writer(sys.argv[1]): print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    ) as first:
        first.stdout.readline()
        second = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert second.returncode == 2 and f"another process is writing to {tmp_path / 'out'}: wait" in second.stderr
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".writer"]
        first.kill()
    run(settings, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def test_rare_saves_end_with_the_same_weights(settings, tmp_path, monkeypatch):
    overrides = ["schedule.epochs=5", "train.checkpoint_every=null", "train.eval_every=2"]
    whole = run(settings, tmp_path / "whole", *overrides)
    assert whole["train_loss"] == float(read_log(tmp_path / "whole")[-1]["train_loss"])
    assert whole["parameters"] == sum(v.numel() for v in read(tmp_path / "whole" / "last.pth")["state_dict"].values())

    saved = []
    original = checkpoint.save_checkpoint

    def save(state, path):
        original(state, path)
        saved.append((path.name, state["epoch"]))
        if saved[-1] == ("last.pth", 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    # Top-1 reaches 100 % at once and the loss goes on falling: both evaluations before the last epoch are the best.
    out = tmp_path / "rare"
    with pytest.raises(KeyboardInterrupt):
        run(settings, out, *overrides, "train.save_every=100")
    assert [epoch for name, epoch in saved if name == "last.pth"] == [2, 4]
    run(settings, out, *overrides, "train.save_every=100", resume="auto")
    assert saved[-1] == ("last.pth", 5)
    assert not differences(*(read(folder / "last.pth")["state_dict_ema"] for folder in (tmp_path / "whole", out)))
    assert [row["epoch"] for row in read_log(out)] == ["1", "2", "3", "4", "5"]


def test_resume_refuses_another_run(settings, tmp_path):
    out = tmp_path / "out"
    run(settings, out)
    with pytest.raises(UserError, match=r"already holds a run.*--resume auto.*--output"):
        run(settings, out)
    with pytest.raises(UserError, match=r"these keys differ: optimizer\.lr, train\.seed"):
        run(settings, out, "optimizer.lr=0.5", "train.seed=3", resume="auto")
    with pytest.raises(UserError, match="holds weights only"):
        run(settings, tmp_path / "new", resume=str(out / "best.pth"))
    with pytest.raises(UserError, match="checkpoint not found"):
        run(settings, tmp_path / "new", resume=str(tmp_path / "nowhere.pth"))
    (tmp_path / "cut.pth").write_bytes((out / "last.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.pth cannot be read"):
        run(settings, tmp_path / "new", resume=str(tmp_path / "cut.pth"))
    assert not (tmp_path / "new").exists()
    before = read(out / "last.pth")
    run(settings, out, "train.checkpoint_every=null", "data.eval_batch_size=3", resume="auto")
    assert not differences(before["state_dict"], read(out / "last.pth")["state_dict"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=test_vitt", r"unknown model\.name 'test_vitt'; did you mean 'test_vit"),
        ("model.img_size=40", "40 is not divisible by the patch size 16"),
        ("model.num_classes=5", r"model\.num_classes=5, but the data has 3 classes"),
        ("model.kwargs={depht: 3}", "depht"),
        ("model.freeze=[nothing]", "'nothing' matches no parameter"),
        ("model.freeze=['*']", "leaves nothing to train"),
        ("model.checkpoint=nowhere.pth", r"nowhere\.pth"),
        ("optimizer.name=adamx", r"unknown optimizer\.name 'adamx'"),
        ("optimizer={name: grouped_muon, layer_decay: 0.7}", r"layer_decay does not go with grouped_muon"),
        ("augment.auto_augment=rond-m9", "auto_augment"),
        ("data.source=nowhere", "nowhere"),
        ("data.batch_size=64", "batch_size"),
        ("train.amp=fp16", "fp16 needs a GPU"),
        ("train.cuda_graphs=true", "cuda_graphs needs a GPU"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(settings, tmp_path, override, message):
    with pytest.raises(UserError, match=message) as caught:
        run(settings, tmp_path / "out", override)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_data_is_named_and_nothing_is_written(settings, tmp_path):
    empty = make_images(tmp_path / "empty", train=8, val=1)
    (empty / "train" / "class9").mkdir()
    with pytest.raises(UserError, match="class9"):
        run(settings, tmp_path / "out", f"data.source={empty}")
    cut = make_images(tmp_path / "cut", train=8, val=1)
    path = cut / "train" / "class1" / "3.png"
    path.write_bytes(path.read_bytes()[:700])
    for cache in ("false", "true"):
        with pytest.raises(UserError, match=r"class1/3\.png"):
            run(settings, tmp_path / "out", f"data.source={cut}", f"data.cache={cache}")
    assert not (tmp_path / "out").exists()


def test_tool_exits_with_2_and_one_line(settings, tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOL), run_name="__main__")
        return caught.value.code, capsys.readouterr()

    code, shown = call(settings, "--output", tmp_path / "out", "optimizer.rl=1")
    assert code == 2
    assert shown.err == "error: unknown config key 'optimizer.rl'; did you mean 'optimizer.lr'?\n"
    code, shown = call("--help-config")
    assert code == 0
    assert "optimizer.layer_decay" in shown.out


def test_a_loss_that_is_not_finite_stops_the_run(settings, tmp_path, monkeypatch):
    original = build.build_loss

    def breaking(config, num_classes):
        mixup, criterion = original(config, num_classes)
        calls = []

        def loss(logits, targets):
            calls.append(1)
            return criterion(logits, targets) * (float("nan") if len(calls) > 8 else 1.0)

        return mixup, loss

    monkeypatch.setattr(build, "build_loss", breaking)
    with pytest.raises(
        UserError, match=r"epoch 2, batch 4 of 6: loss nan, lr .*first non-finite gradient: .*Try a lower"
    ):
        run(settings, tmp_path / "out")
    state = read_training_state(tmp_path / "out" / "last.pth")
    assert (state["epoch"], state["step_in_epoch"]) == (1, 2)
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values())


def test_accumulation_is_a_larger_batch(settings, tmp_path):
    plain = ["augment.mixup=0", "augment.cutmix=0", "model.drop_path_rate=0", "train.ema_decay=null"]
    run(settings, tmp_path / "one", *plain, "data.batch_size=16", "train.accumulate=1")
    run(settings, tmp_path / "two", *plain, "data.batch_size=8", "train.accumulate=2")
    one, two = (read(tmp_path / name / "last.pth")["state_dict"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_fine_tuning_takes_the_trunk_and_leaves_frozen_parts(settings, tmp_path):
    model = ["model.name=vim_nano", "train.ema_decay=null", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    run(settings, tmp_path / "first", *model)
    five = make_images(tmp_path / "five", classes=5, train=8, val=2)
    start = f"model.checkpoint={tmp_path / 'first' / 'best.pth'}"
    tuning = ["model.freeze=[patch_embed]", "model.grad_checkpointing=selective", "optimizer.layer_decay=0.7"]
    run(settings, tmp_path / "second", *model, start, *tuning, f"data.source={five}", "train.amp=bf16")
    first, second = (read(tmp_path / name / "best.pth")["state_dict"] for name in ("first", "second"))
    frozen = [name for name in first if name.startswith("patch_embed")]
    assert frozen
    assert all(torch.equal(first[name], second[name]) for name in frozen)
    assert second["head.weight"].shape[0] == 5
    moved = [n for n in first if first[n].shape == second[n].shape and not torch.equal(first[n], second[n])]
    assert moved
    # The trunk was carried over: it is near where it was, not newly drawn.
    name = next(n for n in moved if first[n].ndim == 2)
    assert (first[name] - second[name]).abs().max() < 0.1 * first[name].abs().max()

    with pytest.raises(UserError, match=r"best\.pth"):
        run(settings, tmp_path / "third", start)  # the same file into a test_vit
    assert not (tmp_path / "third").exists()


def in_two_processes(settings, out, *overrides, env):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [*start, TOOL, settings, *overrides, "data.batch_size=4", "--output", out],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_and_count_as_one(settings, tmp_path, images):
    out = tmp_path / "out"
    in_two_processes(settings, out, "schedule.epochs=2", env=ENVIRONMENT)
    rows = read_log(out)
    state = read(out / "last.pth")
    config = load_config(settings)
    train_set, val_set = build.open_data(config)
    model, _ = build.build_model(config, 3, pretrained=False)
    model.load_state_dict(state["state_dict_ema"])
    _, loader = build.build_loaders(
        config, state["data_config"], train_set, val_set, torch.device("cpu"), rank=0, world_size=1
    )
    result = evaluate.evaluate(model, loader, num_classes=3, device="cpu", progress=False)
    assert result["images"] == len(val_set) == 21  # odd: shares of 11 and 10
    assert result["top1"] == pytest.approx(float(rows[-1]["ema_top1"]))
    assert result["loss"] == pytest.approx(float(rows[-1]["ema_loss"]), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["test_rsmamba", "test_vmamba", "test_resnet"])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_cuda_graphs_train_as_without(settings, tmp_path, model, amp):
    """Random paths, drop path, and the running statistics of batch norm (test_resnet) among it."""
    options = [f"model={{name: {model}, img_size: 32, drop_path_rate: 0.1}}", "train.device=cuda", f"train.amp={amp}"]
    if model == "test_resnet":
        options[0] = "model={name: test_resnet, img_size: 32}"
    plain = run(settings, tmp_path / "plain", *options)
    replayed = run(settings, tmp_path / "replayed", *options, "train.cuda_graphs=true")
    tolerance = 1e-4 if amp == "none" else 1e-2
    assert replayed["train_loss"] == pytest.approx(plain["train_loss"], rel=tolerance)
    ours, theirs = (read(tmp_path / name / "last.pth")["state_dict"] for name in ("replayed", "plain"))
    for name, value in theirs.items():
        error = (ours[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-3)
        assert error < 10 * tolerance, f"{name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("model", ["test_vmamba", "test_resnet"])
def test_cuda_graphs_of_two_processes_train_as_without(settings, tmp_path, model):
    """Gradients are averaged after both batches of a step; test_resnet's batch norms get the first process's buffers.

    Images of 128 pixels, and no Adam: of few pixels batch norm, and of small gradients Adam, makes much of rounding.
    Biases start at zero, so they are nothing but updates; without graphs two such runs differ by 1e-3 in them (H200).
    """
    options = [f"model={{name: {model}, img_size: 128}}", "train.device=cuda", "optimizer={name: sgd, lr: 0.02}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, more in (("plain", []), ("replayed", ["train.cuda_graphs=true"])):
        in_two_processes(settings, tmp_path / name, *options, *more, env=env)
    ours, theirs = (read(tmp_path / name / "last.pth")["state_dict"] for name in ("replayed", "plain"))
    for name, value in theirs.items():
        error = (ours[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-3)
        assert error < 1e-2, f"{name}: {error:.1e}"
