"""Whole remote-sensing scenes: windowed reading, blending, georeferenced output. Needs the extra ``geo``."""

from .detect import detect_raster
from .models import Detector, Segmentor, load_exported, load_mmdet, load_mmseg
from .scene import segment_raster

__all__ = [
    "Detector",
    "Segmentor",
    "detect_raster",
    "load_exported",
    "load_mmdet",
    "load_mmseg",
    "segment_raster",
]
