"""Vision state-space backbones on one shared selective scan. Importing registers the models with timm."""

DISTRIBUTION = "vision-mamba-zoo"
__version__ = "0.1.0"

from . import _identity

_identity.check_installed()

from .checkpoint import load_checkpoint
from .models import RSMamba, Samba, VisionMamba, VMamba
from .ops import add_norm, causal_conv1d, selective_scan

__all__ = [
    "RSMamba",
    "Samba",
    "VMamba",
    "VisionMamba",
    "add_norm",
    "causal_conv1d",
    "load_checkpoint",
    "selective_scan",
]
