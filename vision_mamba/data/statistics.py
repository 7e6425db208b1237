"""Mean, spread and percentiles of each band of an image set, in one pass, and their use for normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vision_mamba.data.sources import ImageSet
from vision_mamba.errors import UserError, nearest

PERCENTILES = (1, 2, 5, 25, 50, 75, 95, 98, 99)


def band_statistics(dataset: ImageSet, *, num_workers: int = 0, progress: bool = True) -> dict[str, Any]:
    """Statistics of each band over all pixels of a set, nodata left out.

    Values are those that normalisation sees: 8-bit images scaled to 0..1, other rasters in their own units. Means and
    spreads are float64, merged image by image (Chan et al. 1979). Percentiles are exact for 8 and 16 bits
    (unsigned); for other types they are taken from a histogram over the upper half of the bits of a float32, which
    is good to 0.8 % of the value.

    Args:
        dataset: from ``open_dataset``.
        num_workers: processes that read; 0 reads in the caller's.
        progress: show a bar.

    Returns:
        What the YAML file holds: ``source``, ``images``, ``dtype``, ``nodata`` (part of the values), and a list a
        band of ``bands`` (numbers from 1), ``names``, ``mean``, ``std``, ``min``, ``max`` and ``percentiles.<p>``.

    Raises:
        UserError: an image cannot be read, or a band has no valid pixel.
    """
    from tqdm import tqdm

    loader = torch.utils.data.DataLoader(
        _Moments(dataset), batch_size=1, collate_fn=_first, num_workers=num_workers, generator=torch.Generator()
    )
    bands = dataset.in_chans
    total = np.zeros(bands)
    mean, squares = np.zeros(bands), np.zeros(bands)
    low, high = np.full(bands, np.inf), np.full(bands, -np.inf)
    histogram = np.zeros((bands, 1 << 16), np.int64)
    values = 0
    for size, parts in tqdm(loader, desc="band statistics", unit="img", disable=None if progress else True):
        values += size
        for band, part in enumerate(parts):
            if part is None:
                continue
            count, part_mean, part_squares, part_low, part_high, bins, counts = part
            both = total[band] + count
            shift = part_mean - mean[band]
            mean[band] += shift * count / both
            squares[band] += part_squares + shift**2 * total[band] * count / both
            total[band] = both
            low[band], high[band] = min(low[band], part_low), max(high[band], part_high)
            histogram[band, bins] += counts
    numbers = list(dataset.profile.bands if dataset.profile else range(1, bands + 1))
    empty = [number for number, count in zip(numbers, total, strict=True) if count == 0]
    if empty:
        raise UserError(f"band {empty[0]} of {dataset.where} is nodata in every image; leave it out with --bands")
    dtype = _dtype(dataset)
    cut = [_percentiles(h, dtype, a, b) for h, a, b in zip(histogram, low, high, strict=True)]
    colours = {1: ("grey",), 3: ("red", "green", "blue")}.get(bands, ("",) * bands)
    return {
        "source": dataset.where,
        "images": len(dataset),
        "dtype": dtype,
        "nodata": float(1 - total.sum() / values),
        "bands": numbers,
        "names": [dataset.profile.names[n - 1] for n in numbers] if dataset.profile else list(colours),
        "mean": mean.tolist(),
        "std": np.sqrt(squares / total).tolist(),
        "min": low.tolist(),
        "max": high.tolist(),
        "percentiles": {str(p): [row[i] for row in cut] for i, p in enumerate(PERCENTILES)},
    }


def read_statistics(path: str, dataset: ImageSet) -> tuple[list[float], list[float]]:
    """Means and standard deviations, from a file of ``band_statistics``, for the bands that a set gives.

    Args:
        path: the YAML file.
        dataset: the set to normalise; its bands are looked up by number.

    Raises:
        UserError: no such file, not statistics, of another data type, or a band is not in it or is constant.
    """
    try:
        tree = yaml.safe_load(Path(path).expanduser().read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.statistics: {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError:
        raise UserError(f"data.statistics: {path} is not valid YAML; write it with tools/band_statistics.py") from None
    keys = ("dtype", "bands", "mean", "std")
    lacking = [k for k in keys if not isinstance(tree, dict) or k not in tree]
    if lacking:
        hint = nearest(lacking[0], tree) if isinstance(tree, dict) else ""
        raise UserError(f"data.statistics: {path} lacks {', '.join(lacking)}{hint}; use tools/band_statistics.py")
    rows = [tree[k] for k in keys[1:]]
    if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        raise UserError(f"data.statistics: bands, mean and std of {path} must be lists of one length")
    if tree["dtype"] != _dtype(dataset):
        raise UserError(
            f"data.statistics: {path} is of {tree['dtype']} images, but {dataset.where} holds {_dtype(dataset)}"
        )
    known = {band: (float(mean), float(std)) for band, mean, std in zip(*rows, strict=True)}
    wanted: Sequence[int] = dataset.profile.bands if dataset.profile else range(1, dataset.in_chans + 1)
    for band in wanted:
        if band not in known:
            have = ", ".join(map(str, known))
            raise UserError(f"data.statistics: {path} has no band {band} (has: {have}); run tools/band_statistics.py")
        if not known[band][1] > 0:
            raise UserError(f"data.statistics: band {band} of {path} is constant; leave it out with data.bands")
    return [known[band][0] for band in wanted], [known[band][1] for band in wanted]


class _Moments(torch.utils.data.Dataset):
    """The part of each image: number of values, and of each band its count, moments, range and histogram."""

    def __init__(self, dataset: ImageSet) -> None:
        self.dataset, self.dtype = dataset, _dtype(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, list[tuple | None]]:
        pixels = np.asarray(self.dataset[index][0])
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if self.dataset.profile is None:
            pixels = pixels.astype(np.float32) / 255
        return pixels.size, [self._band(plane) for plane in np.moveaxis(pixels, -1, 0)]

    def _band(self, plane: np.ndarray) -> tuple | None:
        valid = plane[~np.isnan(plane)]
        if not valid.size:
            return None
        exact = valid.astype(np.float64)
        mean = exact.mean()
        bins, counts = np.unique(_bins(valid, self.dtype), return_counts=True)
        return valid.size, mean, ((exact - mean) ** 2).sum(), exact.min(), exact.max(), bins, counts


def _first(batch: list) -> Any:
    return batch[0]


def _dtype(dataset: ImageSet) -> str:
    return dataset.profile.dtype if dataset.profile else "uint8"


def _bins(values: np.ndarray, dtype: str) -> np.ndarray:
    """The histogram bin, 0..65535, of each float32 value; a larger value has no smaller bin."""
    if dtype == "uint8":
        return np.rint(values * 255).astype(np.int64)
    if dtype == "uint16":
        return values.astype(np.int64)
    bits = values.astype(np.float32).view(np.uint32)
    # Floats order as integers once negative ones are inverted and the others put above them.
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint32) >> 16


def _percentiles(histogram: np.ndarray, dtype: str, low: float, high: float) -> list[float]:
    """The values below which each of PERCENTILES of the counts lie (numpy's ``inverted_cdf``)."""
    bins = np.searchsorted(np.cumsum(histogram), np.ceil(np.array(PERCENTILES) / 100 * histogram.sum()))
    if dtype == "uint8":
        return (bins / 255).tolist()
    if dtype == "uint16":
        return bins.astype(float).tolist()
    # The middle of the bin's range.
    keys = (bins.astype(np.uint32) << 16) | np.uint32(1 << 15)
    values = np.where(keys >> 31, keys ^ np.uint32(1 << 31), ~keys).astype(np.uint32).view(np.float32)
    return values.astype(float).clip(low, high).tolist()
