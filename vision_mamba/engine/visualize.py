"""What a model looks at: scan paths over an image, effective receptive fields, class activation maps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vision_mamba.engine.plots import new_figure, save_figure
from vision_mamba.models._plain import PlainModel, cls_positions
from vision_mamba.paths import scan_paths

#: One of each kind of path.
EXAMPLES = ("raster", "snake", "local2", "local4", "atrous2", "diagonal", "antidiagonal", "morton", "hilbert")


def plot_paths(
    image: Image.Image, names: Sequence[str], grid: tuple[int, int], path: str | os.PathLike, *, columns: int = 5
) -> None:
    """Draws scan paths over an image, a panel each: a line through the tokens, from blue to red.

    A panel's title gives the mean length of a step, in tokens moved along rows and columns: 1 if all are to neighbours.

    Args:
        image: any image; it is stretched over the grid.
        names: of scan paths.
        grid: tokens a column and a row.
        path: PNG file to write.
        columns: panels a row.

    Raises:
        ValueError: an unknown path.
    """
    from matplotlib.collections import LineCollection

    height, width = grid
    table = scan_paths(names, height, width)
    background = np.asarray(image.convert("L"))
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    panel_height = min(max(3.0 * height / width, 1.0), 9.0)
    figure = new_figure(3.0 * columns, (panel_height + 0.35) * rows)
    for i, (name, row) in enumerate(zip(names, table.long(), strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(background, cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5), alpha=0.45)
        points = torch.stack([row % width, row // width], dim=1)
        lines = points.unfold(0, 2, 1).transpose(1, 2).numpy() if len(points) > 1 else np.zeros((0, 2, 2))
        axes.add_collection(LineCollection(list(lines), array=np.arange(len(lines)), cmap="turbo", linewidths=1.6))
        axes.plot(*points[0].tolist(), marker="o", color="black", markersize=5)
        length = float(points.diff(dim=0).abs().sum(1).float().mean()) if len(points) > 1 else 0.0
        axes.set_title(f"{name}\nmean step {length:.2f}", fontsize=9)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
    save_figure(figure, path)


def receptive_field(model: nn.Module, images: Tensor, *, batch_size: int = 8) -> Tensor:
    """Effective receptive field of the central place of the last feature map (Luo et al. 2016, arXiv 1701.04128).

    The gradient of the place's features, summed over the channels where they are positive as in figure 4 of VMamba
    (Liu et al. 2024), with respect to the input; its absolute values are summed over the input's channels and averaged
    over the images.

    Args:
        model: with timm's ``forward_intermediates``, in evaluation mode.
        images: (n, channels, height, width), normalised, on the model's device.
        batch_size: images in one pass.

    Returns:
        (height, width), not negative, on the CPU in float64.
    """
    total = torch.zeros(images.shape[-2:], dtype=torch.float64)
    for batch in images.split(batch_size):
        batch = batch.detach().requires_grad_()
        with torch.enable_grad():
            feature = model.forward_intermediates(batch, indices=1, intermediates_only=True)[0]  # type: ignore[operator]
            centre = feature[:, :, feature.shape[2] // 2, feature.shape[3] // 2]
            (gradient,) = torch.autograd.grad(F.relu(centre).sum(), batch)
        total += gradient.double().abs().sum((0, 1)).cpu()
    return total / len(images)


def central_share(field: Tensor, share: float) -> float:
    """Side of the smallest central part of the field that holds ``share`` of its sum, over the side of the whole."""
    height, width = field.shape
    total = float(field.sum())
    for k in range(1, max(height, width) + 1):
        y, x = (min(math.ceil(k * side / max(height, width)), side) for side in (height, width))
        top, left = (height - y) // 2, (width - x) // 2
        if float(field[top : top + y, left : left + x].sum()) >= share * total:
            return k / max(height, width)
    return 1.0


def plot_receptive_fields(fields: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Draws receptive fields side by side, each relative to its maximum on one logarithmic colour scale.

    Args:
        fields: title -> (height, width) of :func:`receptive_field`.
        path: PNG file to write.
    """
    from matplotlib.colors import LogNorm

    figure = new_figure(3.6 * len(fields) + 0.8, 4.0)
    panels = []
    for i, (title, field) in enumerate(fields.items()):
        axes = figure.add_subplot(1, len(fields), i + 1)
        relative = (field / field.max().clamp_min(1e-300)).clamp_min(1e-4).numpy()
        picture = axes.imshow(relative, cmap="viridis", norm=LogNorm(1e-4, 1), interpolation="nearest")
        axes.set_title(f"{title}\nhalf of it in the central {central_share(field, 0.5):.0%} of the side", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        panels.append(axes)
    figure.colorbar(picture, ax=panels, fraction=0.046, pad=0.02, label="gradient relative to its maximum")
    save_figure(figure, path)


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) of one class an image.

    It is taken from the last feature map, or, where the classifier sees class tokens only, from the one before the
    last block, because nothing in the last map but the class tokens reaches the classifier.

    Args:
        model: a classifier with timm's ``feature_info`` and ``forward_intermediates``, in evaluation mode.
        images: (batch, channels, height, width), normalised, on the model's device.
        classes: (batch,) indices; the classes of the highest scores if None.

    Returns:
        Maps (batch, height, width) of the images' size in 0..1, the classes (batch,) and their probabilities (batch,).
    """
    level = -2 if getattr(model, "global_pool", None) == "token" else -1
    info = list(model.feature_info)  # type: ignore[arg-type]
    if len(info) < -level:
        raise ValueError(f"the model has {len(info)} blocks; Grad-CAM of a class token needs two")
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        # Blocks that leave a sum to the next one return its parts; the gradients of both are that of the sum.
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with torch.enable_grad():
        hook = model.get_submodule(info[level]["module"]).register_forward_hook(keep)
        try:
            scores = model(images)
        finally:
            hook.remove()
        classes = scores.argmax(1) if classes is None else classes.to(scores.device)
        chosen = scores.gather(1, classes.unsqueeze(1)).squeeze(1)
        (gradient,) = torch.autograd.grad(chosen.sum(), outputs[0])
    with torch.no_grad():
        index = len(info) + level
        features = model.forward_intermediates(images, indices=[index], intermediates_only=True)[0]  # type: ignore[operator]
        weights = _channel_means(gradient, features, model)
        maps = F.relu((weights[:, :, None, None] * features.float()).sum(1))
        maps = maps / maps.flatten(1).amax(1).clamp_min(1e-12)[:, None, None]
        probabilities = scores.softmax(1).gather(1, classes.unsqueeze(1)).squeeze(1)
        return _upsample(maps, images), classes, probabilities


def _channel_means(gradient: Tensor, features: Tensor, model: nn.Module) -> Tensor:
    """Mean over the patches of a gradient in the module's own layout -> (batch, channels) in float32."""
    gradient = gradient.float()
    if gradient.ndim == 3:  # tokens: those that are no patches are left out
        patches = features.shape[2] * features.shape[3]
        extra = _extra_tokens(model, patches, gradient.shape[1])
        keep = torch.ones(gradient.shape[1], dtype=torch.bool, device=gradient.device)
        keep[list(extra)] = False
        return gradient[:, keep].mean(1)
    return gradient.mean((2, 3) if gradient.shape == features.shape else (1, 2))


def _extra_tokens(model: nn.Module, num_patches: int, length: int) -> Sequence[int]:
    if isinstance(model, PlainModel):
        return cls_positions(model.cls_position, num_patches)
    return range(length - num_patches)  # timm's transformers: in front


def feature_norm(model: nn.Module, images: Tensor) -> Tensor:
    """Norm over the channels of the last feature map, each map from its least to its largest value as 0..1.

    Shows the outliers that registers are to remove (Wang et al. 2024, Mamba-R, arXiv 2405.14858).

    Args:
        model: with timm's ``forward_intermediates``, in evaluation mode.
        images: (batch, channels, height, width), normalised, on the model's device.

    Returns:
        (batch, height, width) of the images' size.
    """
    with torch.no_grad():
        features = model.forward_intermediates(images, indices=1, intermediates_only=True)[0]  # type: ignore[operator]
        maps = features.float().norm(dim=1)
        low, high = (f(maps.flatten(1), dim=1)[:, None, None] for f in (torch.amin, torch.amax))
        return _upsample((maps - low) / (high - low).clamp_min(1e-12), images)


def _upsample(maps: Tensor, images: Tensor) -> Tensor:
    size = images.shape[-2:]
    return F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1).cpu()


def displayable(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images (n, channels, height, width) as pictures (n, height, width, 3) in 0..1.

    One channel is grey, of others the first three are shown (two are filled up with the second); values beyond what
    8-bit pictures have are stretched, image by image, from their least to their largest.
    """
    shape = (1, -1, 1, 1)
    values = images.cpu() * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    values = values[:, [min(i, values.shape[1] - 1) for i in range(3)]]
    if float(values.min()) < -0.1 or float(values.max()) > 1.1:
        low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
        values = (values - low) / (high - low).clamp_min(1e-12)
    return values.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def plot_overlays(
    pictures: np.ndarray, maps: Tensor, captions: Sequence[str], path: str | os.PathLike, *, columns: int = 3
) -> None:
    """Draws each picture beside itself under its map.

    Args:
        pictures: (n, height, width, 3) in 0..1.
        maps: (n, height, width) in 0..1.
        captions: one a picture.
        path: PNG file to write.
        columns: pairs a row.
    """
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = new_figure(3.6 * columns, 2.1 * rows)
    for i, (picture, heat, caption) in enumerate(zip(pictures, maps.numpy(), captions, strict=True)):
        for j in range(2):
            axes = figure.add_subplot(rows, 2 * columns, 2 * i + j + 1)
            axes.imshow(picture)
            if j:
                axes.imshow(heat, cmap="jet", alpha=0.5, vmin=0, vmax=1)
            else:
                axes.set_title(caption, fontsize=8, loc="left")
            axes.axis("off")
    save_figure(figure, path)
