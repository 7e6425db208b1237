"""Model families; importing this package registers them with timm."""

from .. import _identity

_identity.check_not_shadowed()

from .mambavision import MambaVision
from .rsmamba import RSMamba
from .samba import Samba
from .videomamba import VideoMamba, VideoMambaImage
from .vim import VisionMamba
from .vim2 import ViM2
from .vmamba import VMamba
from .xt import XT

__all__ = ["MambaVision", "RSMamba", "Samba", "VMamba", "ViM2", "VideoMamba", "VideoMambaImage", "VisionMamba", "XT"]
