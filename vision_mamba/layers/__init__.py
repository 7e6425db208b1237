"""Building blocks shared by the model families."""

from .channel_mixer import ChannelMixer
from .depthwise_conv import depthwise_conv
from .linear import apply_linear
from .mamba import MambaMixer
from .mambavision import MambaVisionMixer
from .multi_path import MultiPathMixer
from .norm import LayerNorm, RMSNorm, add_layer_norm, conv_norm
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
    "apply_linear",
    "conv_norm",
    "depthwise_conv",
]
