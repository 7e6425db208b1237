"""Compare a model of ours with a case of an official implementation (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

import vision_mamba
from tests.golden import recipe

FOLDER = Path(__file__).parent.parent / "golden"


def load_case(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def check_case(case: dict, model: torch.nn.Module, *, tolerance: float, dtype=torch.float32, device="cpu") -> None:
    """Outputs, input gradient and every parameter's gradient, relative to the official float64 run.

    A model that gives a list of maps (``features_only``) is compared with ``level0``, ``level1`` ...
    """
    names = dict(case["state_dict"])
    official = {k: torch.from_numpy(v) for k, v in recipe.make_state(case["state_dict"]).items()}
    vision_mamba.load_checkpoint(model, official)
    inner = getattr(model, "model", model)  # of a features_only model
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    model = model.to(device=device, dtype=dtype).eval()
    torch.backends.cudnn.allow_tf32 = False  # on a GPU the patch embedding would be the one rounded to TF32

    shape = case["input"]["shape"]
    x = torch.from_numpy(recipe.make_input(shape, case["input"]["seed"])).to(device=device, dtype=dtype)
    x.requires_grad_()
    out = model(x)
    outputs = {f"level{i}": level for i, level in enumerate(out)} if isinstance(out, list) else {"out": out}
    loss = sum(
        (value * torch.from_numpy(recipe.loss_weights(i, value.shape)).to(value)).sum()
        for i, value in enumerate(outputs.values())
    )
    loss.backward()

    reference = case.get("float64") or case["float32"]
    assert outputs.keys() == reference["outputs"].keys()
    for name, value in outputs.items():
        _check_digest(name, value, reference["outputs"][name], tolerance)
    grad = reference["grad"]
    _check_digest("input gradient", x.grad, grad["input"], tolerance)
    # The mapping of names moves whole official tensors into rows of ours: send their numbers and their noise
    # through it, and each element of our gradients knows its official tensor and direction.
    numbers = {key: torch.full(s, float(i), dtype=torch.float64) for i, (key, s) in enumerate(names.items())}
    noise = {key: torch.from_numpy(recipe.noise(key, s)) for key, s in names.items()}
    numbers, noise = inner.filter_checkpoint(numbers), inner.filter_checkpoint(noise)
    l2, dot = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    keys = list(names)
    for name, parameter in inner.named_parameters():
        gradient = parameter.grad.detach().double().cpu()
        for i in numbers[name].unique().long().tolist():
            of_key = numbers[name] == i
            l2[keys[i]] += float((gradient[of_key] ** 2).sum())
            dot[keys[i]] += float((gradient * noise[name])[of_key].sum())
    for key, expected in grad["params"].items():
        scale = max(expected["l2"], 1e-12)
        assert abs(l2[key] ** 0.5 - expected["l2"]) <= tolerance * scale, f"gradient of {key}: norm"
        assert abs(dot[key] - expected["dot"]) <= tolerance * scale, f"gradient of {key}: direction"


def _check_digest(name: str, tensor: torch.Tensor, digest: dict, tolerance: float) -> None:
    flat = tensor.detach().double().cpu().numpy().reshape(-1)
    if "full" in digest:
        expected, actual = np.array(digest["full"]), flat
    else:
        expected, actual = np.array(digest["values"]), flat[recipe.sample_positions(flat.size)]
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
