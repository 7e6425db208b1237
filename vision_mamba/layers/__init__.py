"""Building blocks shared by the model families."""

from .mamba import MambaMixer
from .multi_path import MultiPathMixer
from .norm import add_layer_norm
from .patch_embed import OverlapPatchEmbed
from .ss2d import SS2D

__all__ = ["MambaMixer", "MultiPathMixer", "OverlapPatchEmbed", "SS2D", "add_layer_norm"]
