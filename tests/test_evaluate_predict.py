"""evaluate(), its pictures, and the two tools, on tiny timm models and real files."""

import csv
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vision_mamba.engine.evaluate import evaluate
from vision_mamba.engine.plots import plot_confusion, plot_contact_sheet, plot_curves
from vision_mamba.errors import run_main
from vision_mamba.files import replacing

TOOLS = Path(__file__).parents[1] / "tools"
CLASSES = ["blue", "green", "red"]


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments, capsys):
    """Exit code, stdout and stderr of a tool."""
    module = tool(name)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: module.main([str(a) for a in arguments]))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


class Fixed(torch.nn.Module):
    """Gives back logits stored in the images."""

    def forward(self, x):
        return x.flatten(1)


def by_hand(logits, targets):
    classes = logits.shape[1]
    confusion = np.zeros((classes, classes), int)
    top5 = 0
    for row, target in zip(logits, targets, strict=True):
        confusion[target, row.argmax()] += 1
        top5 += target in np.argsort(-row)[:5]
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return confusion, top5 / len(targets), -log_p[np.arange(len(targets)), targets].mean()


def example(classes=7, n=53):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes - 1, n)  # the last class never occurs
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), targets] += 1.5
    logits[:, 2] -= 50  # and class 2 is never predicted
    return logits, targets


def as_batches(logits, targets, size=8):
    x, y = torch.tensor(logits)[:, :, None, None], torch.tensor(targets)
    return list(zip(x.split(size), y.split(size), strict=True))


def check_against_hand(result, logits, targets):
    confusion, top5, loss = by_hand(logits, targets)
    assert result["confusion"].tolist() == confusion.tolist()
    assert result["images"] == len(targets)
    assert result["top1"] == pytest.approx(np.trace(confusion) / len(targets))
    assert result["top5"] == pytest.approx(top5)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    by_class = []
    for c, row in enumerate(result["per_class"]):
        hit, said, there = confusion[c, c], confusion[:, c].sum(), confusion[c].sum()
        precision, recall = hit / said if said else 0, hit / there if there else 0
        assert row["precision"] == pytest.approx(precision) and row["recall"] == pytest.approx(recall)
        by_class.append((precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0))
        both = precision + recall
        assert row["f1"] == pytest.approx(2 * precision * recall / both if both else 0)
        assert row["support"] == there
    # As scikit-learn and torchmetrics do: a class that neither occurs nor is predicted counts not at all.
    occurs = [c for c in range(len(confusion)) if confusion[c].sum() or confusion[:, c].sum()]
    for name, mean in zip(("precision", "recall", "f1"), np.mean([by_class[c] for c in occurs], axis=0), strict=True):
        assert result[name] == pytest.approx(mean)


def test_evaluate_agrees_with_a_count_by_hand():
    logits, targets = example()
    model = Fixed().train()
    result = evaluate(model, as_batches(logits, targets), num_classes=7, device="cpu", progress=False)
    check_against_hand(result, logits, targets)
    assert model.training and result["images_per_second"] > 0


@pytest.mark.parametrize("absent", [False, True], ids=["all classes", "one class absent"])
def test_macro_metrics_agree_with_torchmetrics(absent):
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

    logits, targets = example()
    if absent:
        logits[:, 6] -= 50
    result = evaluate(Fixed(), as_batches(logits, targets), num_classes=7, device="cpu", progress=False)
    check_against_hand(result, logits, targets)
    for name, metric in (
        ("precision", multiclass_precision),
        ("recall", multiclass_recall),
        ("f1", multiclass_f1_score),
    ):
        expected = metric(torch.tensor(logits), torch.tensor(targets), num_classes=7, average="macro").item()
        assert result[name] == pytest.approx(expected, rel=1e-6)


def test_top5_only_from_five_classes():
    batches = as_batches(np.eye(3, dtype=np.float32), np.arange(3))
    result = evaluate(Fixed(), batches, num_classes=3, device="cpu", progress=False)
    assert "top5" not in result and result["top1"] == 1


def _rank(rank, world, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    logits, targets = example()
    share = as_batches(logits[rank::world], targets[rank::world])
    result = evaluate(Fixed(), share, num_classes=7, device="cpu", progress=False)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_evaluate_over_two_ranks_counts_each_image_once(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (2, port, str(tmp_path)), nprocs=2, start_method="fork")
    logits, targets = example()
    for rank in range(2):
        check_against_hand(torch.load(tmp_path / f"{rank}.pt"), logits, targets)


# Pictures


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    rows = [{"epoch": str(e), "train_loss": 1 / e, "val_loss": "", "val_top1": e / 5, "lr": 1e-3} for e in (1, 2, 3)]
    plot_curves(rows, tmp_path / "curves.png")
    plot_confusion(torch.eye(60), [f"c{i}" for i in range(60)], tmp_path / "large.png")
    plot_confusion([[3, 1], [0, 0]], ["a", "b"], tmp_path / "small.png")
    plot_contact_sheet([Image.new("L", (9, 30))] * 7, ["a $_x$\nb"] * 7, tmp_path / "sheet.png")
    for name in ("curves", "large", "small", "sheet"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 200
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "small.png") as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert Image.open(tmp_path / "small.png").format == "PNG"
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "large.png", "sheet.png", "small.png"]


# Tools


@pytest.fixture
def data(tmp_path):
    """Nine single-colour images below data/val."""
    for c, name in enumerate(CLASSES):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for i in range(3):
            colour = [20 * i] * 3
            colour[2 - c] = 255
            Image.new("RGB", (40, 30), tuple(colour)).save(tmp_path / "data" / "val" / name / f"{name}{i}.png")
    return tmp_path / "data"


def save_checkpoint(path, *, arch="test_vit", classes=CLASSES, ema=True, source=None, **changes):
    torch.manual_seed(0)
    args = {"num_classes": len(classes), "in_chans": 3, "img_size": 64}
    model = timm.create_model(arch, **args)
    torch.nn.init.normal_(model.head.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    averaged = {k: v * (-1 if k.startswith("head") else 1) for k, v in state.items()}
    saved = {
        "format": "vision_mamba/1",
        "arch": arch,
        "model_args": args,
        "classes": list(classes),
        "data_config": {
            "input_size": [3, 64, 64],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
        "state_dict": state,
        "data": {"source": source},
        **({"state_dict_ema": averaged} if ema else {}),
        **changes,
    }
    torch.save(saved, path)
    return path, model.eval()


def expected_logits(model, files):
    """Without our transforms: single-colour images need no resizing, only normalisation."""
    rows = []
    for file in files:
        colour = np.array(Image.open(file).getpixel((0, 0)), dtype=np.float32) / 255
        rows.append(torch.tensor((colour - 0.5) / 0.5).view(3, 1, 1).expand(3, 64, 64))
    with torch.no_grad():
        return model(torch.stack(rows)).numpy()


@pytest.mark.parametrize("raw", [False, True], ids=["ema", "raw"])
def test_evaluate_tool(data, tmp_path, capsys, raw):
    checkpoint, model = save_checkpoint(tmp_path / "m.pth", source=str(data))
    flags = ["--no-ema"] if raw else []
    out = tmp_path / "report"
    code, stdout, stderr = run(
        "evaluate", checkpoint, "--workers", 0, "--device", "cpu", "--out", out, *flags, capsys=capsys
    )
    assert code == 0, stderr
    files = [f for name in CLASSES for f in sorted((data / "val" / name).iterdir())]
    logits = expected_logits(model, files) * (1 if raw else -1)
    confusion, _, loss = by_hand(logits, np.repeat(np.arange(3), 3))
    report = json.loads((out / "metrics.json").read_text())
    assert report["confusion"] == confusion.tolist()
    assert report["loss"] == pytest.approx(loss, rel=1e-3)
    assert report["top1"] == pytest.approx(np.trace(confusion) / 9)
    f1 = [2 * confusion[c, c] / max(confusion[c].sum() + confusion[:, c].sum(), 1) for c in range(3)]
    assert report["f1"] == pytest.approx(np.mean(f1)) and f"F1 {np.mean(f1):.2%}" in stdout
    assert f"top-1 {np.trace(confusion) / 9:.2%}" in stdout and "metrics.json" in stdout
    with open(out / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["class"] for r in rows] == CLASSES and [r["support"] for r in rows] == ["3"] * 3
    assert sorted(os.listdir(out)) == ["confusion.png", "metrics.json", "per_class.csv"]


def test_evaluate_other_image_size_and_official_style_file(data, tmp_path, capsys):
    checkpoint, _ = save_checkpoint(tmp_path / "m.pth", arch="test_vim", ema=False)
    code, _, stderr = run(
        "evaluate",
        checkpoint,
        "--data",
        data,
        "--img-size",
        96,
        64,
        "--workers",
        0,
        "--out",
        tmp_path / "a",
        capsys=capsys,
    )
    assert code == 0, stderr
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["input_size"] == [3, 96, 64]
    foreign = timm.create_model("test_vit", num_classes=3)
    torch.save({"model": foreign.state_dict()}, tmp_path / "official.pth")
    code, _, stderr = run(
        "evaluate", tmp_path / "official.pth", "--model", "test_vit", "--data", data, "--workers", 0, capsys=capsys
    )
    assert code == 0, stderr
    assert (tmp_path / "evaluation" / "confusion.png").is_file()


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_wrong_checkpoints_are_one_line_and_write_nothing(data, tmp_path, capsys, name):
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": timm.create_model("test_vit", num_classes=3).state_dict()}, tmp_path / "foreign.pth")
    torch.save({"model": timm.create_model("test_resnet", num_classes=3).state_dict()}, tmp_path / "resnet.pth")
    whole, _ = save_checkpoint(tmp_path / "own.pth")
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:5000])
    save_checkpoint(tmp_path / "lacks.pth", arch="test_vit")
    saved = torch.load(tmp_path / "lacks.pth")
    del saved["state_dict"]
    torch.save(saved, tmp_path / "lacks.pth")
    where = ["--data", data] if name == "evaluate" else [data]
    cases = [
        (["none.pth"], "none.pth does not exist"),
        (["text.pth"], "text.pth is not a readable checkpoint"),
        (["cut.pth"], "cut.pth is not a readable checkpoint"),
        (["list.pth"], "holds a list"),
        (["lacks.pth"], "lacks state_dict"),
        (["foreign.pth"], "--model"),
        (["foreign.pth", "--model", "test_vitt"], "did you mean 'test_vit'"),
        (["resnet.pth", "--model", "test_vit"], "resnet.pth"),
        (["own.pth", "--model", "test_vit2"], "checkpoint of test_vit, not of test_vit2"),
        (["own.pth", "--img-size", "65"], "65"),
        (["own.pth", "--device", "cpu", "--amp", "fp16"], "fp16"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in cases:
        code, _, err = run(name, tmp_path / arguments[0], *where, *arguments[1:], capsys=capsys)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (arguments, err)
        assert words in err, (arguments, err)
        assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_data_that_does_not_fit(data, tmp_path, capsys):
    other, _ = save_checkpoint(tmp_path / "other.pth", classes=["blue", "green", "rot"])
    code, _, err = run("evaluate", other, "--data", data, capsys=capsys)
    assert code == 2 and "'red'" in err and err.count("\n") == 1
    torch.save(timm.create_model("test_vit", num_classes=4).state_dict(), tmp_path / "four.pth")
    code, _, err = run("evaluate", tmp_path / "four.pth", "--model", "test_vit", "--data", data, capsys=capsys)
    assert code == 2 and "3 classes" in err and "head has 4" in err
    code, _, err = run("evaluate", other, capsys=capsys)
    assert code == 2 and "--data" in err
    assert not (tmp_path / "evaluation").exists()


def test_predict_goes_on_past_a_corrupt_image(data, tmp_path, capsys):
    checkpoint, model = save_checkpoint(tmp_path / "m.pth", ema=False)
    whole = (data / "val" / "red" / "red0.png").read_bytes()
    bad = data / "val" / "red" / "bad.png"
    bad.write_bytes(whole[: len(whole) // 2])
    code, _, stderr = run(
        "predict", checkpoint, data / "val" / "red", f"{data}/val/*/green?.png", "--topk", 2, "--batch-size", 2,
        "--out", tmp_path / "p", capsys=capsys,
    )  # fmt: skip
    assert code == 0
    assert stderr.startswith("skipped: cannot read image") and "bad.png" in stderr and stderr.count("\n") == 1
    report = json.loads((tmp_path / "p" / "predictions.json").read_text())
    names = [Path(p["image"]).name for p in report["predictions"]]
    assert names == [f"{c}{i}.png" for c in ("red", "green") for i in range(3)]
    assert [Path(s["image"]).name for s in report["skipped"]] == ["bad.png"]
    logits = expected_logits(model, [p["image"] for p in report["predictions"]])
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    for row, prediction in zip(p, report["predictions"], strict=True):
        order = np.argsort(-row)[:2]
        assert [t["index"] for t in prediction["topk"]] == order.tolist()
        assert [t["class"] for t in prediction["topk"]] == [CLASSES[i] for i in order]
        assert [t["score"] for t in prediction["topk"]] == pytest.approx(row[order].tolist(), abs=1e-3)
    with open(tmp_path / "p" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and [r["rank"] for r in rows[:2]] == ["1", "2"]
    assert sorted(os.listdir(tmp_path / "p")) == ["contact_sheet.png", "predictions.csv", "predictions.json"]


def test_predict_without_a_readable_image(data, tmp_path, capsys):
    checkpoint, _ = save_checkpoint(tmp_path / "m.pth")
    (tmp_path / "bad.png").write_bytes(b"x")
    code, _, err = run("predict", checkpoint, tmp_path / "bad.png", capsys=capsys)
    assert code == 2 and "none of the 1 images" in err
    (tmp_path / "empty").mkdir()
    for argument, words in ((tmp_path / "empty", "holds no images"), ("no/such*.png", "no image no/such*.png")):
        code, _, err = run("predict", checkpoint, argument, capsys=capsys)
        assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_help_has_an_example(name, capsys):
    code, out, _ = run(name, "--help", capsys=capsys)
    assert code == 0 and f"python tools/{name}.py" in out


def test_predict_at_another_size_with_a_model_of_any_size(data, tmp_path, capsys):
    """VMamba has no img_size argument; the size is the transform's alone."""
    torch.manual_seed(0)
    model = timm.create_model("test_vmamba", num_classes=len(CLASSES))
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    image = sorted(data.rglob("*.png"))[0]
    arguments = [tmp_path / "official.pth", image, "--model", "test_vmamba", "--img-size", "48", "80"]
    status, out, err = run("predict", *arguments, capsys=capsys)
    assert status == 0, err
    assert image.name in out
