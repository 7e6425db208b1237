"""The training configuration: one tree of dataclasses, read from YAML and checked before anything is built.

Every key carries its own documentation; `python tools/train.py --help-config` prints all of them.
"""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from vision_mamba.errors import UserError, nearest


def _key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    may_change: bool = False,
) -> Any:
    """A documented, range-checked key. `may_change` marks keys that do not alter the weights a run ends with."""
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "choices": choices,
        "may_change": may_change,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """What is trained."""

    name: str = _key("vim_tiny_patch16_224", "timm model name; every model of this package is one")
    img_size: int | None = _key(None, "image side in pixels; null takes the model's own", low=1)
    in_chans: int = _key(3, "image channels: 1, 3 or 4 of pictures, any number of rasters", low=1)
    num_classes: int | None = _key(None, "classes of the head; null takes the number the data has", low=1)
    drop_rate: float = _key(0.0, "dropout before the head", low=0, high=0.999)
    drop_path_rate: float = _key(0.0, "stochastic depth of the last block", low=0, high=0.999)
    kwargs: dict = _key({}, "further arguments of timm.create_model")
    pretrained: bool = _key(False, "start from the published weights (needs a network)")
    checkpoint: str | None = _key(None, "start from this weights file; a head of another size is made new")
    grad_checkpointing: bool | str = _key(
        False,
        "recompute blocks in backward: a fifth of Vim's memory, 27 % slower; selective: not the scans, half, 7 %",
        choices=("true", "false", "selective"),
    )
    freeze: list[str] = _key([], "parameter-name patterns (* and ?) or module prefixes that stay fixed")


@dataclass
class DataConfig:
    """Where images come from and how they are batched."""

    source: str | None = _key(None, "'builtin', a folder, a .tar, tar shards or hfds:NAME; must be given")
    image_key: str | None = _key(None, "image column (Hugging Face) or extension (shards); null: the usual one")
    target_key: str | None = _key(None, "label column or extension; null: the usual one")
    val_fraction: float | None = _key(
        None, "part of each class held out where the source has no validation split", above=0, high=0.999
    )
    split_dir: str | None = _key(None, "folder of split lists; null: splits/ in the source, where there is one")
    train_split: str = _key("train", "name of the training split")
    val_split: str = _key("val", "name of the validation split")
    classes: list[str] | None = _key(None, "class names to use, in label order; null: the source's own")
    bands: list | None = _key(
        None, "bands of rasters to use, by number (from 1) or name; null: all; as many as model.in_chans"
    )
    check_images: bool = _key(
        True,
        "before a new run decode every image: damaged ones, other band counts or types, nothing but nodata; false for "
        "sets of millions",
        may_change=True,
    )
    cache: bool = _key(
        False,
        "decode the images once and keep them in memory, which all loader processes share; refused where they would "
        "take too much of what is free",
        may_change=True,
    )
    batch_size: int = _key(64, "images per process in one forward pass", low=1)
    eval_batch_size: int | None = _key(None, "the same in evaluation; null: batch_size", low=1, may_change=True)
    num_workers: int = _key(4, "loader processes per training process; 0 loads in line", low=0, may_change=True)
    pin_memory: bool = _key(True, "page-locked host memory (GPU only)", may_change=True)
    statistics: str | None = _key(None, "file of tools/band_statistics.py with the bands' mean and std")
    mean: list[float] | None = _key(
        None, "channel means, of 8-bit images in 0..1, of others in their own units; null takes the model's"
    )
    std: list[float] | None = _key(None, "channel standard deviations; null takes the model's")
    interpolation: str = _key("bicubic", "resize filter: bicubic, bilinear, nearest, lanczos ...")
    crop_pct: float = _key(0.875, "part of the resized image kept in evaluation", above=0, high=1)


@dataclass
class AugmentConfig:
    """Random changes of the training images."""

    library: str = _key("timm", "who transforms the images", choices=("timm", "albumentations"))
    recipe: str | None = _key(
        None,
        "named pipeline instead of the keys below up to reprob, scale and ratio excepted: overhead, overhead_geometry",
        choices=("overhead", "overhead_geometry"),
    )
    albumentations: list = _key([], "the pipeline where library is albumentations: a list of {Name: {argument: value}}")
    scale: list[float] = _key([0.08, 1.0], "range of the area of the random resized crop")
    ratio: list[float] = _key([0.75, 4 / 3], "range of width / height of the crop")
    hflip: float = _key(0.5, "probability of a left-right flip", low=0, high=1)
    vflip: float = _key(0.0, "probability of an upside-down flip", low=0, high=1)
    color_jitter: float = _key(0.0, "strength of colour jitter; auto_augment replaces it", low=0)
    auto_augment: str | None = _key(None, "timm policy, for example rand-m9-mstd0.5-inc1")
    reprob: float = _key(0.0, "probability of erasing a rectangle", low=0, high=1)
    repeats: int = _key(
        1, "repeated augmentation: times an image is shown in a row, changed each time; 1 is off", low=1
    )
    mixup: float = _key(0.0, "mixup alpha; 0 is off", low=0)
    cutmix: float = _key(0.0, "cutmix alpha; 0 is off", low=0)
    mix_prob: float = _key(1.0, "probability that a batch is mixed", low=0, high=1)
    mix_switch_prob: float = _key(0.5, "probability of cutmix where both are on", low=0, high=1)


@dataclass
class OptimizerConfig:
    """How gradients become steps."""

    name: str = _key("adamw", "timm optimiser name, or grouped_muon: Muon for matrices, AdamW for the rest")
    lr: float = _key(1e-3, "peak learning rate, scaled by lr_base_batch where that is set", above=0)
    lr_base_batch: int | None = _key(
        None, "multiply lr by (images per step over all processes) / this; null: lr as it stands", low=1
    )
    weight_decay: float = _key(0.05, "weight decay; biases, norms and no_weight_decay() names have none", low=0)
    betas: list[float] | None = _key(None, "beta1, beta2; null takes the optimiser's own")
    momentum: float = _key(0.9, "momentum of SGD-like optimisers and of Muon", low=0, high=1)
    layer_decay: float | None = _key(None, "lr factor per layer counted from the head; null is off", above=0, high=1)
    clip_grad: float | None = _key(None, "limit of the gradient; null is off", above=0)
    clip_mode: str = _key("norm", "what clip_grad limits", choices=("norm", "value"))


@dataclass
class ScheduleConfig:
    """How long, and the learning rate over time."""

    name: str = _key("cosine", "shape after warm-up", choices=("cosine", "poly", "step", "constant"))
    epochs: int = _key(300, "passes over the training split, warm-up included, cooldown not", low=1)
    warmup_epochs: int = _key(5, "linear warm-up", low=0)
    warmup_lr: float = _key(1e-6, "learning rate where warm-up starts", low=0)
    warmup_prefix: bool = _key(False, "the shape begins after warm-up; false: at epoch 0, hidden by warm-up at first")
    min_lr: float = _key(1e-5, "learning rate where the schedule ends", low=0)
    cooldown_epochs: int = _key(0, "further epochs at min_lr", low=0)
    decay_epochs: int = _key(30, "interval of the step schedule", low=1)
    decay_rate: float = _key(0.1, "factor of the step schedule, power of poly", above=0)
    per_update: bool = _key(True, "change the rate each optimiser step; false: each epoch")


@dataclass
class TrainConfig:
    """The loop."""

    seed: int = _key(0, "all randomness follows from it", low=0)
    device: str = _key("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    amp: str = _key("none", "autocast type; fp16 (GPU) adds loss scaling", choices=("none", "bf16", "fp16"))
    channels_last: bool = _key(False, "channels-last memory format (faster convolutions on GPU)")
    compile: bool = _key(False, "torch.compile the model")
    compile_mode: str = _key(
        "default",
        "reduce-overhead replays CUDA graphs: small models and batches wait for Python otherwise",
        choices=("default", "reduce-overhead", "max-autotune"),
    )
    cuda_graphs: bool = _key(
        False, "replay forward and backward as CUDA graphs: no compiler, and no waiting for Python"
    )
    accumulate: int = _key(1, "forward passes per optimiser step", low=1)
    loss: str = _key("ce", "cross entropy, or binary cross entropy per class", choices=("ce", "bce"))
    label_smoothing: float = _key(0.1, "label smoothing, also of mixed targets", low=0, high=0.999)
    ema_decay: float | None = _key(None, "decay of averaged weights; null keeps none", above=0, high=0.9999999)
    ema_warmup: bool = _key(False, "grow the decay from 0, for short runs")
    eval_every: int = _key(1, "epochs between evaluations; the last epoch always has one", low=1)
    checkpoint_every: int | None = _key(
        None,
        "optimiser steps between saves inside an epoch; null saves at its end only",
        low=1,
        may_change=True,
    )
    save_every: int = _key(
        1,
        "epochs between saves of last.pth; the last epoch and one that is the best so far always are",
        low=1,
        may_change=True,
    )
    knn_baseline: bool = _key(False, "print a nearest-neighbour accuracy beside the result", may_change=True)


@dataclass
class OutputConfig:
    """What is written where."""

    dir: str | None = _key(None, "folder of the run; null: output/<name of the config file>", may_change=True)
    log_every_s: float = _key(10.0, "seconds between lines where there is no progress bar", above=0, may_change=True)
    tensorboard: bool = _key(True, "write TensorBoard event files", may_change=True)
    plots: bool = _key(True, "write curves.png and confusion.png", may_change=True)


@dataclass
class Config:
    """The whole configuration of a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `section.key=value` overrides, checks types, ranges and combinations.

    Args:
        path: YAML file with (some of) the sections of `Config`.
        overrides: Strings such as `optimizer.lr=1e-3`; values are YAML, so `null`, `[1, 2]` and `true` work.

    Raises:
        UserError: The file cannot be read, a key is unknown (the nearest known one is named), or a value has the
            wrong type, is out of range, or contradicts another.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"config file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"config file {path} cannot be read: {e}") from None
    except yaml.YAMLError as e:
        raise UserError(f"config file {path} is not valid YAML: {' '.join(str(e).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} must hold sections such as 'model:', not a {type(tree).__name__}")
    for text in overrides:
        _apply_override(tree, text)
    config = config_from_dict(tree)
    check_combinations(config)
    return config


def config_from_dict(tree: dict) -> Config:
    """Builds a `Config` from nested dictionaries; raises UserError as `load_config` does."""
    return _build(Config, tree, "")


def config_to_dict(config: Config) -> dict:
    """The configuration as plain dictionaries: YAML and `torch.load(weights_only=True)` safe."""
    return asdict(config)


def dump_config(config: Config) -> str:
    """The configuration as YAML text, every key present."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def changed_keys(old: dict, new: dict) -> list[str]:
    """Dotted names of the keys in which two configurations differ and which decide the weights of a run.

    Keys declared `may_change` (logging, workers, where files go) are left out, as are keys only one of them knows:
    an older release's file then counts as having the default.
    """
    old, new = _flat(old), _flat(new)
    names = []
    for section in fields(Config):
        for key in fields(getattr(Config(), section.name)):
            name = f"{section.name}.{key.name}"
            if not key.metadata["may_change"] and old[name] != new[name]:
                names.append(name)
    return names


def _flat(tree: dict) -> dict[str, Any]:
    """All keys by dotted name, defaults filled in, unknown ones dropped (files written by other releases)."""
    defaults = config_to_dict(Config())
    return {
        f"{section}.{key}": tree.get(section, {}).get(key, value)
        for section, keys in defaults.items()
        for key, value in keys.items()
    }


def help_table() -> str:
    """One line for each key: name, type, default, meaning; the text of `--help-config`."""
    lines = []
    for section in fields(Config):
        cls = type(getattr(Config(), section.name))
        hints = typing.get_type_hints(cls)
        lines.append(f"\n{section.name}: {cls.__doc__}")
        for key in fields(cls):
            default = key.default if key.default is not MISSING else key.default_factory()
            default = yaml.safe_dump(default, default_flow_style=True).replace("\n...", "").strip()
            meaning = key.metadata["help"] + _range_text(key.metadata)
            if key.metadata["may_change"]:
                meaning += " [may change on --resume]"
            lines.append(
                f"  {section.name + '.' + key.name:30s} {_type_name(hints[key.name]):20s} {default:24s} {meaning}"
            )
    return "\n".join([f"  {'key':30s} {'type':20s} {'default':24s} meaning", *lines])


def check_combinations(config: Config) -> None:
    """Checks values against each other; raises UserError naming both keys."""
    data, augment, optimizer, schedule = config.data, config.augment, config.optimizer, config.schedule
    if not data.source:
        raise UserError(
            "data.source is not set: give a folder, tar shards or 'builtin', e.g. data.source=path/to/images"
        )
    for name, values in (
        ("scale", augment.scale),
        ("ratio", augment.ratio),
        ("betas", optimizer.betas or [0.0, 0.0]),
    ):
        if len(values) != 2:
            raise UserError(
                f"{'optimizer' if name == 'betas' else 'augment'}.{name} must hold two numbers, not {values}"
            )
    if (augment.mixup or augment.cutmix) and data.batch_size % 2:
        raise UserError(f"augment.mixup / cutmix pair images up: data.batch_size must be even, not {data.batch_size}")
    if schedule.warmup_epochs >= schedule.epochs:
        raise UserError(
            f"schedule.warmup_epochs ({schedule.warmup_epochs}) must be less than schedule.epochs ({schedule.epochs})"
        )
    if optimizer.betas and not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"optimizer.betas must lie in 0..1, not {optimizer.betas}")
    if data.bands is not None:
        if not data.bands or not all(isinstance(b, (int, str)) and not isinstance(b, bool) for b in data.bands):
            raise UserError(f"data.bands must list band numbers (from 1) or names, not {data.bands}")
        if len(data.bands) != config.model.in_chans:
            raise UserError(
                f"data.bands picks {len(data.bands)} bands, but model.in_chans is {config.model.in_chans}: "
                f"set model.in_chans={len(data.bands)}"
            )
    if data.statistics and (data.mean is not None or data.std is not None):
        raise UserError("data.statistics and data.mean or data.std are both set: choose one")
    if augment.recipe:
        others = ("library", "albumentations", "hflip", "vflip", "color_jitter", "auto_augment", "reprob")
        changed = [name for name in others if getattr(augment, name) != getattr(AugmentConfig(), name)]
        if changed:
            raise UserError(f"augment.recipe={augment.recipe} leaves no place for augment.{changed[0]}: unset one")
    for name, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) not in (1, config.model.in_chans):
            raise UserError(f"data.{name} has {len(values)} values for model.in_chans={config.model.in_chans}")
    if data.std is not None and min(data.std) <= 0:
        raise UserError(f"data.std must be positive, not {data.std}")
    if config.train.cuda_graphs and config.train.compile:
        raise UserError("train.cuda_graphs and train.compile do not go together: unset one")
    if config.train.cuda_graphs and config.model.grad_checkpointing and config.model.drop_path_rate:
        raise UserError(
            "train.cuda_graphs with model.grad_checkpointing cannot drop the same paths again when it recomputes: "
            "set model.drop_path_rate=0, or unset one of the two"
        )
    if config.model.pretrained and config.model.checkpoint:
        raise UserError("model.pretrained and model.checkpoint are both set: choose one")


def _apply_override(tree: dict, text: str) -> None:
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {text!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: the value is not valid YAML") from None
    node = tree
    for i, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"override {text!r}: {'.'.join(parts[: i + 1])} is a value, not a section")
    node[parts[-1]] = value


def _build(cls: type, tree: dict, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    values = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if name not in known:
            raise UserError(_unknown_key(dotted))
        if is_dataclass(hints[name]):
            if value is None:
                continue
            if not isinstance(value, dict):
                raise UserError(f"config section '{dotted}' must hold keys, not {value!r}")
            values[name] = _build(hints[name], value, f"{dotted}.")
        else:
            values[name] = _checked(dotted, value, hints[name], known[name].metadata)
    return cls(**values)


def _unknown_key(dotted: str) -> str:
    names = [s.name for s in fields(Config)]
    names += [f"{s.name}.{k.name}" for s in fields(Config) for k in fields(getattr(Config(), s.name))]
    # A right key in the wrong section (or in none) is likelier than a slip of the pen: look at the last part first.
    last = dotted.rpartition(".")[2]
    near = [n for n in names if n.rpartition(".")[2] == last] or difflib.get_close_matches(dotted, names, n=1)
    if not near:
        near_last = difflib.get_close_matches(last, [n.rpartition(".")[2] for n in names], n=1)
        near = [n for n in names if n.rpartition(".")[2] in near_last]
    hint = f"; did you mean '{near[0]}'?" if near else "; --help-config lists all keys"
    return f"unknown config key '{dotted}'{hint}"


def _checked(name: str, value: Any, hint: Any, metadata: typing.Mapping[str, Any]) -> Any:
    value = _typed(name, value, hint)
    if value is None:
        return value
    text = str(value).lower() if isinstance(value, bool) else value  # as YAML has it
    if metadata["choices"] and text not in metadata["choices"]:
        hint = nearest(text, metadata["choices"])
        raise UserError(f"{name} must be one of {', '.join(metadata['choices'])}, not {value!r}{hint}")
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    # Written so that NaN fails too.
    if (
        (low is not None and not value >= low)
        or (high is not None and not value <= high)
        or (above is not None and not value > above)
    ):
        raise UserError(f"{name} = {value} is out of range{_range_text(metadata)}")
    return value


def _typed(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if bool in options and isinstance(value, bool):
        return value
    kind = next((o for o in options if o not in (type(None), bool)), bool)
    if kind is float:
        # YAML 1.1 reads 1e-3 (no dot) as a string.
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif kind in (int, str, dict, list) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    elif typing.get_origin(kind) is list and isinstance(value, (list, tuple)):
        (item,) = typing.get_args(kind)
        return [_typed(f"{name}[{i}]", v, item) for i, v in enumerate(value)]
    raise UserError(f"{name} must be {_type_name(hint)}, not {value!r}")


def _type_name(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join("null" if o is type(None) else _type_name(o) for o in typing.get_args(hint))
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "a mapping",
        list: "a list",
        list[float]: "a list of numbers",
        list[str]: "a list of texts",
    }
    return names[hint]


def _range_text(metadata: typing.Mapping[str, Any]) -> str:
    parts = []
    if metadata["choices"]:
        parts.append("one of " + ", ".join(metadata["choices"]))
    if metadata["low"] is not None:
        parts.append(f">= {metadata['low']:g}")
    if metadata["above"] is not None:
        parts.append(f"> {metadata['above']:g}")
    if metadata["high"] is not None:
        parts.append(f"<= {metadata['high']:g}")
    return f" ({', '.join(parts)})" if parts else ""
