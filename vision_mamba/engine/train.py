"""The training loop of `tools/train.py`.

All randomness is a function of (seed, epoch, batch, process): the generators are seeded anew for every batch, and the
loader's order and augmentation follow the same rule. A checkpoint therefore needs no generator states, and a run that
was killed and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from vision_mamba.data import knn_baseline
from vision_mamba.engine import build, checkpoint
from vision_mamba.engine.config import Config, changed_keys, config_to_dict, dump_config
from vision_mamba.engine.distributed import (
    all_sum,
    all_true,
    barrier,
    share_buffers,
    start_processes,
    stop_processes,
)
from vision_mamba.engine.evaluate import AMP_DTYPES, evaluate, write_per_class
from vision_mamba.engine.graphs import Replayed
from vision_mamba.engine.logs import EpochLog, Progress
from vision_mamba.engine.plots import plot_confusion, plot_curves
from vision_mamba.errors import UserError
from vision_mamba.files import only_writer

METRICS = ("loss", "top1", "top5", "precision", "recall", "f1")  # of `evaluate`; there is no top5 below five classes


def train(config: Config, output: Path, *, resume: str | Path | None = None) -> dict[str, Any]:
    """Trains a classifier as `config` says and writes the run to `output`.

    Everything that can be wrong with the configuration, the data, the model or the checkpoint is found before
    `output` is created. Under torchrun each process calls this; the first one writes.

    Args:
        config: What to train.
        output: Folder of the run: `config.yaml`, `last.pth`, `best.pth`, `log.csv`, `curves.png`, `confusion.png`,
            `per_class.csv`, `tensorboard/`.
        resume: None starts a new run and wants `output` free of one; "auto" continues from `output/last.pth` where
            there is one and starts anew otherwise; a path continues from that checkpoint, which lies in `output`.

    Returns:
        `{"last": metrics, "best": metrics, "best_epoch": int, "knn": accuracy or None, "train_loss": float,
        "images_per_s": float, "parameters": int}`; metrics as `evaluate` gives. The loss is the last epoch's mean, the
        speed the median of all epochs; what is logged is None in all processes but the first.

    Raises:
        UserError: Something in the configuration or the data is wrong, another process is writing to `output`, or the
            loss stopped being finite.
    """
    with contextlib.ExitStack() as held:
        return _train(config, output, resume, held)


def _train(config: Config, output: Path, resume: str | Path | None, held: contextlib.ExitStack) -> dict[str, Any]:
    device, rank, world_size = start_processes(config.train.device)
    main = rank == 0
    if device.type == "cpu" and config.train.amp == "fp16":
        raise UserError("train.amp=fp16 needs a GPU; use bf16 on the CPU")
    if config.train.cuda_graphs and device.type == "cpu":
        raise UserError("train.cuda_graphs needs a GPU; unset it")
    saved = find_state(output, resume)
    seed_all(config.train.seed)

    # Data and model.
    train_set, val_set = build.open_data(config)
    classes = list(train_set.classes)
    new = saved is None
    model, model_args = build.build_model(config, len(classes), pretrained=config.model.pretrained and new)
    data_config = build.input_config(config, model, train_set)
    model.to(device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    build.try_forward(model, data_config["input_size"], config.model.name, device)
    loaded = ""
    if config.model.checkpoint and new:
        loaded = build.load_initial_weights(model, config.model.checkpoint)
    build.freeze(model, config.model.freeze)
    loader, val_loader = build.build_loaders(config, data_config, train_set, val_set, device, rank, world_size)
    mixup, criterion = build.build_loss(config, len(classes))

    # Optimisation.
    batches, accumulate = len(loader), config.train.accumulate
    updates_per_epoch = -(-batches // accumulate)
    optimizer = build.build_optimizer(config, model, config.data.batch_size * accumulate * world_size)
    scheduler, epochs = build.build_schedule(config, optimizer, updates_per_epoch)
    amp_dtype = AMP_DTYPES[config.train.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    ema = None
    if config.train.ema_decay:
        ema = ModelEmaV3(model, decay=config.train.ema_decay, use_warmup=config.train.ema_warmup)

    # Where to begin.
    start_epoch = start_batch = 0
    best = {"epoch": 0, "top1": -1.0, "loss": 0.0}
    meter = torch.zeros(2, dtype=torch.float64)  # loss summed over images, and images, of this epoch so far
    if saved is not None:
        check_same_run(saved, config, data_config, classes, len(train_set), world_size)
        model.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        scaler.load_state_dict(saved["scaler"])
        if ema is not None:
            ema.module.load_state_dict(saved["state_dict_ema"])
        start_epoch, start_batch, best = saved["epoch"], saved["step_in_epoch"], saved["best"]
        if main:
            meter = torch.tensor(saved["meter"], dtype=torch.float64)
        del saved
        if not (output / checkpoint.BEST).exists():  # the run's last.pth was taken elsewhere alone
            best = {"epoch": 0, "top1": -1.0, "loss": 0.0}
    if main or config.data.cache:
        build.read_images(config, train_set, val_set, new=new)

    # Only now is anything written. All processes have passed the checks when the first one begins.
    barrier()
    meter = meter.to(device)
    log = None
    if main:
        held.enter_context(only_writer(output))
        checkpoint.remove_leftovers(output)
        checkpoint.write_text(dump_config(config), output / checkpoint.CONFIG)
        log = EpochLog(output, finished_epochs=start_epoch, tensorboard=config.output.tensorboard)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{config.model.name}: {parameters:.2f} M parameters, {len(classes)} classes, "
            f"{len(train_set)} training and {len(val_set)} validation images, {epochs} epochs of {batches} batches "
            f"on {world_size} x {device.type}"
        )
        if loaded:
            print(loaded)
        if start_epoch or start_batch:
            print(
                f"resuming at epoch {start_epoch + 1}, batch {start_batch + 1}"
                if start_epoch < epochs
                else "resuming: all epochs are done"
            )

    net: nn.Module = Replayed(model) if config.train.cuda_graphs else model
    if world_size > 1:
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    forward = torch.compile(net, mode=config.train.compile_mode) if config.train.compile else net
    trainable = [p for p in model.parameters() if p.requires_grad]

    def state(epoch: int, step_in_epoch: int, images_seen: torch.Tensor) -> dict[str, Any]:
        return {
            "arch": config.model.name,
            "model_args": model_args,
            "classes": list(classes),
            "data_config": data_config,
            "state_dict": model.state_dict(),
            **({"state_dict_ema": ema.module.state_dict()} if ema is not None else {}),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "best": dict(best),
            "meter": images_seen.tolist(),
            "config": config_to_dict(config),
            "data": {"source": config.data.source, "train_images": len(train_set), "world_size": world_size},
        }

    def validate(network: nn.Module) -> dict[str, Any]:
        share_buffers(network)
        bar = main and sys.stderr.isatty()
        return evaluate(network, val_loader, num_classes=len(classes), device=device, amp_dtype=amp_dtype, progress=bar)

    progress = Progress(epochs=epochs, batches=batches, interval=config.output.log_every_s, enabled=main)
    result = None
    for epoch in range(start_epoch, epochs):
        loader.set_epoch(epoch, start_batch=start_batch)
        build.set_train_mode(model)
        progress.start_epoch(epoch, start_batch)
        group_loss = torch.zeros((), device=device)
        for batch, (images, targets) in enumerate(loader, start=start_batch):
            seed_all(config.train.seed, epoch, batch, rank)
            targets = targets.to(device, non_blocking=True)
            if config.train.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if mixup is not None:
                images, targets = mixup(images, targets)

            # The last group of an epoch may be short; its mean is taken over what it has.
            group = min(accumulate, batches - batch // accumulate * accumulate)
            is_update = (batch + 1) % accumulate == 0 or batch + 1 == batches
            waiting = net.no_sync() if world_size > 1 and not is_update else contextlib.nullcontext()
            with waiting:
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    loss = criterion(forward(images), targets)
                scaler.scale(loss / group).backward()
            group_loss += loss.detach()
            meter += torch.stack([loss.detach().double() * len(images), loss.new_tensor(len(images)).double()])

            if is_update:
                scaler.unscale_(optimizer)
                norm = get_total_norm([p.grad for p in trainable if p.grad is not None])
                # Every process must come to the same verdict, or the others would wait for it for ever.
                # With fp16 an infinite gradient is normal: the scaler skips the step and lowers its scale.
                finite = torch.isfinite(group_loss) & (torch.isfinite(norm) | scaler.is_enabled())
                if not all_true(finite) or (scaler.is_enabled() and scaler.get_scale() < 2**-10):
                    where = f"epoch {epoch + 1}, batch {batch + 1} of {batches}"
                    raise_not_finite(model, optimizer, images, where, float(group_loss / group), config)
                if config.optimizer.clip_grad and config.optimizer.clip_mode == "norm":
                    clip_grads_with_norm_(trainable, config.optimizer.clip_grad, norm)
                elif config.optimizer.clip_grad:
                    clip_grad_value_(trainable, config.optimizer.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                group_loss.zero_()
                updates = epoch * updates_per_epoch + batch // accumulate + 1
                if ema is not None:
                    ema.update(model, step=updates)
                scheduler.step_update(updates)
                every = config.train.checkpoint_every
                if every and updates % every == 0 and batch + 1 < batches:
                    images_seen = all_sum(meter)
                    if main:
                        checkpoint.save_checkpoint(state(epoch, batch + 1, images_seen), output / checkpoint.LAST)
            if progress.advance(len(images) * world_size):
                progress.show(loss=loss.item(), lr=build.head_lr(optimizer))
        progress.end_epoch()

        # End of the epoch: evaluate, log, save.
        lr = build.head_lr(optimizer)
        scheduler.step(epoch + 1)
        loss_sum, images_seen = all_sum(meter).tolist()
        row = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": loss_sum / images_seen,
            "images_per_s": progress.images_per_s,
        }
        improved = False
        if (epoch + 1) % config.train.eval_every == 0 or epoch + 1 == epochs:
            result = validate(model)
            row |= {f"val_{name}": result[name] for name in METRICS if name in result}
            if ema is not None:
                result = validate(ema.module)
                row |= {f"ema_{name}": result[name] for name in METRICS if name in result}
            improved = (result["top1"], -result["loss"]) > (best["top1"], -best["loss"])
            if improved:
                best = {"epoch": epoch + 1, "top1": result["top1"], "loss": result["loss"]}
        meter.zero_()
        start_batch = 0
        if main:
            log.add(row)
            print(epoch_line(row, epochs), flush=True)
            if improved or (epoch + 1) % config.train.save_every == 0 or epoch + 1 == epochs:
                last = state(epoch + 1, 0, meter)
                if improved:
                    weights = {k: v for k, v in last.items() if k not in ("optimizer", "scheduler", "scaler", "meter")}
                    checkpoint.save_checkpoint(weights, output / checkpoint.BEST)
                checkpoint.save_checkpoint(last, output / checkpoint.LAST)

    # The result, measured on the file a user will take.
    network = ema.module if ema is not None else model
    if result is None:  # the run had only this left to do
        result = validate(network)
    barrier()
    best_result = result
    if 0 < best["epoch"] < epochs:
        weights = checkpoint.read_checkpoint(output / checkpoint.BEST)
        network.load_state_dict(weights["state_dict_ema" if ema is not None else "state_dict"])
        best_result = validate(network)
    knn = None
    if main:
        log.close()
        if config.output.plots:
            plot_curves(log.rows, output / "curves.png")
            plot_confusion(best_result["confusion"], classes, output / "confusion.png")
        write_per_class(best_result, classes, output / "per_class.csv")
        if config.train.knn_baseline:
            knn = knn_baseline(train_set, val_set)
        print_result(output, epochs, result, best["epoch"], best_result, knn, averaged=ema is not None)
    stop_processes()
    rows = log.rows if log is not None else []
    return {
        "last": result,
        "best": best_result,
        "best_epoch": best["epoch"],
        "knn": knn,
        "train_loss": rows[-1]["train_loss"] if rows else None,
        "images_per_s": median(row["images_per_s"] for row in rows) if rows else None,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def seed_all(*key: int) -> None:
    """Seeds Python's, NumPy's and torch's generators from a tuple such as (seed, epoch, batch, process)."""
    low, high = (int(word) for word in np.random.SeedSequence(key).generate_state(2))
    random.seed(low)
    np.random.seed(low)
    torch.manual_seed(high << 32 | low)


def find_state(output: Path, resume: str | Path | None) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a new run; see `train` for the meaning of `resume`."""
    if resume is None:
        # A folder with config.yaml alone is of a run that died before its first checkpoint: nothing to lose.
        found = [n for n in (checkpoint.LAST, checkpoint.BEST, checkpoint.LOG) if (output / n).exists()]
        if found:
            raise UserError(
                f"{output} already holds a run ({found[0]}): continue it with --resume auto, "
                "or choose another folder with --output"
            )
        return None
    if resume == "auto":
        path = output / checkpoint.LAST
        return checkpoint.read_training_state(path) if path.exists() else None
    return checkpoint.read_training_state(Path(resume))


def check_same_run(
    saved: dict[str, Any],
    config: Config,
    data_config: dict[str, Any],
    classes: list[str],
    images: int,
    processes: int,
) -> None:
    """Raises UserError naming what differs between a checkpoint's run and this one."""
    keys = changed_keys(saved["config"], config_to_dict(config))
    if keys:
        raise UserError(
            f"the checkpoint was trained with another configuration; these keys differ: {', '.join(keys)}. "
            "Restore them, or start a new run with model.checkpoint"
        )
    data = saved["data"]
    if saved["classes"] != classes or data["train_images"] != images:
        raise UserError(
            f"the data changed since the checkpoint: {len(saved['classes'])} classes and {data['train_images']} "
            f"training images then, {len(classes)} and {images} now"
        )
    for name in ("mean", "std"):
        if saved["data_config"][name] != data_config[name]:
            raise UserError(
                f"the images' {name} is no longer that of the checkpoint ({config.data.statistics or 'the model'} has "
                "changed); restore it, or start a new run with model.checkpoint"
            )
    if data["world_size"] != processes:
        raise UserError(
            f"the checkpoint was trained by {data['world_size']} processes, this run has {processes}: "
            "start as many, or start a new run with model.checkpoint"
        )


def raise_not_finite(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    where: str,
    loss: float,
    config: Config,
) -> None:
    """Raises a UserError that says where training broke and what to try; nothing was stepped or saved since."""
    culprit = ""
    if not torch.isfinite(images).all():
        culprit = "the images themselves hold non-finite values (check data.mean and data.std)"
    for name, parameter in model.named_parameters():
        if culprit:
            break
        if not torch.isfinite(parameter).all():
            culprit = f"first non-finite parameter: {name}"
    for name, parameter in model.named_parameters():
        if culprit:
            break
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            culprit = f"first non-finite gradient: {name}"
    tries = [f"a lower optimizer.lr than {config.optimizer.lr:g}"]
    if config.optimizer.clip_grad is None:
        tries.append("optimizer.clip_grad=1")
    if config.schedule.warmup_epochs < 5:
        tries.append("a longer schedule.warmup_epochs")
    if config.train.amp != "none":
        tries.append("train.amp=" + ("bf16" if config.train.amp == "fp16" else "none"))
    raise UserError(
        f"training stopped at {where}: loss {loss:g}, lr {build.head_lr(optimizer):.3g}; "
        f"{culprit or 'the loss itself overflowed'}. Try {', or '.join(tries)}. The last checkpoint is intact"
    )


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """One epoch's numbers for the console; accuracies in per cent."""
    text = f"epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.4f}"
    for name in ("val", "ema"):
        if f"{name}_top1" in row:
            text += (
                f"  {name} loss {row[f'{name}_loss']:.4f} top-1 {row[f'{name}_top1']:.2%} F1 {row[f'{name}_f1']:.2%}"
            )
    return f"{text}  {row['images_per_s']:.1f} images/s"


def print_result(
    output: Path,
    epochs: int,
    last: dict[str, Any],
    best_epoch: int,
    best: dict[str, Any],
    knn: float | None,
    *,
    averaged: bool,
) -> None:
    """Prints the closing table and where everything is."""
    rows = [(f"last epoch ({epochs})", last), (f"best epoch ({best_epoch})", best)]
    print(
        f"\n{'validation' + (', averaged weights' if averaged else ''):36s}{'top-1':>9s}{'top-5':>9s}"
        f"{'precision':>11s}{'recall':>9s}{'F1':>9s}{'loss':>9s}"
    )
    for name, result in rows:
        top5 = f"{result['top5']:.2%}" if "top5" in result else "-"
        macro = f"{result['precision']:11.2%}{result['recall']:9.2%}{result['f1']:9.2%}"
        print(f"{name:36s}{result['top1']:9.2%}{top5:>9s}{macro}{result['loss']:9.4f}")
    if knn is not None:
        print(f"{'nearest neighbours on pixels':36s}{knn:9.2%}")
    names = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    print(f"\nwritten to {output}: {', '.join(names)}")
