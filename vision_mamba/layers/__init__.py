"""Building blocks shared by the model families."""

from .mamba import MambaMixer
from .patch_embed import OverlapPatchEmbed

__all__ = ["MambaMixer", "OverlapPatchEmbed"]
