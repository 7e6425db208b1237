"""albumentations transforms of our own; transforms.py imports this module when a pipeline is built."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from albumentations import D4, ImageOnlyTransform


class Orientation(D4):
    """``D4``, one of the eight orientations of a square, with OpenCV's transposition: a tenth of the time of numpy's.

    Images of more than four channels are left to ``D4``.
    """

    def apply(self, img: np.ndarray, group_element: str, **params: Any) -> np.ndarray:
        """(H, W, C) -> the same, or (W, H, C)."""
        if img.ndim == 3 and img.shape[2] > 4:
            return super().apply(img, group_element, **params)
        if group_element in ("t", "r90", "r270", "hvt"):
            turned = cv2.transpose(img)
        else:
            turned = img
        # Flips that make the element of the transposition: rows (0), columns (1), both (-1).
        flip = {"r90": 0, "r270": 1, "hvt": -1, "r180": -1, "v": 0, "h": 1}.get(group_element)
        turned = turned if flip is None else cv2.flip(turned, flip)
        return turned.reshape(*turned.shape[:2], *img.shape[2:])


class BandGainOffset(ImageOnlyTransform):
    """Multiplies each band of a normalised raster by a gain and adds an offset, both drawn once an image and band.

    What light, haze and calibration do to a scene; albumentations' own transforms of values clip floats to 0..1.

    Args:
        gain: the gain is uniform in 1 - gain .. 1 + gain.
        offset: the offset is uniform in -offset .. offset, in standard deviations of the band.
        p: probability of being applied.
    """

    def __init__(self, gain: float = 0.1, offset: float = 0.1, p: float = 0.5) -> None:
        super().__init__(p=p)
        if not 0 <= gain < 1 or not offset >= 0:
            raise ValueError(f"gain={gain} must lie in 0..1 and offset={offset} must not be negative")
        self.gain, self.offset = gain, offset

    def apply(self, img: np.ndarray, gain: np.ndarray, offset: np.ndarray, **params: Any) -> np.ndarray:
        """(H, W, C) float32 -> the same."""
        return img * gain + offset

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws ``gain`` and ``offset``, (C,) each."""
        bands = data["image"].shape[-1]
        gain = 1 + self.random_generator.uniform(-self.gain, self.gain, bands)
        offset = self.random_generator.uniform(-self.offset, self.offset, bands)
        return {"gain": gain.astype(np.float32), "offset": offset.astype(np.float32)}
