"""Measuring a classifier, and opening a trained one from its checkpoint."""

from __future__ import annotations

import argparse
import csv
import json
import os
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vision_mamba.checkpoint import find_state_dict, load_checkpoint, read_checkpoint
from vision_mamba.data import (
    ImageSet,
    RasterProfile,
    build_transform,
    check_head,
    decode_image,
    decode_raster,
    open_dataset,
    read_clip,
)
from vision_mamba.engine.build import create_any_size
from vision_mamba.engine.checkpoint import FORMAT
from vision_mamba.engine.plots import plot_confusion, replacing
from vision_mamba.errors import UserError, nearest

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    num_classes: int,
    device: torch.device | str,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs a classifier over a loader, in evaluation mode, and leaves it in the mode it was in.

    Where torch.distributed is initialised every rank must call this with its own share of the images (shares may
    differ in length); all get the result over all shares.

    Args:
        model: images (B, C, H, W) -> logits (B, num_classes).
        loader: of (images, targets (B,) int64).
        num_classes: classes of the logits.
        device: where the model is.
        amp_dtype: bfloat16 or float16 runs the model under autocast.
        progress: show a bar.

    Returns:
        ``top1``, ``top5`` (only from five classes on) and ``loss`` (mean cross-entropy) over ``images`` images;
        ``precision``, ``recall`` and ``f1``, each the mean over the classes (macro), as in the RSMamba paper; a class
        that no image has and none is taken for is left out;
        ``images_per_second`` of the whole loop over all ranks, loading included; ``confusion``, a (classes, classes)
        int64 CPU tensor, row = label; ``per_class``, a list of dictionaries with ``precision``, ``recall``, ``f1``
        (0 where undefined) and ``support`` (images of the class). Rates are in 0..1.
    """
    from torchmetrics import MeanMetric, SumMetric
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
    from tqdm import tqdm

    device = torch.device(device)
    counts = MulticlassConfusionMatrix(num_classes).to(device)
    top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro").to(device) if num_classes >= 5 else None
    loss = MeanMetric().to(device)
    images_per_second = SumMetric().to(device)

    was_training = model.training
    model.eval()
    seen, start = 0, time.perf_counter()
    try:
        for images, targets in tqdm(
            loader, desc="evaluate", unit="batch", leave=False, disable=None if progress else True
        ):
            images = images.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            logits = logits.float()
            counts.update(logits, targets)
            if top5 is not None:
                top5.update(logits, targets)
            loss.update(nn.functional.cross_entropy(logits, targets), weight=len(targets))
            seen += len(targets)
    finally:
        model.train(was_training)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    images_per_second.update(seen / (time.perf_counter() - start))

    confusion = counts.compute().cpu().long()
    total = int(confusion.sum())
    if total == 0:
        raise UserError("there are no images to evaluate")
    result: dict[str, Any] = {
        "top1": confusion.diagonal().sum().item() / total,
        "loss": loss.compute().item(),
        "images": total,
        "images_per_second": images_per_second.compute().item(),
        "confusion": confusion,
        "per_class": _per_class(confusion),
    }
    seen_classes = (confusion.sum(0) + confusion.sum(1) > 0).tolist()
    occurring = [row for row, occurs in zip(result["per_class"], seen_classes, strict=True) if occurs]
    for name in ("precision", "recall", "f1"):
        result[name] = sum(row[name] for row in occurring) / len(occurring)
    if top5 is not None:
        result["top5"] = top5.compute().item()
    return result


def _per_class(confusion: torch.Tensor) -> list[dict[str, float]]:
    right = confusion.diagonal().double()
    support, predicted = confusion.sum(1), confusion.sum(0)
    precision = right / predicted.clamp(min=1)
    recall = right / support.clamp(min=1)
    f1 = 2 * right / (support + predicted).clamp(min=1)
    return [
        {"precision": p, "recall": r, "f1": f, "support": s}
        for p, r, f, s in zip(precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    ]


def write_report(result: dict[str, Any], classes: Sequence[str], folder: str | os.PathLike, **about: Any) -> list[Path]:
    """Writes ``metrics.json``, ``per_class.csv`` and ``confusion.png``, each whole or not at all.

    Args:
        result: from ``evaluate``.
        classes: class names.
        folder: made where it is missing.
        **about: what was evaluated; goes into metrics.json.

    Returns:
        The files.
    """
    folder = Path(folder)
    files = [folder / "metrics.json", folder / "per_class.csv", folder / "confusion.png"]
    rows = _class_rows(result, classes)
    plain = {**about, **{k: v for k, v in result.items() if k not in ("confusion", "per_class")}}
    plain |= {"per_class": rows, "confusion": result["confusion"].tolist()}
    with replacing(files[0]) as temporary:
        temporary.write_text(json.dumps(plain, indent=1) + "\n")
    write_per_class(result, classes, files[1])
    plot_confusion(result["confusion"], classes, files[2])
    return files


def write_per_class(result: dict[str, Any], classes: Sequence[str], path: Path) -> None:
    """Writes precision, recall, F1 and support of each class as CSV."""
    rows = _class_rows(result, classes)
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _class_rows(result: dict[str, Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    return [{"class": name, **row} for name, row in zip(classes, result["per_class"], strict=True)]


@dataclass
class TrainedModel:
    """A model with what its images must look like.

    Attributes:
        model: in evaluation mode, on the CPU.
        classes: what the logits mean, for people.
        labels: the same as the data names them (folder names), or None where the checkpoint does not say.
        data_config: ``input_size`` (channels, height, width), ``mean``, ``std``, ``interpolation``, ``crop_pct``.
        profile: what rasters it was trained on, or None where it was trained on pictures.
        source: the data it was trained on, where the checkpoint says so.
        description: which weights of which model, for messages.
        name: of the model for timm.
        args: further arguments of ``timm.create_model`` that make it again.
    """

    model: nn.Module
    classes: list[str]
    labels: list[str] | None
    data_config: dict[str, Any]
    profile: RasterProfile | None
    source: str | None
    description: str
    name: str
    args: dict[str, Any]

    def prepared(self, device: torch.device | str) -> nn.Module:
        """``model`` on a device, and there in the form for inference of ``timm.utils.reparameterize_model``."""
        import timm.utils

        self.model = timm.utils.reparameterize_model(self.model.to(device), inplace=True)
        return self.model

    def untrained(self) -> nn.Module:
        """The same model with random weights, in evaluation mode, on the CPU."""
        return create_any_size(self.name, dict(self.args)).eval()

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip, or None for a model of images."""
        return getattr(self.model, "num_frames", None)

    def read(self, path: Path) -> Image.Image | np.ndarray | list[Image.Image]:
        """A file as this model's transform wants it: a PIL image, an array where it was trained on rasters, or the
        pictures of a clip.

        Raises:
            UserError: the file cannot be read, or is of another kind than the model was trained on.
        """
        channels = self.data_config["input_size"][0]
        if self.num_frames is not None:
            if channels != 3:
                raise UserError(f"videos are read as RGB, and the model takes {channels} channels")
            return read_clip(path, self.num_frames)
        data, name = path.read_bytes(), str(path)
        if self.profile is not None:
            return decode_raster(data, name, self.profile)
        return decode_image(data, name, channels)

    def transform(self, *, raster: bool | None = None) -> Callable[[Any], torch.Tensor]:
        """The evaluation transform, from an image to a float32 tensor of ``input_size``; of clips frame by frame, to
        (channels, frames, height, width).

        Args:
            raster: images are arrays, as those of a set with a profile are; None: as in training.
        """
        config = self.data_config
        channels, *size = config["input_size"]
        transform = build_transform(
            split="val",
            img_size=size,
            in_chans=channels,
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            raster=self.profile is not None if raster is None else raster,
        )
        if self.num_frames is None:
            return transform
        return lambda frames: torch.stack([transform(frame) for frame in frames], dim=1)

    def open_dataset(self, source: str, split: str, **options: Any) -> ImageSet:
        """Opens data whose targets are this model's classes; UserError where classes or bands do not fit."""
        if self.num_frames is not None:
            raise UserError(
                f"{self.description} takes clips of {self.num_frames} frames, and data sets are of images; "
                "tools/predict.py names what is in videos"
            )
        options["in_chans"] = self.data_config["input_size"][0]
        options["bands"] = self.profile.bands if self.profile else None
        data = open_dataset(source, split, classes=self.labels, **options)
        if self.labels is None and len(self.classes) == 1000 and set(data.classes) <= set(_imagenet_labels()):
            # A part of ImageNet keeps ImageNet's indices.
            data = open_dataset(source, split, classes=_imagenet_labels(), **options)
        check_head(data, len(self.classes))
        trained = (
            (self.profile.dtype, self.profile.count) if self.profile else ("uint8", self.data_config["input_size"][0])
        )
        if data.profile is not None and (data.profile.dtype, data.profile.count) != trained:
            raise UserError(
                f"{data.where} holds rasters of {data.profile.count} {data.profile.dtype} bands, but the model was "
                f"trained on {trained[1]} {trained[0]} bands; give images of that kind"
            )
        return data


def load_trained(
    path: str | os.PathLike,
    *,
    name: str | None = None,
    img_size: int | Sequence[int] | None = None,
    use_ema: bool = True,
) -> TrainedModel:
    """Opens a checkpoint of ``tools/train.py``, or published weights together with a model's name.

    Args:
        path: the file.
        name: timm model name; needed where the file does not say which model it is of.
        img_size: another image size than the checkpoint's, in pixels (or height, width).
        use_ema: take the averaged weights where there are any.

    Raises:
        UserError: no such file, not a checkpoint, of another model, or an image size the model does not take.
    """
    import timm
    from timm.data import resolve_model_data_config

    path = Path(path)
    saved = _read(path)
    ours = saved.get("format") == FORMAT
    averaged = ours and use_ema and saved.get("state_dict_ema") is not None
    if ours:
        if name not in (None, saved["arch"]):
            raise UserError(f"{path} is a checkpoint of {saved['arch']}, not of {name}; leave the model's name out")
        name = saved["arch"]
    elif name is None:
        raise UserError(f"{path} does not say which model it is of; give the name, e.g. --model vim_tiny_patch16_224")
    if not timm.is_model(name):
        raise UserError(f"unknown model {name!r}{nearest(name, timm.list_models())}")
    try:
        weights = find_state_dict(saved, use_ema=averaged, source=str(path))
    except ValueError as error:
        raise UserError(str(error)) from None
    args = dict(saved["model_args"]) if ours else {}
    head = None if ours else _head_size(weights, timm.get_pretrained_cfg_value(name, "classifier"))
    if head is not None:
        args["num_classes"] = head
    size = _pair(img_size)
    if size is not None:
        args["img_size"] = size if size[0] != size[1] else size[0]
    try:
        model = create_any_size(name, args).eval()
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot make {name} with {args}: {error}") from None
    try:
        load_checkpoint(model, weights)
    except (RuntimeError, ValueError) as error:
        # A foreign file can name hundreds of tensors.
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise UserError(f"{path} is not of {name} with {args}: {reason}") from None

    config = dict(saved["data_config"]) if ours else resolve_model_data_config(model)
    if size is not None:
        config["input_size"] = [config["input_size"][0], *size]
    # A model of clips has checked its size when it was made, and a pass can take minutes.
    if getattr(model, "num_frames", None) is None:
        _try_image(model, config["input_size"], name)
    labels = list(saved["classes"]) if ours else None
    count = len(labels) if labels else int(model.num_classes)  # type: ignore[arg-type]
    classes = labels
    if count == 1000 and (labels is None or set(labels) == set(_imagenet_labels())):
        classes = _imagenet_names(labels or _imagenet_labels())
    return TrainedModel(
        model=model,
        classes=classes or [str(i) for i in range(count)],
        labels=labels,
        data_config=config,
        profile=_profile(config, path),
        source=saved["data"].get("source") if ours and saved.get("data") else None,
        description=f"{name}, {'averaged ' if averaged else ''}weights of {path}",
        name=name,
        args=args,
    )


def _profile(config: dict[str, Any], path: Path) -> RasterProfile | None:
    raster = config.get("raster")
    if not raster:
        return None
    try:
        return RasterProfile(raster["dtype"], raster["count"], tuple(raster["names"]), tuple(raster["bands"]))
    except (KeyError, TypeError):
        raise UserError(f"checkpoint {path} lacks a part of data_config.raster; save it with tools/train.py") from None


def add_model_arguments(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """What every tool that opens a checkpoint asks for: see ``load_trained`` and ``choose_device``."""
    parser.add_argument("checkpoint", help="a checkpoint of tools/train.py, or published weights (with --model)")
    parser.add_argument("--model", help="timm model name, where the checkpoint does not say it")
    parser.add_argument("--img-size", type=int, nargs="+", help="another image size: side, or height and width")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images a batch (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--amp", choices=tuple(AMP_DTYPES), default="none", help="autocast type")
    parser.add_argument("--no-ema", action="store_true", help="take the raw weights where averaged ones exist")


def choose_device(name: str, amp: str = "none") -> tuple[torch.device, torch.dtype | None]:
    """The device and the autocast type for ``auto``, ``cpu`` or ``cuda`` and ``none``, ``bf16`` or ``fp16``.

    Raises:
        UserError: there is no GPU, or the device cannot compute in that type.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA GPU is available; use --device cpu, or install a CUDA build of torch")
    if name == "cpu" and amp == "fp16":
        raise UserError("fp16 needs a GPU; use --amp bf16 or --amp none on the CPU")
    return torch.device(name), AMP_DTYPES[amp]


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = read_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    missing = [k for k in ("arch", "model_args", "classes", "data_config", "state_dict") if k not in saved]
    if saved.get("format") == FORMAT and missing:
        raise UserError(f"checkpoint {path} lacks {', '.join(missing)}; save it again with tools/train.py")
    return saved


def _head_size(weights: dict[str, torch.Tensor], classifier: str | None) -> int | None:
    """Classes of the head in a state dict, whatever prefix its names have; None where it has no such head."""
    sizes = [len(v) for k, v in weights.items() if classifier and f".{k}".endswith(f".{classifier}.weight")]
    return sizes[0] if len(sizes) == 1 else None


def _try_image(model: nn.Module, input_size: Sequence[int], name: str) -> None:
    try:
        with torch.no_grad():
            model(torch.zeros(1, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{name} does not take images of {list(input_size)}: {error}") from None


def _pair(img_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if img_size is None:
        return None
    size = (img_size,) if isinstance(img_size, int) else tuple(img_size)
    if len(size) not in (1, 2) or min(size) < 1:
        raise UserError(f"image size {list(size)} must be one positive number or height and width")
    return size[0], size[-1]


def _imagenet_labels() -> list[str]:
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()


def _imagenet_names(labels: Sequence[str]) -> list[str]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.label_name_to_description(label) for label in labels]
