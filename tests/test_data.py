"""Image sets, decoding, transforms and loaders, on real files written here."""

import io
import os
import random
import subprocess
import sys
import tarfile
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from vision_mamba.data import (
    BatchNormalise,
    build_transform,
    check_head,
    check_images,
    create_loader,
    decode_image,
    keep_in_memory,
    knn_baseline,
    open_dataset,
)
from vision_mamba.data import memory as memory_module
from vision_mamba.errors import UserError, run_main

CLASSES = ["ant", "bee", "cat"]


def picture(seed, mode="RGB", size=(20, 14)):
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """root/{train,val}/<class>/<n>.png, 4 and 2 images a class, of different colours."""
    root = tmp_path / "set"
    for split, count in (("train", 4), ("val", 2)):
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * c + i + (50 if split == "val" else 0)).save(root / split / name / f"{name}{i}.png")
    return root


def add_member(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def contents(dataset):
    pairs = (dataset[i] for i in range(len(dataset)))
    return sorted((np.asarray(image).tobytes(), dataset.classes[target]) for image, target in pairs)


# Sources


def write_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "some/prefix")
    return str(path)


def write_flat_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, ".")
    return str(path)


def write_shards(folder, path):
    webdataset = pytest.importorskip("webdataset")
    for split in ("train", "val"):
        path.mkdir(exist_ok=True)
        with webdataset.ShardWriter(str(path / f"{split}-%03d.tar"), maxcount=5, verbose=0) as writer:
            for c, name in enumerate(CLASSES):
                for file in sorted((folder / split / name).iterdir()):
                    writer.write({"__key__": file.stem, "png": file.read_bytes(), "cls": c})
    (path / "classnames.txt").write_text("\n".join(CLASSES))
    return str(path)


def write_hugging_face(folder, path, parquet=False):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    splits = {}
    for split, name in (("train", "train"), ("val", "validation")):
        files = [(f, c) for c, k in enumerate(CLASSES) for f in sorted((folder / split / k).iterdir())]
        rows = {"image": [{"bytes": f.read_bytes(), "path": None} for f, _ in files], "label": [c for _, c in files]}
        splits[name] = datasets.Dataset.from_dict(rows, features=features)
    if parquet:
        (path / "data").mkdir(parents=True)
        for name, data in splits.items():
            data.to_parquet(str(path / "data" / f"{name}-00000-of-00001.parquet"))
    else:
        datasets.DatasetDict(splits).save_to_disk(str(path))
    return f"hfds:{path}"


def write_parquet(folder, path):
    return write_hugging_face(folder, path, parquet=True)


@pytest.mark.parametrize("write", [write_tar, write_flat_tar, write_shards, write_hugging_face, write_parquet])
@pytest.mark.parametrize("split", ["train", "val"])
def test_sources_agree_with_the_folder(folder, tmp_path, write, split, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = sorted(
        (np.asarray(Image.open(f)).tobytes(), name) for name in CLASSES for f in (folder / split / name).iterdir()
    )
    assert contents(open_dataset(str(folder), split)) == expected
    dataset = open_dataset(write(folder, tmp_path / ("other.tar" if "tar" in write.__name__ else "other")), split)
    assert dataset.classes == CLASSES
    assert contents(dataset) == expected


def test_imagenet_layout(tmp_path):
    for split, wnid in (("train", "n01440764"), ("train", "n01443537"), ("validation", "n01443537")):
        (tmp_path / split / wnid).mkdir(parents=True)
        picture(0).save(tmp_path / split / wnid / f"{wnid}_1.JPEG")
        (tmp_path / split / wnid / "._x.JPEG").write_bytes(b"what macOS leaves behind")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench")
    train = open_dataset(str(tmp_path), "train")
    val = open_dataset(str(tmp_path), "val", classes=train.classes)
    assert train.classes == ["n01440764", "n01443537"] and train.targets == [0, 1] and val.targets == [1]


def test_shard_patterns(folder, tmp_path):
    path = write_shards(folder, tmp_path / "shards")
    assert len(open_dataset(f"{path}/train-{{000..002}}.tar", "train")) == 12
    assert len(open_dataset(f"{path}/{{split}}-{{000..001}}.tar", "val")) == 6
    with pytest.raises(UserError, match=r"train-003.tar .* does not exist"):
        open_dataset(f"{path}/train-{{000..003}}.tar", "train")


def test_builtin_set_has_disjoint_splits():
    train, val = open_dataset("builtin", "train"), open_dataset("builtin", "val")
    assert train.classes == val.classes and len(train.classes) >= 3
    assert set(val.targets) == set(range(len(val.classes)))
    assert not {c[0] for c in contents(train)} & {c[0] for c in contents(val)}


def test_tar_is_read_by_workers_and_after_a_fork(folder, tmp_path):
    data = open_dataset(write_tar(folder, tmp_path / "x.tar"), "train")
    data[0]  # opens the descriptor that the workers then share
    transform = build_transform(split="val", img_size=8)
    loaders = [create_loader(data, batch_size=5, train=False, transform=transform, num_workers=n) for n in (0, 2)]
    for (a, s), (b, t) in zip(*loaders, strict=True):
        assert torch.equal(a, b) and torch.equal(s, t)


def test_hash_split_is_a_partition_and_independent_of_place(folder, tmp_path):
    (tmp_path / "moved").mkdir()
    os.rename(folder / "train", tmp_path / "moved" / "all")
    root = str(tmp_path / "moved" / "all")
    train, val = (open_dataset(root, s, val_fraction=0.25) for s in ("train", "val"))
    assert len(train) == 9 and len(val) == 3 and sorted(val.targets) == [0, 1, 2]
    names = {train.filename(i) for i in range(9)} | {val.filename(i) for i in range(3)}
    assert len(names) == 12
    before = [os.path.basename(val.filename(i)) for i in range(3)]
    os.rename(root, tmp_path / "again")
    after = open_dataset(str(tmp_path / "again"), "val", val_fraction=0.25)
    assert [os.path.basename(after.filename(i)) for i in range(3)] == before


def test_classes_given_set_the_targets(folder):
    data = open_dataset(str(folder), "val", classes=["cat", "dog", "bee", "ant"])
    assert {os.path.basename(data.filename(i))[:3]: t for i, t in enumerate(data.targets)} == {
        "ant": 3,
        "bee": 2,
        "cat": 0,
    }


# Bad input: one line that names the thing


def user_error(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        open_dataset(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder_and_split(folder, tmp_path):
    assert "nowhere" in user_error(str(tmp_path / "nowhere"), "train")
    message = user_error(str(folder), "test")
    assert "'test'" in message and "train, val" in message
    assert "val_fraction" in user_error(str(folder / "train"), "train")


def test_empty_class_folder(folder, tmp_path):
    (folder / "train" / "dog").mkdir()
    assert "train/dog" in user_error(str(folder), "train")
    assert "dog" in user_error(write_tar(folder, tmp_path / "x.tar"), "train")


def test_no_images_and_images_outside_classes(folder, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "no class folders" in user_error(str(tmp_path / "empty"), "train")
    picture(0).save(folder / "val" / "lost.png")
    assert "lost.png" in user_error(str(folder), "val")


def test_class_unknown_from_training(folder):
    os.rename(folder / "val" / "bee", folder / "val" / "bees")
    message = user_error(str(folder), "val", classes=CLASSES)
    assert "'bees'" in message and "'bee'" in message


def test_class_count_and_head(folder):
    with pytest.raises(UserError, match="3 classes.*has 5"):
        check_head(open_dataset(str(folder), "train"), 5)


def test_tar_cut_short_or_compressed(folder, tmp_path):
    path = tmp_path / "x.tar"
    write_tar(folder, path)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        last = max(m.offset_data + m.size for m in tar)
    path.write_bytes(data[: last - 5])
    assert "x.tar" in user_error(str(path), "train")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(folder, "set")
    assert "z.tar" in user_error(str(tmp_path / "z.tar"), "train")


def test_shard_without_label(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add_member(tar, "a.png", encoded(picture(0)))
        add_member(tar, "a.cls", b"0")
        add_member(tar, "b.png", encoded(picture(1)))
    assert "b.png has no .cls" in user_error(str(tmp_path / "train-0.tar"), "train")
    assert "no split 'val'" in user_error(str(tmp_path / "train-0.tar"), "val")


def test_hugging_face_errors(folder, tmp_path):
    source = write_hugging_face(folder, tmp_path / "hf")
    assert "'test'" in user_error(source, "test")
    assert "no column 'img'" in user_error(source, "train", image_key="img")
    assert "hfds:" in user_error(f"hfds:{tmp_path}/nothing", "train")


def test_check_images_lists_every_bad_file(folder):
    whole = encoded(picture(0, size=(64, 64)), "JPEG")
    (folder / "train" / "bee" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "cat" / "text.png").write_bytes(b"not an image")
    (folder / "train" / "ant" / "zero.png").write_bytes(b"")
    lines = check_images(open_dataset(str(folder), "train"), progress=False)
    assert len(lines) == 3
    for name, line in zip(("zero.png", "cut.jpg", "text.png"), lines, strict=True):
        assert name in line and "\n" not in line


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_in_a_loader_is_one_line(folder, workers, capsys):
    (folder / "train" / "bee" / "bad.png").write_bytes(b"\x89PNG broken")
    data = open_dataset(str(folder), "train")
    transform = build_transform(split="val", img_size=8)
    loader = create_loader(data, batch_size=4, train=False, transform=transform, num_workers=workers)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: [None for _ in loader] and None)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot read image") and "bad.png" in err and err.count("\n") == 1


# Channels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_mode_reads_as_grey_and_colour(mode, in_chans):
    image = picture(3, "RGB").convert("P") if mode == "P" else picture(3, "L" if mode == "1" else mode).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert decode_image(data, "x", in_chans).mode == {1: "L", 3: "RGB"}[in_chans]


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    read = decode_image(encoded(image), "x", 3)
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]


def test_16_bit_grey_is_scaled():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        read = decode_image(encoded(Image.fromarray(values), kind), "x", 1)
        assert np.asarray(read).tolist() == [[0, 1, 128, 255]]


def test_float_images_are_refused_by_name():
    with pytest.raises(UserError, match="deep.tif holds floating-point"):
        decode_image(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "deep.tif", 3)


def test_four_bands_are_resized_independently():
    bands = np.zeros((8, 8, 4), dtype=np.uint8)
    bands[..., 0], bands[:, :4, 3] = 200, 255  # PIL's own RGBA resize would give 200 weighted by the fourth band
    image = decode_image(encoded(Image.fromarray(bands)), "x", 4)
    tensor = build_transform(split="val", img_size=4, crop_pct=1.0, in_chans=4, mean=[0.0] * 4, std=[1.0] * 4)(image)
    assert tensor.shape == (4, 4, 4)
    assert torch.allclose(tensor[0], torch.full((4, 4), 200 / 255))
    with pytest.raises(UserError, match="takes 4 channels"):
        decode_image(encoded(picture(0)), "x", 4)
    with pytest.raises(UserError, match="in_chans=2"):
        open_dataset("builtin", "val", in_chans=2)


# Transforms


def test_evaluation_transform_is_resize_crop_normalise():
    image = Image.new("RGB", (30, 60), (51, 102, 204))
    out = build_transform(split="val", img_size=[20, 10], mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.25))(image)
    assert out.shape == (3, 20, 10)
    expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.5, (0.8 - 0.3) / 0.25])
    assert torch.allclose(out, expected.view(3, 1, 1).expand(3, 20, 10), atol=1e-5)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("library", ["timm", "albumentations"])
def test_training_transform_shapes(in_chans, library):
    data = encoded(picture(1, "RGBA" if in_chans == 4 else "RGB", size=(40, 30)))
    pipeline = [{"RandomResizedCrop": {"size": [16, 24]}}, "HorizontalFlip"] if library == "albumentations" else None
    if library == "albumentations":
        pytest.importorskip("albumentations")
    transform = build_transform(
        split="train", img_size=(16, 24), in_chans=in_chans, library=library, albumentations=pipeline, reprob=0.5
    )
    out = transform(decode_image(data, "x", in_chans))
    assert out.shape == (in_chans, 16, 24) and out.dtype == torch.float32


def test_the_papers_augmentation_runs_on_every_magnitude():
    transform = build_transform(split="train", img_size=16, auto_augment="rand-m9-mstd1.5-inc1", reprob=0.25)
    image = picture(0)
    random.seed(0)
    np.random.seed(0)
    for _ in range(300):
        assert torch.isfinite(transform(image)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interpolation": "bicubik"}, ["bicubik", "'bicubic'"]),
        ({"auto_augment": "rnd-m9"}, ["rnd-m9", "'rand'"]),
        ({"auto_augment": "rand-m9-zz1"}, ["rand-m9-zz1"]),
        ({"library": "imgaug"}, ["imgaug"]),
        ({"scale": (0.9, 0.1)}, ["scale"]),
        ({"img_size": 0}, ["img_size"]),
        ({"mean": (0.5, 0.5)}, ["mean"]),
        ({"library": "albumentations"}, ["empty"]),
        ({"library": "albumentations", "albumentations": [{"HorizontalFlipp": {}}]}, ["did you mean 'HorizontalFlip'"]),
        ({"library": "albumentations", "albumentations": [{"HorizontalFlip": {"pp": 1}}]}, ["'pp'", "'p'"]),
        ({"library": "albumentations", "albumentations": [{"Resize": {"height": 8, "width": 9}}]}, ["8x9", "16x16"]),
        (
            {"library": "albumentations", "albumentations": [{"OneOf": {"transforms": [{"Blurr": {}}]}}]},
            ["did you mean 'Blur'"],
        ),
    ],
)
def test_wrong_augmentation_is_named(options, words):
    with pytest.raises(UserError) as caught:
        build_transform(**{"split": "train", "img_size": 16, **options})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


# Loaders

TIMM = {"split": "train", "img_size": 12, "color_jitter": 0.4, "auto_augment": "rand-m5-mstd0.5", "reprob": 0.5}
ALBUMENTATIONS = {
    "split": "train",
    "img_size": 12,
    "library": "albumentations",
    "albumentations": [{"RandomResizedCrop": {"size": [12, 12]}}, {"ColorJitter": {"p": 1.0}}],
}


def batches(folder, *, epoch, start=0, workers=0, options=TIMM, warm_up=False, **kwargs):
    loader = create_loader(
        open_dataset(str(folder), "train"),
        batch_size=5,
        train=True,
        transform=build_transform(**options),
        num_workers=workers,
        **{"seed": 7, "drop_last": False, **kwargs},
    )
    if warm_up:  # what came before must not matter
        loader.set_epoch(9)
        for _ in loader:
            pass
        random.random(), np.random.rand(), torch.rand(1)
    loader.set_epoch(epoch, start_batch=start)
    return [(x.clone(), y.clone()) for x, y in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("options", [TIMM, ALBUMENTATIONS], ids=["timm", "albumentations"])
def test_batches_depend_on_seed_and_epoch_only(folder, options):
    first = batches(folder, epoch=2, options=options)
    assert same(first, batches(folder, epoch=2, options=options, warm_up=True))
    assert same(first, batches(folder, epoch=2, options=options, workers=2, warm_up=True))
    assert not same(first, batches(folder, epoch=3, options=options))
    assert not same(first, batches(folder, epoch=2, options=options, seed=8))


def test_steps_of_a_pipeline_draw_their_own_numbers():
    # albumentations starts every step from the same seed: two steps of p=0.5 would always go together.
    transform = build_transform(
        split="train", img_size=2, mean=(0,) * 3, std=(1,) * 3, library="albumentations",
        albumentations=[{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}, {"RandomCrop": {"height": 2, "width": 2}}],
    )  # fmt: skip
    image = Image.frombytes("RGB", (2, 2), bytes([0] * 3 + [1] * 3 + [2] * 3 + [3] * 3))
    seen = set()
    for seed in range(40):
        transform.set_random_seed(seed)
        seen.add(int((transform(image)[0, 0, 0] * 255).round()))
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize(
    "options", [{"split": "val"}, {"split": "train", "color_jitter": 0.3}, {"split": "train", "recipe": "overhead"}]
)
def test_normalising_batches_is_normalising_samples(in_chans, options):
    options = {"img_size": (16, 24), "in_chans": in_chans, "mean": [0.4] * in_chans, "std": [0.2] * in_chans, **options}
    if in_chans == 4:
        options.pop("color_jitter", None)
    mode = {1: "L", 3: "RGB", 4: "RGBX"}[in_chans]
    image = Image.frombytes(mode, (40, 30), np.random.default_rng(0).bytes(40 * 30 * in_chans))
    outs = []
    for stored in (False, True):
        transform = build_transform(**options, stored=stored)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if hasattr(transform, "set_random_seed"):
            transform.set_random_seed(0)
        outs.append(transform(image))
    assert outs[1].dtype == torch.uint8 and outs[1].shape == (16, 24, in_chans)
    finished = BatchNormalise(options["mean"], options["std"], "cpu")(outs[1][None])[0]
    assert finished.is_contiguous()
    torch.testing.assert_close(finished, outs[0], rtol=1e-6, atol=1e-6)


def test_erasing_and_floats_stay_samples_of_their_own():
    image = picture(0, size=(16, 16))
    erasing = build_transform(split="train", img_size=16, reprob=1.0, stored=True)(image)
    assert erasing.dtype == torch.float32 and erasing.shape == (3, 16, 16)
    pipeline = [{"ToFloat": {"max_value": 255}}, {"RandomCrop": {"height": 16, "width": 16}}]
    transform = build_transform(
        split="train", img_size=16, library="albumentations", albumentations=pipeline, stored=True
    )
    assert transform(image).dtype == torch.float32
    batch = torch.stack([erasing, erasing])
    assert BatchNormalise((0.5,) * 3, (0.5,) * 3, "cpu")(batch) is batch


@pytest.mark.parametrize("options", [TIMM, ALBUMENTATIONS], ids=["timm", "albumentations"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_give_the_same_batches(folder, options, workers):
    picture(7, size=(31, 9)).save(folder / "train" / "bee" / "another_size.png")
    expected = batches(folder, epoch=2, options=options)
    data = open_dataset(str(folder), "train")
    assert keep_in_memory(data, num_workers=2, progress=False) == []
    loader = create_loader(
        data,
        batch_size=5,
        train=True,
        transform=build_transform(**options),
        num_workers=workers,
        seed=7,
        drop_last=False,
    )
    for name in sorted((folder / "train").rglob("*.png")):
        name.unlink()  # nothing is read any more
    for _ in range(2):  # and nothing wrote to the images
        loader.set_epoch(2)
        assert same(expected, [(x.clone(), y.clone()) for x, y in loader])


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_images_in_memory_are_those_of_the_files(tmp_path, in_chans, monkeypatch):
    monkeypatch.setattr(memory_module, "_BLOCK_BYTES", 700)  # several blocks, and images that fill one alone
    for i, size in enumerate([(20, 14), (3, 40), (20, 30), (1, 1), (9, 9)]):
        (tmp_path / "train" / "x").mkdir(parents=True, exist_ok=True)
        picture(i, "RGBA" if in_chans == 4 else "RGB", size).save(tmp_path / "train" / "x" / f"{i}.png")
    data = open_dataset(str(tmp_path), "train", in_chans=in_chans)
    expected = [data[i][0] for i in range(5)]
    keep_in_memory(data, progress=False)
    assert len(data.memory) == 5 and len(data.memory.blocks) > 1
    for i, image in enumerate(expected):
        assert data[i][0].mode == image.mode and data[i][0].size == image.size
        assert data[i][0].tobytes() == image.tobytes()


def test_images_that_do_not_fit_into_memory_are_refused(folder, monkeypatch):
    data = open_dataset(str(folder), "train")
    monkeypatch.setattr(memory_module, "free_memory", lambda: 12_000)
    monkeypatch.setattr(memory_module, "PixelMemory", None)  # nothing is kept before the refusal
    with pytest.raises(UserError, match=r"12 decoded images take about 0\.0 MB.*70%.*data\.cache=false"):
        keep_in_memory(data, progress=False)
    monkeypatch.setattr(memory_module, "free_memory", lambda: 0)
    with pytest.raises(UserError, match="and 0.0 MB may be used"):
        keep_in_memory(data, progress=False)
    monkeypatch.undo()
    # The estimate is of a few: what the others add is found while they are read.
    monkeypatch.setattr(memory_module, "_SAMPLES", 1)
    monkeypatch.setattr(memory_module, "free_memory", lambda: 20_000)
    picture(0, size=(100, 100)).save(folder / "train" / "cat" / "large.png")
    with pytest.raises(UserError, match="take more than 0.0 MB, and 0.0 MB may"):
        keep_in_memory(open_dataset(str(folder), "train"), progress=False)
    assert data.memory is None


def test_damaged_images_are_not_kept(folder):
    (folder / "train" / "bee" / "bad.png").write_bytes(b"\x89PNG broken")
    data = open_dataset(str(folder), "train")
    (line,) = keep_in_memory(data, progress=False)
    assert "bad.png" in line and data.memory is None


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs Linux")
def test_free_memory_is_less_than_the_machine_has():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_module.free_memory() < total


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeats", [0, 3])
def test_start_batch_continues_an_epoch(folder, workers, repeats):
    whole = batches(folder, epoch=1, num_aug_repeats=repeats)
    assert len(whole) == 3
    for start in (1, 2, 3):
        rest = batches(folder, epoch=1, start=start, workers=workers, num_aug_repeats=repeats, warm_up=True)
        assert same(whole[start:], rest)


def test_loading_leaves_the_global_generators_alone(folder):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches(folder, epoch=0)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_repeated_augmentation_repeats_each_image(folder):
    # 12 images three times over, cut to an epoch of 12: four images, three different versions of each.
    options = {"split": "train", "img_size": 12, "scale": (0.1, 0.3)}
    whole = batches(folder, epoch=0, num_aug_repeats=3, options=options)
    images = torch.cat([x for x, _ in whole])
    targets = torch.cat([y for _, y in whole])
    assert len(images) == 12 and torch.equal(targets, targets[::3].repeat_interleave(3))
    assert len({x.numpy().tobytes() for x in images}) == 12


def test_ranks_share_training_evenly_and_evaluation_exactly(folder):
    data = open_dataset(str(folder), "train")
    transform = build_transform(split="val", img_size=8)

    def keys(train, rank, world):
        loader = create_loader(
            data, batch_size=2, train=train, transform=transform, distributed=True, rank=rank, world_size=world
        )
        return [index for _, _, index in loader.sampler]

    evaluated = [keys(False, r, 5) for r in range(5)]
    assert sorted(chain(*evaluated)) == list(range(12))
    trained = [keys(True, r, 5) for r in range(5)]
    assert {len(k) for k in trained} == {3} and set(chain(*trained)) == set(range(12))
    assert [k for ks in zip(*trained, strict=True) for k in ks][:12] == keys(True, 0, 1)


def test_too_few_images_for_a_batch(folder):
    transform = build_transform(split="train", img_size=8)
    with pytest.raises(UserError, match="lower batch_size to 12"):
        create_loader(open_dataset(str(folder), "train"), batch_size=13, train=True, transform=transform)


def test_knn_baseline_on_separable_colours():
    class Colours(torch.utils.data.Dataset):
        def __init__(self, shift):
            self.shift = shift

        def __len__(self):
            return 9

        def __getitem__(self, i):
            return Image.new("RGB", (5, 5), (80 * (i % 3) + self.shift, 0, 0)), i % 3

    assert knn_baseline(Colours(0), Colours(9), k=3) == 1.0
    assert knn_baseline(Colours(0), Colours(75), k=3) < 0.5


def test_heavy_imports_wait_for_their_use():
    heavy = {"albumentations", "datasets", "webdataset", "matplotlib", "rasterio"}
    code = f"import sys, vision_mamba.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
