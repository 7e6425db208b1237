"""GeoTIFF and other rasters: any number of bands, any number type, nodata. rasterio is imported at first use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vision_mamba.errors import UserError, nearest

_TIFF = (".tif", ".tiff")


@dataclass(frozen=True)
class RasterProfile:
    """What all rasters of one set have in common.

    Attributes:
        dtype: numpy's name of the stored values, such as ``uint16``.
        count: bands of a file.
        names: band descriptions of the file the profile was read from; ``""`` where a band has none.
        bands: numbers of the bands that are read, from 1 as in GDAL, in order.
    """

    dtype: str
    count: int
    names: tuple[str, ...]
    bands: tuple[int, ...]

    @property
    def needs_statistics(self) -> bool:
        """True unless values have a range of their own to be scaled from (8 bits: 0..255 becomes 0..1)."""
        return self.dtype != "uint8"


def is_tiff_name(name: str) -> bool:
    """True for a file name that ends in .tif or .tiff."""
    return name.lower().endswith(_TIFF)


def read_profile(data: bytes, name: str, bands: Sequence[int | str] | None = None) -> RasterProfile:
    """The profile of a raster file; pixels are not read.

    Args:
        data: the file's bytes.
        name: the file's name, for errors.
        bands: bands to use, by number from 1 or by description; None takes all.

    Raises:
        UserError: rasterio is not installed, the file is no raster, or a band does not exist.
    """
    with _open(data, name) as source:
        dtype, names = _dtype(source, name), tuple(text or "" for text in source.descriptions)
    return RasterProfile(dtype, len(names), names, _find_bands(bands, names, name))


def decode_raster(data: bytes, name: str, profile: RasterProfile) -> np.ndarray:
    """The bands of a raster as numbers.

    uint8 is divided by 255; every other type is taken as stored, so it needs a mean and a standard deviation of
    its own. What the file declares as nodata (a value a band, or a mask) and values that are not finite become NaN.

    Args:
        data: the file's bytes.
        name: the file's name, for errors.
        profile: what the set's rasters are; see ``read_profile``.

    Returns:
        float32 (H, W, len(profile.bands)).

    Raises:
        UserError: unreadable, of another data type or band count than ``profile``, or nothing but nodata.
    """
    from rasterio.enums import MaskFlags

    with _open(data, name) as source:
        dtype = _dtype(source, name)
        if (source.count, dtype) != (profile.count, profile.dtype):
            raise UserError(
                f"raster {name} has {_count(source.count)} of {dtype}, where {_count(profile.count)} of "
                f"{profile.dtype} are read as in the set's first file; use files of one kind"
            )
        bands = list(profile.bands)
        try:
            stored = source.read(bands)
            mask = ~np.isfinite(stored) if stored.dtype.kind == "f" else np.zeros(stored.shape, bool)
            for plane, band in zip(mask, bands, strict=True):
                flags = source.mask_flag_enums[band - 1]
                # An alpha flag is no mask: GDAL takes the fourth of four 8-bit bands for alpha, be it near infrared.
                if MaskFlags.nodata in flags or flags == [MaskFlags.per_dataset]:
                    plane |= source.read_masks(band) == 0
        except Exception as error:  # rasterio's and GDAL's own types
            raise UserError(f"cannot read image {name}: {_line(error)}; replace or remove the file") from None
    if mask.all():
        raise UserError(f"raster {name} holds nothing but nodata; remove it from the set")
    values = stored.astype(np.float32) / (255 if dtype == "uint8" else 1)
    values[mask] = np.nan
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def normalise(raster: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(raster - mean) / std along the last axis, float32; NaN becomes 0, the band's mean."""
    return np.nan_to_num((raster - mean) / std, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float32)


def preview(raster: np.ndarray) -> Image.Image:
    """A picture to look at: the first three bands (or the first alone), each stretched from its 2nd to its 98th
    percentile; nodata is black.

    Args:
        raster: (H, W, C) as ``decode_raster`` gives it.
    """
    shown = raster[..., :3] if raster.shape[-1] >= 3 else raster[..., :1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a band that is nodata throughout
        low, high = np.nanpercentile(shown, (2, 98), axis=(0, 1))
    scaled = (shown - low) / np.where(high > low, high - low, 1)
    pixels = (np.nan_to_num(scaled).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])


def load_rasterio() -> Any:
    """The rasterio module; UserError names the extra that installs it."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError:
        raise UserError(
            "rasters (GeoTIFF with other than 8-bit grey or colour) need rasterio; install the extra: "
            "pip install 'vision-mamba-zoo[geo]', or uv sync --extra geo"
        ) from None
    # A tile without coordinates is a tile all the same.
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    return rasterio


@contextmanager
def _open(data: bytes, name: str) -> Iterator[Any]:
    rasterio = load_rasterio()
    with ExitStack() as stack:
        try:
            source = stack.enter_context(stack.enter_context(rasterio.MemoryFile(data)).open())
        except (rasterio.errors.RasterioError, ValueError):
            reason = "no raster format that GDAL knows, or damaged" if data else "the file is empty"
            raise UserError(f"cannot read image {name}: {reason}; replace or remove the file") from None
        yield source


def _dtype(source: Any, name: str) -> str:
    kinds = sorted(set(source.dtypes))
    if len(kinds) > 1 or kinds[0].startswith("complex"):
        raise UserError(f"raster {name} holds {' and '.join(kinds)}; use files of one real data type")
    return kinds[0]


def _find_bands(bands: Sequence[int | str] | None, names: Sequence[str], file: str) -> tuple[int, ...]:
    if bands is None:
        return tuple(range(1, len(names) + 1))
    found = []
    for band in bands:
        if isinstance(band, int):
            if not 1 <= band <= len(names):
                raise UserError(f"band {band} is asked for, but {file} has {_count(len(names))}, numbered from 1")
            found.append(band)
        elif names.count(band) == 1:
            found.append(names.index(band) + 1)
        elif band in names:
            raise UserError(f"{file} has {names.count(band)} bands named {band!r}; give the band's number, from 1")
        else:
            known = ", ".join(filter(None, names))
            hint = nearest(band, filter(None, names)) + f" (named: {known})" if known else "; give numbers from 1"
            raise UserError(f"{file} has no band named {band!r}{hint}")
    return tuple(found)


def _count(bands: int) -> str:
    return f"{bands} band{'s' * (bands != 1)}"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
