"""Building blocks shared by the model families."""

from .channel_mixer import ChannelMixer
from .mamba import MambaMixer
from .mambavision import MambaVisionMixer
from .multi_path import MultiPathMixer
from .norm import LayerNorm, RMSNorm, add_layer_norm
from .patch_embed import OverlapPatchEmbed
from .ss2d import SS2D

__all__ = [
    "ChannelMixer",
    "LayerNorm",
    "MambaMixer",
    "MambaVisionMixer",
    "MultiPathMixer",
    "OverlapPatchEmbed",
    "RMSNorm",
    "SS2D",
    "add_layer_norm",
]
