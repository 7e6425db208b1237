"""Pictures of a run: curves, confusion matrix, contact sheet. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vision_mamba.files import replacing

_MAX_NAMED_CLASSES = 40
_MAX_NUMBERED_CELLS = 20


def plot_curves(csv_rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws every numeric column of a training log over its ``epoch`` column.

    Columns share a panel by kind: losses, accuracies (``top1``, ``acc`` ...), learning rate; others are left out.

    Args:
        csv_rows: one mapping an epoch; values are numbers or their text, ``""`` or None where there is none.
        path: PNG file to write.
    """
    panels: dict[str, list[str]] = {"loss": [], "accuracy": [], "learning rate": []}
    for column in csv_rows[0] if csv_rows else ():
        if "loss" in column:
            panels["loss"].append(column)
        elif "top1" in column or "top5" in column or "acc" in column:
            panels["accuracy"].append(column)
        elif column in ("lr", "learning_rate"):
            panels["learning rate"].append(column)
    used = {title: columns for title, columns in panels.items() if columns} or {"loss": []}
    figure = new_figure(4.2 * len(used), 3.4)
    for i, (title, columns) in enumerate(used.items()):
        axes = figure.add_subplot(1, len(used), i + 1)
        for column in columns:
            points = [(i, _number(row.get(column)), _number(row.get("epoch"))) for i, row in enumerate(csv_rows)]
            xs = [i if epoch is None else epoch for i, y, epoch in points if y is not None]
            ys = [y for _, y, _ in points if y is not None]
            axes.plot(xs, ys, marker="o" if len(xs) < 30 else None, markersize=3, label=column)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if columns:
            axes.legend(fontsize=8)
    save_figure(figure, path)


def plot_confusion(matrix: Any, class_names: Sequence[str], path: str | os.PathLike) -> None:
    """Draws a confusion matrix, each row as shares of its class.

    Args:
        matrix: counts (classes, classes), row = label, column = prediction; tensor, array or nested lists.
        class_names: one a row.
        path: PNG file to write.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(counts)
    named = n <= _MAX_NAMED_CLASSES
    side = min(max(4.5, 1.8 + 0.36 * n), 16)
    figure = new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if named:
        axes.set_xticks(range(n), [str(c) for c in class_names], rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(n), [str(c) for c in class_names], fontsize=8)
    if n <= _MAX_NUMBERED_CELLS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=7)
    right = np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"{counts.sum():.0f} images, top-1 {right:.2%}; colour: share of the label's images", fontsize=9)
    figure.colorbar(picture, fraction=0.046, pad=0.03)
    save_figure(figure, path)


def plot_contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], path: str | os.PathLike, *, columns: int = 6
) -> None:
    """Draws images in a grid, each over its caption.

    Args:
        images: PIL images of any size and mode.
        captions: one an image; lines are separated by newlines.
        path: PNG file to write.
        columns: images a row.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    lines = max(c.count("\n") + 1 for c in captions)
    figure = new_figure(1.9 * columns, (1.8 + 0.17 * lines) * rows)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        small = image.convert("RGB")
        small.thumbnail((256, 256))
        axes.imshow(np.asarray(small))
        axes.set_title(caption, fontsize=7)
        axes.axis("off")
    save_figure(figure, path)


def new_figure(width: float, height: float):
    """A matplotlib figure of this size in inches."""
    # Not pyplot: it keeps global state and picks a backend that may want a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(figure, path: str | os.PathLike) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
