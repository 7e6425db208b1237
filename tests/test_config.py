"""The training configuration: documentation, types, ranges, unknown keys, and the files in configs/."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
import yaml

import vision_mamba  # noqa: F401  (registers the models)
from vision_mamba.data import RECIPES
from vision_mamba.engine.build import build_optimizer, build_schedule, head_lr
from vision_mamba.engine.config import (
    AugmentConfig,
    Config,
    changed_keys,
    config_to_dict,
    dump_config,
    help_table,
    load_config,
)
from vision_mamba.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "classification").glob("*.yaml"))


def load(tmp_path, text="", *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_loads(path):
    config = load_config(path, [] if path.stem == "quickstart" else ["data.source=somewhere"])
    assert timm.is_model(config.model.name)


def test_recipe_names_are_the_transforms():
    (key,) = (k for k in fields(AugmentConfig) if k.name == "recipe")
    assert key.metadata["choices"] == tuple(RECIPES)
    assert all(name in key.metadata["help"] for name in RECIPES)


def test_recipes_wait_for_the_users_data():
    with pytest.raises(UserError, match="data.source is not set"):
        load_config(next(p for p in CONFIGS if p.stem == "vim_tiny_imagenet"))


def test_every_key_is_in_the_help_table():
    table = help_table()
    for section in fields(Config):
        for key in fields(getattr(Config(), section.name)):
            assert f"  {section.name}.{key.name} " in table
            assert key.metadata["help"] in table


def test_overrides_and_numbers_without_a_dot(tmp_path):
    config = load(tmp_path, "optimizer: {lr: 1e-3}", "data.source=x", "optimizer.lr=5e-4", "model.freeze=[head, 'a.*']")
    assert config.optimizer.lr == 5e-4
    assert config.model.freeze == ["head", "a.*"]


@pytest.mark.parametrize("checkpointing", ["false", "true", "selective"])
def test_saved_config_loads_again(tmp_path, checkpointing):
    config = load(tmp_path, "", "data.source=x", "augment.mixup=0.2", f"model.grad_checkpointing={checkpointing}")
    assert config.model.grad_checkpointing == yaml.safe_load(checkpointing)
    assert config_to_dict(load(tmp_path, dump_config(config))) == config_to_dict(config)


def test_changed_keys_skips_what_may_change():
    old = config_to_dict(Config())
    new = yaml.safe_load(yaml.safe_dump(old))
    new["output"]["dir"] = "elsewhere"
    new["data"]["num_workers"] = 9
    assert changed_keys(old, new) == []
    new["optimizer"]["lr"] = 7.0
    assert changed_keys(old, new) == ["optimizer.lr"]


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("model: {nam: x}", "data.source=x", "unknown config key 'model.nam'; did you mean 'model.name'"),
        ("modle: {name: x}", "data.source=x", "unknown config key 'modle'; did you mean 'model'"),
        ("", "lr=1", "did you mean 'optimizer.lr'"),
        ("", "train.lr=1", "did you mean 'optimizer.lr'"),
        ("", "optimizer.lr=abc", "optimizer.lr must be a number, not 'abc'"),
        ("", "optimizer.lr=.nan", "optimizer.lr = nan is out of range"),
        ("", "data.batch_size=0", "data.batch_size = 0 is out of range"),
        ("", "data.batch_size=1.5", "data.batch_size must be an integer"),
        ("", "train.compile=1", "train.compile must be true or false"),
        ("", "train.amp=bf61", "did you mean 'bf16'"),
        ("train: {compile: true, cuda_graphs: true}", "data.source=x", "train.cuda_graphs and train.compile"),
        (
            "model: {grad_checkpointing: true, drop_path_rate: 0.1}\ntrain: {cuda_graphs: true}",
            "data.source=x",
            "train.cuda_graphs with model.grad_checkpointing cannot drop the same paths again",
        ),
        ("", "model.grad_checkpointing=selectiv", "one of true, false, selective, .*did you mean 'selective'"),
        ("", "model.grad_checkpointing=1", "model.grad_checkpointing must be true or false or text"),
        ("", "model.freeze=head", "model.freeze must be a list of texts"),
        ("", "seven", "not of the form section.key=value"),
        ("model: 3", "data.source=x", "config section 'model' must hold keys"),
        ("- 3", "data.source=x", "must hold sections"),
        ("a: [", "data.source=x", "is not valid YAML"),
        ("augment: {mixup: 0.5}\ndata: {batch_size: 7}", "data.source=x", "data.batch_size must be even"),
        ("schedule: {epochs: 3, warmup_epochs: 3}", "data.source=x", "schedule.warmup_epochs"),
        ("data: {mean: [0.5, 0.5]}", "data.source=x", "data.mean has 2 values"),
        ("data: {bands: [4, 3]}", "data.source=x", "data.bands picks 2 bands, but model.in_chans is 3"),
        ("data: {bands: []}", "data.source=x", "data.bands must list band numbers"),
        ("data: {bands: [1, 2, true]}", "data.source=x", "data.bands must list band numbers"),
        ("data: {statistics: s.yaml, mean: [0.5]}", "data.source=x", "data.statistics and data.mean"),
        ("augment: {recipe: overhed}", "data.source=x", "did you mean 'overhead'"),
        ("augment: {recipe: overhead, vflip: 0.5}", "data.source=x", "leaves no place for augment.vflip"),
        ("augment: {recipe: overhead, reprob: 0.1}", "data.source=x", "leaves no place for augment.reprob"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, text, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text, override)
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(UserError, match="config file not found"):
        load_config("nowhere.yaml")


def test_warmup_prefix_is_the_official_vmamba_schedule():
    """Liu et al.'s utils/lr_scheduler.py: a linear warm-up, then a whole cosine over the remaining epochs."""
    path = next(p for p in CONFIGS if p.stem == "vmamba_imagenet")
    config = load_config(path, ["data.source=x"])
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), images_per_step=1024)
    scheduler, epochs = build_schedule(config, optimizer, updates_per_epoch=100)
    assert epochs == 300
    peak, first, last, warm, total = 1e-3, 1e-6, 1e-5, 2000, 30_000
    for t in (0, 100, 1999, 2000, 2001, 16_000, 29_999):
        scheduler.step_update(t)
        cosine = last + (peak - last) * (1 + math.cos(math.pi * (t - warm) / (total - warm))) / 2
        expected = first + t * (peak - first) / warm if t < warm else cosine
        assert head_lr(optimizer) == pytest.approx(expected, rel=1e-9), t
