"""From configuration to objects: model, data, loss, optimiser, schedule. Every mistake here is a `UserError`."""

from __future__ import annotations

import fnmatch
import sys
import warnings
from dataclasses import asdict
from typing import Any

import timm
import torch
from timm.data import Mixup, resolve_model_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vision_mamba.checkpoint import load_checkpoint, read_checkpoint
from vision_mamba.data import (
    BatchNormalise,
    EpochLoader,
    ImageSet,
    build_transform,
    check_images,
    create_loader,
    keep_in_memory,
    open_dataset,
    read_statistics,
)
from vision_mamba.engine import muon
from vision_mamba.engine.checkpoint import FORMAT
from vision_mamba.engine.config import Config
from vision_mamba.errors import UserError, nearest


def build_model(config: Config, num_classes: int, *, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Creates the model, with published weights if `pretrained`.

    Returns:
        The model, and the arguments with which `timm.create_model` makes the same architecture again.

    Raises:
        UserError: The name is unknown, the head does not fit the data, or the model refuses an argument.
    """
    wanted = config.model
    if not timm.is_model(wanted.name):
        hint = nearest(wanted.name, timm.list_models()) or "; timm.list_models() lists all"
        raise UserError(f"unknown model.name '{wanted.name}'{hint}")
    if wanted.num_classes not in (None, num_classes):
        raise UserError(f"model.num_classes={wanted.num_classes}, but the data has {num_classes} classes")
    args = {**wanted.kwargs, "num_classes": num_classes, "in_chans": wanted.in_chans}
    if wanted.img_size is not None:
        args["img_size"] = wanted.img_size
    rates = {k: v for k in ("drop_rate", "drop_path_rate") if (v := getattr(wanted, k))}
    try:
        model = create_any_size(wanted.name, args, pretrained=pretrained, **rates)
    except Exception as e:  # whatever a constructor or a download raises is about these arguments
        given = ", ".join(f"{k}={v}" for k, v in {**args, **rates}.items())
        raise UserError(f"model {wanted.name} cannot be created with {given}: {_first_line(e)}") from None
    if wanted.grad_checkpointing:
        try:
            model.set_grad_checkpointing(wanted.grad_checkpointing)
        except (AttributeError, AssertionError):
            raise UserError(f"model.grad_checkpointing: {wanted.name} does not support it") from None
    return model, args


def input_config(config: Config, model: nn.Module, images: ImageSet) -> dict[str, Any]:
    """What the model's input must look like: `input_size` (C, H, W), `mean`, `std`, `interpolation`, `crop_pct`.

    `raster` is None for pictures, else the fields of the rasters' profile: `dtype`, `count`, `names`, `bands`.

    Raises:
        UserError: The statistics do not fit the images, or images without a range of their own have none.
    """
    own = resolve_model_data_config(model)
    mean, std = config.data.mean, config.data.std
    if config.data.statistics:
        mean, std = read_statistics(config.data.statistics, images)
    elif images.profile is not None and images.profile.needs_statistics and (mean is None or std is None):
        raise UserError(
            f"{images.where} holds {images.profile.dtype} rasters, which the model's own mean and std do not fit: set "
            "data.statistics to a file of tools/band_statistics.py, or data.mean and data.std"
        )
    chans, size = config.model.in_chans, config.model.img_size
    height, width = (size, size) if size is not None else own["input_size"][-2:]

    def per_channel(values: list[float] | None, default: tuple[float, ...]) -> list[float]:
        if values is not None:
            return list(values) * (chans if len(values) == 1 else 1)
        if len(default) == chans:
            return list(default)
        # Grey or multispectral images: the average of what the model was made for.
        return [sum(default) / len(default)] * chans

    return {
        "input_size": [chans, height, width],
        "mean": per_channel(mean, own["mean"]),
        "std": per_channel(std, own["std"]),
        "interpolation": config.data.interpolation,
        "crop_pct": config.data.crop_pct,
        "raster": None if images.profile is None else asdict(images.profile),
    }


def try_forward(model: nn.Module, input_size: list[int], name: str, device: torch.device) -> None:
    """Runs one black image, so that an image size the model cannot take is found before the run begins."""
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if patch is not None and not hasattr(embed, "stride"):  # with a stride of their own, patches may overlap
        patch = patch if isinstance(patch, tuple) else (patch, patch)
        for side, step in zip(input_size[-2:], patch, strict=True):
            if side % step:
                raise UserError(f"image size {side} is not divisible by the patch size {step} of {name}")
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, *input_size, device=device))
    except Exception as e:  # models assert, index and reshape their way to this
        raise UserError(f"model {name} cannot take images of {tuple(input_size)}: {_first_line(e)}") from None


def load_initial_weights(model: nn.Module, path: str) -> str:
    """Loads weights to fine-tune from; only the head may be of another size.

    Averaged weights are taken from our own files, as evaluation does; published files keep them for reference.

    Returns:
        One line on what was loaded and what was adapted or left new.

    Raises:
        UserError: The file is missing, unreadable or of another model.
    """
    try:
        saved = read_checkpoint(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a new head is expected here, and told in the line returned
            report = load_checkpoint(model, saved, strict=False, use_ema=saved.get("format") == FORMAT)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        raise UserError(f"model.checkpoint: {e}") from None
    kinds = {"missing": report.missing, "unexpected": report.unexpected, "misshapen": report.misshapen}
    wrong = [f"{len(names)} {kind} tensors (first: {names[0]})" for kind, names in kinds.items() if names]
    if wrong:
        raise UserError(f"model.checkpoint: {path} is not of this model: {', '.join(wrong)}")
    return f"weights from {path}" + (f"; new or adapted: {', '.join(report.adapted)}" if report.adapted else "")


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Fixes parameters whose name, or a module prefix of it, matches a pattern.

    Raises:
        UserError: A pattern matches nothing, or nothing is left to train.
    """
    for pattern in patterns:
        matches = [
            p
            for name, p in model.named_parameters()
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        ]
        if not matches:
            tops = list(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
            raise UserError(f"model.freeze: '{pattern}' matches no parameter; the top names are {', '.join(tops)}")
        for parameter in matches:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("model.freeze leaves nothing to train")


def set_train_mode(model: nn.Module) -> None:
    """`model.train()`, except that wholly frozen modules keep their evaluation behaviour (statistics, dropout)."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def open_data(config: Config) -> tuple[ImageSet, ImageSet]:
    """The training and the validation images, with the same classes in the same order.

    Raises:
        UserError: The source is wrong, the two splits are of different kinds, or an image is in both.
    """
    wanted = config.data
    options = {
        "in_chans": config.model.in_chans,
        "image_key": wanted.image_key,
        "target_key": wanted.target_key,
        "val_fraction": wanted.val_fraction,
        "split_dir": wanted.split_dir,
        "bands": wanted.bands,
    }
    train_set = open_dataset(wanted.source, wanted.train_split, classes=wanted.classes, **options)
    val_set = open_dataset(wanted.source, wanted.val_split, classes=train_set.classes, **options)
    kinds = [_kind(images) for images in (train_set, val_set)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{train_set.where} holds {kinds[0]}, but {val_set.where} holds {kinds[1]}; use one kind")
    if wanted.train_split != wanted.val_split:
        known = {train_set.filename(i) for i in range(len(train_set))}
        both = [name for i in range(len(val_set)) if (name := val_set.filename(i)) in known]
        if both:
            raise UserError(f"{len(both)} images are in {train_set.where} and in {val_set.where} too, first {both[0]}")
    return train_set, val_set


def _kind(images: ImageSet) -> str:
    profile = images.profile
    return "8-bit pictures" if profile is None else f"rasters of {profile.count} {profile.dtype} bands"


def read_images(config: Config, *sets: ImageSet, new: bool) -> None:
    """Keeps the decoded images in memory (`data.cache`), or decodes all once before a new run (`data.check_images`).

    Either way a damaged image is found before the run and not hours into it.

    Raises:
        UserError: An image cannot be used, or all of them do not fit into memory.
    """
    wanted = config.data
    bar = sys.stderr.isatty()
    bad: list[str] = []
    if wanted.cache:
        bad = keep_in_memory(*sets, progress=bar, num_workers=wanted.num_workers)
    elif wanted.check_images and new:
        bad = [line for images in sets for line in check_images(images, progress=bar, num_workers=wanted.num_workers)]
    if bad:
        more = f" ({len(bad) - 1} more of {sum(map(len, sets))} images cannot be used either)" if len(bad) > 1 else ""
        raise UserError(bad[0] + more)


def build_loaders(
    config: Config,
    data_config: dict[str, Any],
    train_set: ImageSet,
    val_set: ImageSet,
    device: torch.device,
    rank: int,
    world_size: int,
) -> tuple[EpochLoader, EpochLoader]:
    """Loaders of augmented training batches and plain validation batches, images being on the device."""
    wanted, augment = config.data, config.augment
    shared = {
        "img_size": data_config["input_size"][1:],
        "in_chans": data_config["input_size"][0],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "interpolation": data_config["interpolation"],
        "raster": data_config["raster"] is not None,
        "stored": True,
    }
    train_transform = build_transform(
        split="train",
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        reprob=augment.reprob,
        library=augment.library,
        recipe=augment.recipe,
        albumentations=augment.albumentations,
        **shared,
    )
    val_transform = build_transform(split="val", crop_pct=data_config["crop_pct"], **shared)
    processes = {
        "finish": BatchNormalise(data_config["mean"], data_config["std"], device),
        "num_workers": wanted.num_workers,
        "seed": config.train.seed,
        "distributed": world_size > 1,
        "rank": rank,
        "world_size": world_size,
        "pin_memory": wanted.pin_memory and device.type == "cuda",
    }
    loader = create_loader(
        train_set,
        batch_size=wanted.batch_size,
        train=True,
        transform=train_transform,
        num_aug_repeats=augment.repeats,
        **processes,
    )
    val_loader = create_loader(
        val_set,
        batch_size=wanted.eval_batch_size or wanted.batch_size,
        train=False,
        transform=val_transform,
        **processes,
    )
    return loader, val_loader


def build_loss(config: Config, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """The batch mixer (or None) and the loss that fits its targets."""
    augment, smoothing = config.augment, config.train.label_smoothing
    mixup = None
    if augment.mixup or augment.cutmix:
        mixup = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            prob=augment.mix_prob,
            switch_prob=augment.mix_switch_prob,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
    if config.train.loss == "bce":
        return mixup, BinaryCrossEntropy(smoothing=smoothing)
    if mixup is not None:
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(smoothing)


def build_optimizer(config: Config, model: nn.Module, images_per_step: int) -> torch.optim.Optimizer:
    """The optimiser over timm's parameter groups; `images_per_step` counts all processes."""
    wanted = config.optimizer
    known = [muon.NAME, *list_optimizers()]
    if wanted.name not in known:
        raise UserError(f"unknown optimizer.name '{wanted.name}'{nearest(wanted.name, known)}")
    scale = images_per_step / wanted.lr_base_batch if wanted.lr_base_batch else 1.0
    betas = {"betas": tuple(wanted.betas)} if wanted.betas else {}
    if wanted.name == muon.NAME:
        if wanted.layer_decay is not None:
            raise UserError(f"optimizer.layer_decay does not go with {muon.NAME}: its steps have one size; unset it")
        groups = muon.parameter_groups(model, wanted.weight_decay)
        return muon.GroupedMuon(groups, wanted.lr * scale, momentum=wanted.momentum, **betas)
    try:
        return create_optimizer_v2(
            model,
            opt=wanted.name,
            lr=wanted.lr * scale,
            weight_decay=wanted.weight_decay,
            momentum=wanted.momentum,
            layer_decay=wanted.layer_decay,
            **betas,
        )
    except (TypeError, ValueError, ImportError) as e:
        raise UserError(f"optimizer {wanted.name} cannot be created: {_first_line(e)}") from None


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> tuple[Scheduler, int]:
    """timm's learning-rate schedule, and the number of epochs with cooldown."""
    wanted = config.schedule
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=wanted.name,
        # timm adds the warm-up to the epochs where it is a prefix; ours are all of them.
        num_epochs=wanted.epochs - (wanted.warmup_epochs if wanted.warmup_prefix else 0),
        warmup_prefix=wanted.warmup_prefix,
        warmup_epochs=wanted.warmup_epochs,
        warmup_lr=wanted.warmup_lr,
        min_lr=wanted.min_lr,
        decay_epochs=wanted.decay_epochs,
        decay_rate=wanted.decay_rate,
        step_on_epochs=not wanted.per_update,
        updates_per_epoch=updates_per_epoch,
    )
    # The rate of the very first step; timm leaves it at the peak where there is no warm-up, which is right too.
    scheduler.step_update(0) if wanted.per_update else scheduler.step(0)
    return scheduler, wanted.epochs + wanted.cooldown_epochs


def head_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate before layer decay."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def create_any_size(name: str, args: dict[str, Any], **others: Any) -> nn.Module:
    """`timm.create_model`; takes `img_size` out of `args` for models without that argument, which any size fits."""
    try:
        return timm.create_model(name, **args, **others)
    except TypeError as e:
        if "img_size" not in args or "'img_size'" not in str(e):
            raise
        del args["img_size"]
        return timm.create_model(name, **args, **others)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0]} ({type(error).__name__})" if lines else type(error).__name__
