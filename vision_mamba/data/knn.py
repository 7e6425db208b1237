"""The baseline that a trained network has to beat: nearest neighbours on pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from vision_mamba.data.loader import Samples


def knn_baseline(
    train: Samples,
    val: Samples,
    *,
    k: int | Sequence[int] = (1, 3, 5),
    size: int | Sequence[int] = (4, 8, 16),
) -> float:
    """Top-1 accuracy of k nearest neighbours, by Euclidean distance of raw pixels reduced to ``size`` x ``size``.

    Where several ``k`` or sizes are given the best is returned, although it is the validation set that chooses it:
    the baseline gets the benefit of the doubt.

    Args:
        train, val: sets of (PIL image, target), or of (array as ``decode_raster`` gives it, target). Bands of arrays
            are scaled to the same spread; nodata becomes the band's mean.
        k: neighbours that vote; the nearer neighbour breaks a tie.
        size: sides in pixels.

    Returns:
        Accuracy in 0..1.
    """
    ks = (k,) if isinstance(k, int) else tuple(k)
    sizes = (size,) if isinstance(size, int) else tuple(size)
    train_pixels, train_targets = _pixels(train, sizes)
    val_pixels, val_targets = _pixels(val, sizes)
    classes = int(max(train_targets.max(), val_targets.max())) + 1
    best = 0.0
    for side in sizes:
        if train_pixels[side].ndim == 4:  # bands of rasters differ in unit
            mean = train_pixels[side].nanmean((0, 1, 2))
            std = (train_pixels[side] - mean).square().nanmean((0, 1, 2)).sqrt().clamp(min=1e-12)
            for pixels in (train_pixels, val_pixels):
                pixels[side] = ((pixels[side] - mean) / std).nan_to_num(0.0).flatten(1)
        right = dict.fromkeys(ks, 0)
        for start in range(0, len(val_targets), 512):
            distance = torch.cdist(val_pixels[side][start : start + 512], train_pixels[side])
            near = train_targets[distance.topk(min(max(ks), len(train_targets)), largest=False).indices]
            votes = torch.nn.functional.one_hot(near, classes).double()
            votes[:, 0] *= 1 + 1e-6
            for count in ks:
                guess = votes[:, :count].sum(1).argmax(1)
                right[count] += int((guess == val_targets[start : start + 512]).sum())
        best = max(best, *(r / len(val_targets) for r in right.values()))
    return best


def _pixels(dataset: Samples, sizes: Sequence[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """For each size the pixels, and the targets (N,).

    Of pictures (N, size * size * channels) in 0..1; of rasters (N, size, size, channels) in their own units.
    """
    rows: dict[int, list[torch.Tensor]] = {side: [] for side in sizes}
    targets = []
    for index in range(len(dataset)):
        image, target = dataset[index]
        targets.append(target)
        for side in sizes:
            if isinstance(image, np.ndarray):
                rows[side].append(_shrink(torch.from_numpy(image), side))
            else:
                small = np.array(image.resize((side, side), Image.Resampling.BOX))
                rows[side].append(torch.from_numpy(small).flatten() / 255)
    return {side: torch.stack(r).float() for side, r in rows.items()}, torch.tensor(targets)


def _shrink(raster: torch.Tensor, side: int) -> torch.Tensor:
    """(H, W, C) -> (side, side, C) by the mean of the valid pixels; NaN where there is none."""
    planes = raster.permute(2, 0, 1)
    valid = ~planes.isnan()
    pool = torch.nn.functional.adaptive_avg_pool2d
    share = pool(valid.float(), side)
    return torch.where(share > 0, pool(planes.nan_to_num(0.0), side) / share, torch.nan).permute(1, 2, 0)
