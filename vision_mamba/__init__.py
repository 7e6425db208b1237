"""Vision state-space backbones on one shared selective scan. Importing registers the models with timm."""

DISTRIBUTION = "vision-mamba-zoo"
__version__ = "0.1.0"

from . import _identity

_identity.check_installed()

from .checkpoint import load_checkpoint
from .models import VisionMamba
from .ops import causal_conv1d, selective_scan

__all__ = ["VisionMamba", "causal_conv1d", "load_checkpoint", "selective_scan"]
