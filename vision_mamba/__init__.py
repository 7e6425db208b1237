"""Vision state-space backbones on one shared selective scan. Importing registers the models with timm."""

DISTRIBUTION = "vision-mamba-zoo"
__version__ = "0.1.0"

from . import _identity

_identity.check_installed()

from .checkpoint import load_checkpoint  # noqa: E402
from .models import VisionMamba  # noqa: E402
from .ops import causal_conv1d, selective_scan  # noqa: E402

__all__ = ["VisionMamba", "causal_conv1d", "load_checkpoint", "selective_scan"]
