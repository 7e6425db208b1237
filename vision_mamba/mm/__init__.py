"""The models as backbones of mmsegmentation and mmdetection (extra ``mm``).

Import this before mmseg or mmdet: it mends what they lack on current PyTorch, numpy and setuptools, and supplies mmcv's
compiled operators on torchvision's where none are installed; see ``compat.py``. A config does that with
``custom_imports = dict(imports=["vision_mamba.mm"])``.
"""

from . import compat

compat.install()

from .backbone import VisionMambaBackbone  # noqa: E402
from .hooks import PicturesHook  # noqa: E402
from .neck import SimpleFeaturePyramid  # noqa: E402
from .optim import VisionMambaOptimConstructor  # noqa: E402

__all__ = ["PicturesHook", "SimpleFeaturePyramid", "VisionMambaBackbone", "VisionMambaOptimConstructor"]
