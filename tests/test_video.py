"""Clips: reading video files, and naming them with tools/predict.py."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.test_evaluate_predict import CLASSES, run, save_checkpoint
from vision_mamba.data import is_video_name, read_clip
from vision_mamba.data.video import frame_indices
from vision_mamba.errors import UserError

av = pytest.importorskip("av", reason="videos are read by PyAV, which is not installed")


def write_video(path, frames, *, codec="ffv1", pix_fmt="bgr0"):
    """Pictures (height, width, 3) uint8 -> a file; the default codec loses nothing."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def plain(colours, height=48, width=64):
    return [np.full((height, width, 3), colour, np.uint8) for colour in colours]


def test_frame_indices_are_the_middles_of_equal_parts():
    assert frame_indices(12, 4) == [1, 4, 7, 10]
    assert frame_indices(3, 6) == [0, 0, 1, 1, 2, 2]
    for count in range(2, 40):
        for n in (1, 4, 8, 16):
            # The official rule for Something-Something V2, in numbers with a fraction.
            assert frame_indices(count, n) == [int(count / n / 2 + count / n * i + 1e-9) for i in range(n)]


@pytest.mark.parametrize("count", [2, 12, 31])
def test_reads_the_right_frames_exactly(tmp_path, count):
    colours = [(8 * i, 255 - 8 * i, 3) for i in range(count)]
    path = write_video(tmp_path / "clip.mkv", plain(colours))
    frames = read_clip(path, 4)
    assert [f.mode for f in frames] == ["RGB"] * 4 and frames[0].size == (64, 48)
    assert [f.getpixel((5, 5)) for f in frames] == [colours[i] for i in frame_indices(count, 4)]


@pytest.mark.parametrize(("matrix", "expected"), [((0, 1, -1, 0), "lower right"), ((0, -1, 1, 0), "upper left")])
def test_turns_pictures_upright(tmp_path, matrix, expected):
    """A phone's file: the same pictures, and a matrix in the track's header: x, y -> a x + c y, b x + d y."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, 32:] = 255  # upper right
    path = write_video(tmp_path / "clip.mp4", [picture] * 4, codec="mpeg4", pix_fmt="yuv420p")
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (int(v * 2**16).to_bytes(4, "big", signed=True) for v in matrix)
    data[start : start + 20] = a + b + bytes(4) + c + d
    path.write_bytes(data)
    frame = np.asarray(read_clip(path, 1)[0].convert("L"))
    assert frame.shape == (64, 48)
    quarters = {
        "upper left": frame[:28, :20], "upper right": frame[:28, 28:], "lower left": frame[36:, :20], "lower right": frame[36:, 28:],
    }  # fmt: skip
    assert max(quarters, key=lambda name: quarters[name].mean()) == expected


def test_files_that_are_no_clips_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    whole = write_video(tmp_path / "whole.mp4", plain([9] * 8), codec="mpeg4", pix_fmt="yuv420p").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    for name, words in (("text.mp4", "Invalid data"), ("cut.mp4", "frames in it: 0"), ("still.png", "frames in it: 1")):
        with pytest.raises(UserError, match=f"cannot read video .*{name}: .*{words}"):
            read_clip(tmp_path / name, 4)


def test_video_names():
    assert is_video_name("a/b.MP4") and is_video_name("b.webm")
    assert not is_video_name("b.png") and not is_video_name("mp4") and not is_video_name(".b.mp4")


@pytest.fixture
def videos(tmp_path):
    """Two videos of single colours that change with time, and a file that is none, below clips/."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, channel in (("one", 0), ("two", 2)):
        colours = [tuple(20 * i if c == channel else 255 for c in range(3)) for i in range(12)]
        write_video(folder / f"{name}.mkv", plain(colours))
    (folder / "bad.mp4").write_text("hello")
    (folder / "notes.txt").write_text("no video")
    return folder


def expected_scores(model, channel):
    """Without our reader and transforms: single-colour frames need no resizing, only normalisation."""
    frames = []
    for i in (1, 4, 7, 10):
        colour = np.array([20 * i if c == channel else 255 for c in range(3)], np.float32) / 255
        frames.append(torch.tensor((colour - 0.5) / 0.5).view(3, 1, 1).expand(3, 64, 64))
    with torch.no_grad():
        return model(torch.stack(frames, 1)[None]).softmax(-1)[0]


def test_predict_names_videos(videos, tmp_path, capsys):
    checkpoint, model = save_checkpoint(tmp_path / "m.pth", arch="test_videomamba_f4", ema=False)
    code, out, err = run("predict", checkpoint, videos, "--device", "cpu", "--out", tmp_path / "p", capsys=capsys)
    assert code == 0, err
    assert err.startswith("skipped: cannot read video") and "bad.mp4" in err and err.count("\n") == 1
    assert "2 videos, 1 skipped" in out
    report = json.loads((tmp_path / "p" / "predictions.json").read_text())
    for prediction, (name, channel) in zip(report["predictions"], (("one", 0), ("two", 2)), strict=True):
        assert prediction["image"].endswith(f"{name}.mkv")
        expected = expected_scores(model, channel)
        order = expected.argsort(descending=True).tolist()
        assert [t["class"] for t in prediction["topk"]] == [CLASSES[i] for i in order]
        assert [t["score"] for t in prediction["topk"]] == pytest.approx(expected[order].tolist(), abs=1e-4)
    with open(tmp_path / "p" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and [r["rank"] for r in rows[:3]] == ["1", "2", "3"]
    assert (tmp_path / "p" / "contact_sheet.png").is_file()


def test_predict_with_published_weights_and_another_size(videos, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_videomamba_f4", num_classes=6)
    torch.save(model.state_dict(), tmp_path / "official.pth")
    arguments = [tmp_path / "official.pth", videos / "one.mkv", "--model", "test_videomamba_f4", "--img-size", 32, 48]
    code, out, err = run("predict", *arguments, capsys=capsys)
    assert code == 0 and "one.mkv" in out, err


def test_tools_refuse_what_they_cannot_do(videos, tmp_path, capsys, monkeypatch):
    checkpoint, _ = save_checkpoint(tmp_path / "m.pth", arch="test_videomamba_f4", ema=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    grey = save_checkpoint(tmp_path / "size.pth", arch="test_videomamba_f4", ema=False)[0]
    cases = [
        (["predict", checkpoint, empty], "holds no videos"),
        (["predict", checkpoint, "no/such*.mp4"], "no video no/such*.mp4"),
        (["predict", grey, videos, "--img-size", 50], "50"),
        (["evaluate", checkpoint, "--data", videos], "clips of 4 frames"),
    ]
    for arguments, words in cases:
        code, _, err = run(*arguments, capsys=capsys)
        assert code == 2 and words in err and err.count("\n") == 1, (arguments, err)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    code, _, err = run("predict", checkpoint, videos, capsys=capsys)
    assert code == 2 and "pip install av" in err and err.count("\n") == 1
