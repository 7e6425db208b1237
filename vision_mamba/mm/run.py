"""The tools {train,test,predict}_{seg,det}.py: arguments, checks and pictures around mmengine's Runner."""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config, DictAction
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import find_latest_checkpoint
from timm.utils import reparameterize_model

from ..checkpoint import find_state_dict, read_checkpoint
from ..data import is_image_name
from ..errors import UserError
from ..files import replacing
from .backbone import VisionMambaBackbone
from .checks import check_config
from .hooks import draw_sample

Task = Literal["seg", "det"]
_SCOPES = {"seg": "mmseg", "det": "mmdet"}
_AMP = {"bf16": "bfloat16", "fp16": "float16"}


def main_train(task: Task, doc: str, argv: list[str] | None = None) -> None:
    """``tools/train_{task}.py``."""
    parser = _parser(doc)
    parser.add_argument("config", help=f"Python config, see configs/{_folder(task)}/")
    _add_shared(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: continue the run in the output folder, if any; or a checkpoint to continue from",
    )
    parser.add_argument("--load-from", metavar="FILE", help="start from the weights of a whole model, heads included")
    parser.add_argument("--amp", choices=("none", *_AMP), default="none", help="autocast type (GPU only)")
    parser.add_argument("--seed", type=int, help="of all randomness")
    parser.add_argument("--no-data-check", action="store_true", help="do not look through the data before the run")
    args = parser.parse_args(argv)

    cfg = load_config(args.config, task, args.cfg_options, data_root=args.data_root, workers=args.workers)
    output = Path(args.output or cfg.get("work_dir") or Path("output") / Path(args.config).stem)
    cfg.work_dir = str(output)
    latest = find_latest_checkpoint(str(output)) if output.is_dir() else None
    if args.resume is None and latest:
        raise UserError(
            f"{output} already holds a run ({latest}): continue it with --resume auto, or give another --output"
        )
    if args.resume not in (None, "auto") and not Path(args.resume).is_file():
        raise UserError(f"--resume {args.resume}: no such checkpoint")
    checkpoint = latest if args.resume == "auto" else args.resume
    if checkpoint:
        cfg.load_from, cfg.resume = checkpoint, True
        cfg.model.backbone.pretrained = False
        cfg.model.backbone.init_cfg = None
    if args.seed is not None:
        cfg.randomness = dict(seed=args.seed)
    if args.amp != "none":
        if not torch.cuda.is_available():
            raise UserError("--amp needs a GPU, and PyTorch sees none")
        cfg.optim_wrapper = dict(cfg.optim_wrapper, type="AmpOptimWrapper", dtype=_AMP[args.amp])

    loaders = ["train_dataloader", *(["val_dataloader"] if cfg.get("val_dataloader") else [])]
    if not args.no_data_check:
        _warn(check_config(cfg, loaders))
    runner = _build_runner(cfg)
    if args.load_from:
        load_weights(runner.model, args.load_from, allow_new_heads=True)
    runner.train()
    if _is_main():
        pictures = [str(p) for p in (output / "curves.png", output / "predictions") if p.exists()]
        print(f"done; checkpoints, logs and {' and '.join(pictures) or 'no pictures'} in {output}")


def main_test(task: Task, doc: str, argv: list[str] | None = None) -> None:
    """``tools/test_{task}.py``."""
    parser = _parser(doc)
    parser.add_argument("config", help=f"Python config, see configs/{_folder(task)}/")
    parser.add_argument("checkpoint", help="weights of the whole model: ours, mmengine's or an official file")
    _add_shared(parser)
    parser.add_argument("--no-data-check", action="store_true", help="do not look through the data first")
    args = parser.parse_args(argv)

    cfg = load_config(args.config, task, args.cfg_options, data_root=args.data_root, workers=args.workers)
    output = Path(args.output or Path(args.checkpoint).parent / "test")
    _without_initial_weights(cfg)
    cfg.work_dir, cfg.load_from, cfg.resume = str(output), None, False
    if not Path(args.checkpoint).is_file():
        raise UserError(f"no checkpoint file {args.checkpoint}")
    if not args.no_data_check:
        _warn(check_config(cfg, ["test_dataloader"]))
    runner = _build_runner(cfg)
    load_weights(runner.model, args.checkpoint)
    metrics = runner.test()
    if not metrics:
        raise UserError(f"{args.checkpoint} found nothing in any image of the test data: there is no score to give")
    if _is_main():
        report = {"config": args.config, "checkpoint": args.checkpoint, "metrics": metrics}
        with replacing(output / "metrics.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1, default=float) + "\n")
        print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))))
        print(f"wrote {output / 'metrics.json'} and pictures in {output / 'predictions'}")


def main_predict(task: Task, doc: str, argv: list[str] | None = None) -> None:
    """``tools/predict_{task}.py``."""
    parser = _parser(doc)
    parser.add_argument("config", help="the config that the model was trained with")
    parser.add_argument("checkpoint", help="weights of the whole model")
    parser.add_argument("images", nargs="+", help="image files or folders (searched through)")
    parser.add_argument("--output", metavar="DIR", help="default: predictions/ beside the checkpoint")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU if there is one"
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, help="config keys to set: a.b=value")
    if task == "det":
        parser.add_argument("--score-thr", type=float, default=0.3, help="leave out boxes below (default: %(default)s)")
    args = parser.parse_args(argv)

    import mmcv

    images = find_images(args.images)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    model = open_model(task, args.config, args.checkpoint, device=device, options=args.cfg_options)
    cfg = model.cfg

    output = Path(args.output or Path(args.checkpoint).parent / "predictions")
    score_thr = getattr(args, "score_thr", 0.0)
    visualizer = _visualizer(cfg, model.dataset_meta)
    found, skipped = [], 0
    stems = Counter(path.stem for path in images)
    for number, path in enumerate(images):
        name = path.stem if stems[path.stem] == 1 else f"{path.stem}_{number}"
        if mmcv.imread(path) is None:
            skipped += 1
            print(f"skipped: {path} is not a readable image", file=sys.stderr)
            continue
        sample = _infer(task, model, path)
        draw_sample(visualizer, sample, output / "overlays" / f"{name}.png", score_thr=score_thr, draw_gt=False)
        if task == "seg":
            entry = _write_mask(sample, path, output / "masks" / f"{name}.png", model.dataset_meta)
        else:
            entry = _boxes(sample, path, score_thr, model.dataset_meta)
        found.append(entry)
        print(_line(entry))
    if not found:
        raise UserError(f"none of the {len(images)} images could be read; see the lines above")
    with replacing(output / "predictions.json") as temporary:
        temporary.write_text(
            json.dumps({"classes": list(model.dataset_meta["classes"]), "images": found}, indent=1) + "\n"
        )
    print(f"{len(found)} images, {skipped} skipped; wrote {output}")


def load_config(
    path: str,
    task: Task,
    options: dict[str, Any],
    *,
    data_root: str | None = None,
    workers: int | None = None,
) -> Config:
    """A config with options set.

    ``data_root`` (or the option of that name) goes to every data set and evaluator, which mmengine's ``--cfg-options``
    alone does not do: they took the old value when the file was read.

    Raises:
        UserError: no such file, an error in it, or a config of the other task.
    """
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        raise UserError(f"config {path}: {error}") from None
    except Exception as error:  # a config is a program
        raise UserError(f"config {path} cannot be read: {type(error).__name__}: {error}") from None
    if cfg.get("model") is None:
        raise UserError(f"config {path} has no model: it is a part for others; take one from configs/{_folder(task)}/")
    scope = cfg.get("default_scope")
    if scope != _SCOPES[task]:
        raise UserError(f"config {path} is for {scope}, this tool for {_SCOPES[task]}; take configs/{_folder(task)}/")
    old_root = cfg.get("data_root")
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, AssertionError) as error:
        raise UserError(f"--cfg-options does not fit the config: {error}") from None
    root = data_root or (cfg.data_root if cfg.get("data_root") != old_root else None)
    if root:
        for key in ("train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator"):
            _move_data(cfg.get(key), str(old_root or ""), root)
    if workers is not None:
        for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
            if cfg.get(key):
                cfg[key].update(num_workers=workers, persistent_workers=workers > 0)
    if not torch.cuda.is_available():
        cfg.setdefault("env_cfg", {}).setdefault("dist_cfg", {})["backend"] = "gloo"
    cfg.launcher = "pytorch" if "LOCAL_RANK" in os.environ else "none"
    init_default_scope(scope)  # the checks look into its registries before the runner does
    return cfg


def load_weights(model: torch.nn.Module, path: str, *, allow_new_heads: bool = False) -> dict[str, Any]:
    """Loads a whole model; official VMamba names in the backbone become ours.

    Args:
        model: segmentor or detector.
        path: the file.
        allow_new_heads: leave out tensors of another shape, such as those of heads with other classes.

    Returns:
        The file's ``meta``, with ``dataset_meta`` where mmengine wrote it.

    Raises:
        UserError: no such file, or tensors missing or unexpected.
    """
    try:
        loaded = read_checkpoint(path)
        state = find_state_dict(loaded, source=path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    if is_model_wrapper(model):
        model = model.module
    own = model.state_dict()
    reshaped = [name for name, t in state.items() if name in own and own[name].shape != t.shape]
    if reshaped and allow_new_heads:
        _warn([f"{len(reshaped)} tensors of {path} have another shape and start anew: {', '.join(reshaped[:4])} ..."])
        for name in reshaped:
            state[name] = own[name]
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes: one line a tensor
        lines = str(error).splitlines()[1:]
        raise UserError(
            f"{path} does not fit the model of the config: {len(lines)} tensors differ, first: {lines[0].strip()}"
        ) from None
    # mmdet's anchors and the preprocessor's means are buffers that not every release saves.
    missing = [n for n in result.missing_keys if not n.startswith("data_preprocessor.")]
    for kind, names in (("lacks", missing), ("has unknown", result.unexpected_keys)):
        if names:
            shown = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
            raise UserError(f"{path} does not fit the model of the config: it {kind} {len(names)} tensors: {shown}")
    return loaded.get("meta") or {}


def open_model(
    task: Task,
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    options: dict[str, Any] | None = None,
) -> Any:
    """A segmentor or detector with its weights, for evaluation; its ``dataset_meta`` has classes and palette.

    On a GPU a backbone of ours is in its form for inference (``timm.utils.reparameterize_model``).

    Raises:
        UserError: no such file, a config of the other task, or weights that do not fit.
    """
    cfg = load_config(str(config), task, options or {})
    _without_initial_weights(cfg)
    model = _build_model(cfg)
    meta = load_weights(model, str(checkpoint))
    model.cfg, model.dataset_meta = cfg, _dataset_meta(cfg, meta)
    model = model.to(device).eval()
    if isinstance(model.backbone, VisionMambaBackbone):  # no other: what mmdet's modules call fuse is something else
        reparameterize_model(model.backbone, inplace=True)
    return model


def find_images(arguments: list[str]) -> list[Path]:
    """Image files that files and folders name, each once.

    Raises:
        UserError: an argument that names nothing.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument).expanduser()
        some = sorted(p for p in path.rglob("*") if p.is_file() and is_image_name(p.name)) if path.is_dir() else [path]
        if not some or not some[0].exists():
            raise UserError(f"no image {argument}; give a file or a folder with images")
        found.update(dict.fromkeys(some))
    return list(found)


def _parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", "--work-dir", metavar="DIR", help="folder of the results")
    parser.add_argument("--data-root", metavar="DIR", help="where the data lies, in place of the config's data_root")
    parser.add_argument("--workers", type=int, help="loader processes; 0 loads in line")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="config keys to set: a.b=value",
    )


def _folder(task: Task) -> str:
    return {"seg": "segmentation", "det": "detection"}[task]


def _move_data(node: Any, old_root: str, root: str) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "data_root":
                node[key] = root
            elif key == "ann_file" and isinstance(value, str) and old_root and value.startswith(old_root):
                node[key] = str(Path(root, value[len(old_root) :].lstrip("/")))
            else:
                _move_data(value, old_root, root)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _move_data(value, old_root, root)


def _without_initial_weights(cfg: Config) -> None:
    """The checkpoint brings all weights; none are to be fetched for the backbone."""
    if "pretrained" in cfg.model.backbone:
        cfg.model.backbone.pretrained = False
    if "init_cfg" in cfg.model.backbone:
        cfg.model.backbone.init_cfg = None


def _building(build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (ValueError, RuntimeError, KeyError, TypeError, FileNotFoundError) as error:
        text = str(error)
        if "could not fetch the weights" in text:
            text += "; here: --cfg-options model.backbone.pretrained=FILE, or =False to start from scratch"
        raise UserError(f"the model or data of the config cannot be built: {text}") from error


def _build_runner(cfg: Config) -> Runner:
    # mmengine keeps visualizers by name for the life of the process, each with the folder of its first run.
    cfg.visualizer = dict(cfg.visualizer, name=f"visualizer-{uuid.uuid4().hex[:8]}")
    if cfg.launcher != "none" and not torch.cuda.is_available():  # mmengine's own start of processes asks for GPUs
        torch.distributed.init_process_group("gloo")
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    runner = _building(lambda: Runner.from_cfg(cfg))
    if cfg.launcher == "none":  # without other processes SyncBN is BatchNorm, and only that runs on a CPU
        runner.model = revert_sync_batchnorm(runner.model)
    return runner


def _build_model(cfg: Config) -> Any:
    from mmengine.registry import MODELS

    return revert_sync_batchnorm(_building(lambda: MODELS.build(cfg.model)))


def _dataset_meta(cfg: Config, meta: dict[str, Any]) -> dict[str, Any]:
    """Classes and palette: the checkpoint's, else those of the config's test data."""
    from mmengine.registry import DATASETS

    saved = meta.get("dataset_meta") or {}
    own = DATASETS.build({**cfg.test_dataloader.dataset, "lazy_init": True, "pipeline": []}).metainfo
    return {"classes": saved.get("classes") or own["classes"], "palette": saved.get("palette") or own.get("palette")}


def _visualizer(cfg: Config, dataset_meta: dict[str, Any]) -> Any:
    from mmengine.registry import VISUALIZERS

    visualizer = VISUALIZERS.build({**cfg.visualizer, "vis_backends": None, "name": f"predict-{uuid.uuid4().hex[:8]}"})
    visualizer.dataset_meta = dataset_meta
    return visualizer


def _infer(task: Task, model: Any, path: Path) -> Any:
    if task == "seg":
        from mmseg.apis import inference_model

        return inference_model(model, str(path))
    from mmdet.apis import inference_detector

    return inference_detector(model, str(path))


def _write_mask(sample: Any, path: Path, mask: Path, meta: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    labels = sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)
    picture = Image.fromarray(labels, mode="P")
    picture.putpalette([int(v) for colour in meta["palette"] for v in colour])
    with replacing(mask) as temporary:
        picture.save(temporary)
    shares = np.bincount(labels.ravel(), minlength=len(meta["classes"])) / labels.size
    order = [int(i) for i in np.argsort(-shares) if shares[i] > 0]
    return {
        "image": str(path),
        "mask": str(mask),
        "shares": {meta["classes"][i]: round(float(shares[i]), 4) for i in order},
    }


def _boxes(sample: Any, path: Path, score_thr: float, meta: dict[str, Any]) -> dict[str, Any]:
    instances = sample.pred_instances.cpu()
    instances = instances[instances.scores >= score_thr]
    classes = meta["classes"]
    boxes = [
        {"class": classes[int(label)], "score": round(float(score), 4), "bbox": [round(float(v), 1) for v in box]}
        for label, score, box in zip(instances.labels, instances.scores, instances.bboxes, strict=True)
    ]
    return {"image": str(path), "boxes": boxes}


def _line(entry: dict[str, Any]) -> str:
    if "shares" in entry:
        top = list(entry["shares"].items())[:4]
        return f"{entry['image']}  " + "  ".join(f"{name} {share:.1%}" for name, share in top)
    counts: dict[str, int] = {}
    for box in entry["boxes"]:
        counts[box["class"]] = counts.get(box["class"], 0) + 1
    return f"{entry['image']}  " + ("  ".join(f"{n} {name}" for name, n in counts.items()) or "nothing found")


def _warn(lines: list[str]) -> None:
    if _is_main():
        for line in lines:
            print(f"warning: {line}", file=sys.stderr)


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0
