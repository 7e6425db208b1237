"""Decoding one image file into the number of channels a model wants, the same way every time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from vision_mamba.errors import UserError

IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"))
_CHANNEL_NAMES = {1: "grey", 3: "RGB", 4: "four-band"}
PICTURE_CHANNELS = frozenset(_CHANNEL_NAMES)
_BITS, _BANDS, _FORMAT, _NODATA = 258, 277, 339, 42113  # TIFF tags; the last is GDAL's


def is_image_name(name: str) -> bool:
    """True for a file name with an image extension that is not hidden (``.x.jpg``, ``._x.jpg``)."""
    base = name.rsplit("/", 1)[-1]
    dot = base.rfind(".")
    return dot > 0 and not base.startswith(".") and base[dot:].lower() in IMAGE_EXTENSIONS


def check_in_chans(in_chans: int) -> None:
    """Raises UserError unless images can be read into ``in_chans`` channels."""
    if in_chans not in _CHANNEL_NAMES:
        raise UserError(
            f"in_chans={in_chans}: pictures are read as 1 (grey), 3 (RGB) or 4 (RGBA or four-band) channels; "
            "rasters may have any number"
        )


def decode_image(data: bytes, name: str, in_chans: int = 3) -> Image.Image:
    """Decodes a whole image file.

    Grey, palette, bilevel, CMYK and 16-bit grey files become what ``in_chans`` asks for: 16-bit grey is
    scaled by 1/257 (65535 becomes 255); transparency is composited on white; colour becomes grey by luma.
    With ``in_chans=4`` the four stored bands are kept as they are, alpha included, and a file with another
    number of bands is an error. EXIF rotation is not applied, as in ImageNet training.

    Args:
        data: the file's bytes.
        name: the file's name, for the error.
        in_chans: 1, 3 or 4.

    Returns:
        A PIL image of mode ``L``, ``RGB`` or ``RGBX`` (four plain bands, which PIL resizes independently).

    Raises:
        UserError: the file is not an image, is truncated or corrupt, or cannot give ``in_chans`` channels.
    """
    tags = _tiff_tags(data)
    if tags.get(_BANDS, 1) > 4 or (tags.get(_BANDS, 1) > 1 and max(tags.get(_BITS, (1,))) > 8):
        raise UserError(f"image {name} is a raster of {raster_kind(data)}, where 8-bit grey or colour is read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on EXIF and palettes name no file
            image = Image.open(io.BytesIO(data))
            image.load()
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        reason = "not a known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        reason = reason or type(error).__name__
        raise UserError(f"cannot read image {name}: {reason}; replace or remove the file") from None
    _check_nodata(image, name)
    return _to_channels(image, name, in_chans)


def raster_kind(data: bytes) -> str | None:
    """What a TIFF file holds that no 8-bit picture does, such as ``13 bands of 16 bits``; None for pictures.

    A declared nodata value makes a raster too. Only the header is read. Files that are no TIFF give None.
    """
    tags = _tiff_tags(data)
    bits = tags.get(_BITS, (1,))
    bands, kind = tags.get(_BANDS, 1), tags.get(_FORMAT, (1,))
    parts = []
    if max(bits) > 8 or set(kind) != {1} or bands > 4:
        sort = {2: "signed ", 3: "floating-point "}.get(kind[0], "")
        parts.append(f"{bands} band{'s' * (bands != 1)} of {bits[0]} {sort}bits")
    if _NODATA in tags:
        parts.append(f"nodata {str(tags[_NODATA]).strip()}")
    return ", ".join(parts) or None


def _tiff_tags(data: bytes) -> Mapping[int, Any]:
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return {}
    try:
        # Image.open would refuse, and log, what it has no mode for.
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return {tag: tags[tag] for tag in (_BITS, _BANDS, _FORMAT, _NODATA) if tag in tags}
    except Exception:  # a damaged header: whoever decodes the file says so
        return {}


def _check_nodata(image: Image.Image, name: str) -> None:
    if image.format != "TIFF" or _NODATA not in image.tag_v2:  # type: ignore[attr-defined]
        return
    try:
        nodata = float(image.tag_v2[_NODATA])  # type: ignore[attr-defined]
    except ValueError:
        return
    if bool((np.asarray(image) == nodata).all()):
        raise UserError(f"image {name} holds nothing but nodata ({nodata:g}); remove it from the set")


def _to_channels(image: Image.Image, name: str, in_chans: int) -> Image.Image:
    if image.mode.startswith("I"):
        image = _scale_16_bit(image, name)
    elif image.mode == "F":
        raise UserError(f"image {name} holds floating-point values; convert it to 8 or 16 bits first")
    if in_chans == 4:
        if len(image.getbands()) != 4 or image.mode == "CMYK":
            raise UserError(
                f"image {name} is {image.mode}, but the model takes 4 channels; "
                "give four-band files, or a model with in_chans=3"
            )
        # PIL multiplies RGBA by its alpha when it resizes, which would spoil a fourth band of data.
        return image if image.mode == "RGBX" else Image.frombytes("RGBX", image.size, image.tobytes())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = {1: "L", 3: "RGB"}[in_chans]
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def _scale_16_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise UserError(f"image {name} holds values outside 0..65535; convert it to 8 or 16 bits first")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
