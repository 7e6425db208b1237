"""Model families; importing this package registers them with timm."""

from .. import _identity

_identity.check_not_shadowed()

from .rsmamba import RSMamba
from .samba import Samba
from .vim import VisionMamba
from .vmamba import VMamba

__all__ = ["RSMamba", "Samba", "VMamba", "VisionMamba"]
