"""Image sets, augmentation and loaders. albumentations and datasets are imported when a config asks for them."""

from vision_mamba.data.images import IMAGE_EXTENSIONS, decode_image, is_image_name
from vision_mamba.data.knn import knn_baseline
from vision_mamba.data.loader import EpochLoader, create_loader
from vision_mamba.data.sources import ImageSet, builtin_path, check_head, check_images, open_dataset
from vision_mamba.data.transforms import build_transform

__all__ = [
    "IMAGE_EXTENSIONS",
    "EpochLoader",
    "ImageSet",
    "build_transform",
    "builtin_path",
    "check_head",
    "check_images",
    "create_loader",
    "decode_image",
    "is_image_name",
    "knn_baseline",
    "open_dataset",
]
