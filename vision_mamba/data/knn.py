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
        train, val: sets of (PIL image, target).
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
    """For each size the pixels (N, size * size * channels) in 0..1, and the targets (N,)."""
    rows: dict[int, list[torch.Tensor]] = {side: [] for side in sizes}
    targets = []
    for index in range(len(dataset)):
        image, target = dataset[index]
        targets.append(target)
        for side in sizes:
            small = np.array(image.resize((side, side), Image.Resampling.BOX))
            rows[side].append(torch.from_numpy(small).flatten())
    return {side: torch.stack(r).float() / 255 for side, r in rows.items()}, torch.tensor(targets)
