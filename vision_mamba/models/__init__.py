"""Model families; importing this package registers them with timm."""

from .. import _identity

_identity.check_not_shadowed()

from .vim import VisionMamba

__all__ = ["VisionMamba"]
