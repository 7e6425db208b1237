"""Image sets, augmentation and loaders. albumentations, datasets and rasterio are imported when asked for."""

from vision_mamba.data.images import IMAGE_EXTENSIONS, decode_image, is_image_name
from vision_mamba.data.knn import knn_baseline
from vision_mamba.data.loader import EpochLoader, create_loader
from vision_mamba.data.memory import keep_in_memory
from vision_mamba.data.rasters import RasterProfile, decode_raster, preview
from vision_mamba.data.sources import ImageSet, builtin_path, check_head, check_images, open_dataset
from vision_mamba.data.statistics import band_statistics, read_statistics
from vision_mamba.data.transforms import RECIPES, BatchNormalise, build_transform
from vision_mamba.data.video import VIDEO_EXTENSIONS, import_av, is_video_name, read_clip

__all__ = [
    "IMAGE_EXTENSIONS",
    "RECIPES",
    "VIDEO_EXTENSIONS",
    "BatchNormalise",
    "EpochLoader",
    "ImageSet",
    "RasterProfile",
    "band_statistics",
    "build_transform",
    "builtin_path",
    "check_head",
    "check_images",
    "create_loader",
    "decode_image",
    "decode_raster",
    "import_av",
    "is_image_name",
    "is_video_name",
    "keep_in_memory",
    "knn_baseline",
    "open_dataset",
    "preview",
    "read_clip",
    "read_statistics",
]
