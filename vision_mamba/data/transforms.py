"""From a decoded image to a normalised tensor: timm's transforms, or an albumentations pipeline from a config."""

from __future__ import annotations

import functools
import inspect
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vision_mamba.data.images import check_in_chans
from vision_mamba.data.rasters import normalise
from vision_mamba.errors import UserError, nearest

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")
_AUTO_AUGMENT = ("rand", "augmix", "3a", "original", "originalr", "v0", "v0r")

# Recipes for images from above, which have no up: one of the eight orientations of a square, then a crop, and so on.
# ``_recipe`` fills in what depends on the images: their size, and whether colours or bands are to be disturbed.
RECIPES: dict[str, tuple[str, ...]] = {
    "overhead": ("orientation", "crop", "colour", "dropout"),
    "overhead_geometry": ("orientation", "crop"),
}
_CV2_INTERPOLATIONS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "box": 3, "lanczos": 4}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_transform(
    *,
    split: str,
    img_size: int | Sequence[int],
    in_chans: int = 3,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | None = None,
    auto_augment: str | None = None,
    reprob: float = 0.0,
    library: str = "timm",
    albumentations: Sequence[Mapping[str, Any] | str] | None = None,
    recipe: str | None = None,
    raster: bool = False,
    stored: bool = False,
) -> Callable[[Any], torch.Tensor]:
    """The transform of one split.

    ``split="train"`` augments; any other resizes the shorter side to ``size / crop_pct`` and crops the centre.

    Args:
        split: name of the split.
        img_size: side, or ``[height, width]``, in pixels.
        in_chans: channels of the images; pictures of 1 or 4 reuse three-valued ``mean`` and ``std`` by their average.
        mean, std: one value a channel; of 8-bit images scaled to 0..1, of other rasters in their own units.
        interpolation: resize filter, one of INTERPOLATIONS (``random`` in training only).
        crop_pct: part of the resized image that evaluation keeps.
        scale, ratio: range of the area and of width / height of the random resized crop.
        hflip, vflip: probabilities.
        color_jitter: strength; ``auto_augment`` replaces it.
        auto_augment: a timm policy such as ``rand-m9-mstd0.5-inc1``.
        reprob: probability of erasing a rectangle (of normalised noise).
        library: ``timm``, or ``albumentations`` for the training split.
        albumentations: the pipeline, a list of ``{Name: {argument: value}}``; it must end in images of
            ``img_size`` and is followed by normalisation. The arguments above from ``scale`` on are then unused.
        recipe: one of RECIPES for the training split, made of albumentations' transforms: ``overhead`` (one of the
            eight orientations; a crop of ``scale`` and ``ratio``; colour jitter of RGB, a gain and an offset a band
            elsewhere; dropout of rectangles) or ``overhead_geometry`` (the first two).
        raster: images are arrays as ``decode_raster`` gives them, not pictures. They are normalised first, nodata
            becoming 0, and then transformed: geometry, dropout and ``BandGainOffset`` only, as transforms of colours
            suppose 0..255 or 0..1.
        stored: leave out the normalisation where the pipeline ends in 8 bits, for ``BatchNormalise`` to do it to whole
            batches on the device. It does not where an image is a raster or ``reprob`` erases with normalised noise.

    Returns:
        A function from an image of the set to a float32 tensor (in_chans, height, width); with ``stored`` to a uint8
        tensor (height, width, in_chans) where that is possible.

    Raises:
        UserError: an unknown name or a value out of range; the nearest known name is given.
    """
    if not raster:
        check_in_chans(in_chans)
    size = _size(img_size)
    mean, std = (_per_channel(v, in_chans, n, raster) for v, n in ((mean, "mean"), (std, "std")))
    if interpolation not in INTERPOLATIONS or (interpolation == "random" and split != "train"):
        raise UserError(
            f"unknown interpolation {interpolation!r}{nearest(interpolation, INTERPOLATIONS)} "
            f"(known: {', '.join(INTERPOLATIONS)})"
        )
    if library not in ("timm", "albumentations"):
        raise UserError(f"unknown augmentation library {library!r}; give 'timm' or 'albumentations'")
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}{nearest(recipe, RECIPES)} (known: {', '.join(RECIPES)})")
    if albumentations and (library == "timm" or recipe):
        raise UserError(
            "an albumentations pipeline is given, but "
            + (f"recipe is {recipe!r}; unset one" if recipe else "library is 'timm'; set library: albumentations")
        )
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high or (name == "scale" and high > 1):
            raise UserError(f"{name}={[low, high]} is not a range of positive numbers{' up to 1' * (name == 'scale')}")
    if recipe and split == "train":
        albumentations = _recipe(recipe, size, in_chans, interpolation, scale, ratio, raster)
    if (recipe or library == "albumentations") and split == "train":
        return AlbumentationsTransform(albumentations or (), size, in_chans, mean, std, raster=raster, stored=stored)
    timm_transform = functools.partial(_timm_transform, stored=stored and not raster)
    if raster:
        if interpolation in ("lanczos", "hamming", "box"):
            raise UserError(f"interpolation {interpolation!r} is for pictures; rasters take bicubic, bilinear, nearest")
        timm_transform = functools.partial(_raster_transform, timm_transform)
    if split != "train":
        return timm_transform(size, in_chans, mean, std, False, interpolation=interpolation, crop_pct=crop_pct)

    _check_auto_augment(auto_augment)
    if (in_chans == 4 or raster) and (auto_augment or color_jitter):
        kind = "rasters; set recipe: overhead instead" if raster else "in_chans=4"
        raise UserError(f"color_jitter and auto_augment work on grey and RGB pictures; unset them for {kind}")
    return timm_transform(
        size,
        in_chans,
        mean,
        std,
        True,
        interpolation=interpolation,
        scale=tuple(scale),
        ratio=tuple(ratio),
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter or None,
        auto_augment=auto_augment,
        re_prob=reprob,
        re_mode="pixel",
    )


def _timm_transform(size, in_chans, mean, std, is_training: bool, *, stored: bool, **options):
    from timm.data import create_transform

    try:
        transform = create_transform(
            input_size=(in_chans, *size), is_training=is_training, mean=mean, std=std, **options
        )
    except (AssertionError, ValueError, KeyError) as error:
        policy = options.get("auto_augment")
        raise UserError(f"timm does not accept the augmentation (auto_augment={policy!r}): {error!r}") from None
    for step in transform.transforms:
        for op in (*getattr(step, "ops", ()), *(o for pair in getattr(step, "policy", ()) for o in pair)):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    if stored and not options.get("re_prob"):
        transform.transforms[-2:] = [_stored]  # instead of timm's own two steps to a normalised tensor
    return transform


def _stored(image: Image.Image) -> torch.Tensor:
    """The pixels as they are, (H, W, C) uint8."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None])


class BatchNormalise:
    """Batches of 8-bit images to what a model takes: scaled to 0..1, minus the mean, over the standard deviation.

    A quarter of the bytes then goes through the loader's processes and to the device, and the arithmetic is done there.

    Args:
        mean, std: one value a channel.
        device: where batches go.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (mean, std))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, C) -> float32 (B, C, H, W) on the device; float32 images are only moved there."""
        images = images.to(self.device, non_blocking=True)
        if images.dtype != torch.uint8:
            return images
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self.mean).div_(self.std)


def _raster_transform(timm_transform, size, in_chans, mean, std, is_training: bool, **options):
    # timm's crops, flips and erasing take tensors too; only the way there differs.
    return RasterTransform(
        timm_transform(size, in_chans, (0.0,) * in_chans, (1.0,) * in_chans, is_training, **options), mean, std
    )


class RasterTransform:
    """Normalises an array (H, W, C) with NaN for nodata, then applies a transform of tensors (C, H, W)."""

    def __init__(
        self, then: Callable[[torch.Tensor], torch.Tensor], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.then = then
        self.mean, self.std = np.array(mean, np.float32), np.array(std, np.float32)

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        # Before any resizing, which would spread nodata; the two commute elsewhere.
        pixels = normalise(image, self.mean, self.std)
        return self.then(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))


def _recipe(
    name: str,
    size: tuple[int, int],
    in_chans: int,
    interpolation: str,
    scale: Sequence[float],
    ratio: Sequence[float],
    raster: bool,
) -> list[Mapping[str, Any]]:
    """The albumentations pipeline of a recipe."""
    if interpolation not in _CV2_INTERPOLATIONS:
        known = ", ".join(_CV2_INTERPOLATIONS)
        raise UserError(f"recipe {name!r} does not take interpolation {interpolation!r}; use one of {known}")
    if raster:
        colour: Mapping[str, Any] = {"BandGainOffset": {"gain": 0.1, "offset": 0.1, "p": 0.8}}
    elif in_chans == 4:
        colour = {"MultiplicativeNoise": {"multiplier": [0.8, 1.2], "per_channel": True, "p": 0.8}}
    else:
        colour = {"ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.8}}
    crop = {
        "size": list(size),
        "scale": list(scale),
        "ratio": list(ratio),
        "interpolation": _CV2_INTERPOLATIONS[interpolation],
        "area_for_downscale": "image",
    }
    holes = {"num_holes_range": [1, 4], "hole_height_range": [0.05, 0.2], "hole_width_range": [0.05, 0.2], "p": 0.25}
    steps: dict[str, Mapping[str, Any]] = {
        "orientation": {"Orientation": {}},
        "crop": {"RandomResizedCrop": crop},
        "colour": colour,
        "dropout": {"CoarseDropout": holes},
    }
    return [steps[step] for step in RECIPES[name]]


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    # timm's policies go down to 0 bits, a black image, which Pillow 13 refuses.
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _size(img_size: int | Sequence[int]) -> tuple[int, int]:
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
        raise UserError(f"img_size={img_size!r} must be a positive number or [height, width]")
    return size


def _per_channel(values: Sequence[float], in_chans: int, name: str, raster: bool) -> tuple[float, ...]:
    values = tuple(float(v) for v in values)
    if len(values) == in_chans:
        return values
    if len(values) == 3 and not raster:
        average = sum(values) / 3
        return (average,) if in_chans == 1 else (*values, average)
    raise UserError(f"{name} has {len(values)} values for in_chans={in_chans}")


def _check_auto_augment(policy: str | None) -> None:
    if not policy:
        return
    kind = policy.split("-")[0]
    if kind not in _AUTO_AUGMENT:
        raise UserError(
            f"unknown auto_augment {policy!r}{nearest(kind, _AUTO_AUGMENT)} (known: {', '.join(_AUTO_AUGMENT)})"
        )
    for section in policy.split("-")[1:]:
        if not re.fullmatch(r"[a-z]+[0-9.]*", section):
            raise UserError(f"auto_augment {policy!r}: cannot read {section!r}; write as in rand-m9-mstd0.5-inc1")


class AlbumentationsTransform:
    """An albumentations pipeline given as data, then normalisation; of rasters normalisation, then the pipeline.

    albumentations keeps random generators of its own, so the loader calls ``set_random_seed`` before each sample; no
    other generator is used.
    """

    takes_arrays = True

    def __init__(
        self,
        pipeline: Sequence[Mapping[str, Any] | str],
        size: tuple[int, int],
        in_chans: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        raster: bool = False,
        stored: bool = False,
    ) -> None:
        import albumentations

        if not pipeline:
            raise UserError("library is 'albumentations', but the list of transforms is empty; give [{Name: {...}}]")
        self.compose = albumentations.Compose([_build_albumentation(entry, raster) for entry in pipeline])
        self.size = size
        self.raster, self.stored = raster, stored
        self.mean = np.array(mean, np.float32)
        self.std = np.array(std, np.float32)
        self(np.zeros((2 * size[0] + 1, 2 * size[1] + 3, in_chans), np.float32 if raster else np.uint8))

    def set_random_seed(self, seed: int) -> None:
        # One pair of generators for all steps. albumentations' own set_random_seed starts each step's from the same
        # seed: their draws would be the same numbers (dropout would only ever meet images whose colours change too).
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        array = np.array(image)
        array = array[..., None] if array.ndim == 2 else array
        if self.raster:
            pixels = self._run(normalise(array, self.mean, self.std))
        else:
            result = self._run(array)
            if self.stored and result.dtype == np.uint8:
                return torch.from_numpy(result)
            scaled = result.astype(np.float32) / 255 if result.dtype == np.uint8 else result.astype(np.float32)
            pixels = (scaled - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def _run(self, array: np.ndarray) -> np.ndarray:
        """(H, W, C) -> (*size, C)."""
        try:
            result = self.compose(image=array)["image"]
        except Exception as error:  # OpenCV's and the transforms' own types
            line = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the albumentations pipeline fails on a {array.shape} image: {line}") from None
        if result.shape[:2] != self.size:
            raise UserError(
                f"the albumentations pipeline gives images of {result.shape[0]}x{result.shape[1]}, the model takes "
                f"{self.size[0]}x{self.size[1]}; end it with a resize or a crop, such as "
                f"RandomResizedCrop: {{size: [{self.size[0]}, {self.size[1]}]}}"
            )
        return result.reshape(*self.size, -1)


def _build_albumentation(entry: Mapping[str, Any] | str, raster: bool) -> Any:
    import albumentations as library

    from vision_mamba.data.augmentations import BandGainOffset, Orientation

    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise UserError(f"albumentations entry {entry!r} must be {{Name: {{argument: value}}}}")
    ((name, arguments),) = entry.items()
    arguments = dict(arguments or {})
    kinds = (library.BasicTransform, library.BaseCompose)
    known = {
        key: value
        for key, value in vars(library).items()
        if inspect.isclass(value) and issubclass(value, kinds) and not inspect.isabstract(value)
    }
    known |= {own.__name__: own for own in (BandGainOffset, Orientation)}
    if name not in known:
        raise UserError(f"albumentations has no transform {name!r}{nearest(name, known)}")
    # Transforms of pixel values clip floats to 0..1, which normalised bands are not.
    on_rasters = issubclass(known[name], (library.DualTransform, library.BaseCompose, BandGainOffset))
    if raster != on_rasters and (raster or known[name] is BandGainOffset):
        raise UserError(
            f"albumentations' {name} is for 8-bit pictures; use geometry, dropout and BandGainOffset for rasters"
            if raster
            else "BandGainOffset is for rasters; use ColorJitter or MultiplicativeNoise for pictures"
        )
    accepted = [p for p in inspect.signature(known[name].__init__).parameters if p != "self"]
    for argument in arguments:
        if argument not in accepted:
            raise UserError(
                f"albumentations' {name} has no argument {argument!r}{nearest(argument, accepted)} "
                f"(it takes: {', '.join(accepted)})"
            )
    if "transforms" in arguments:
        arguments["transforms"] = [_build_albumentation(inner, raster) for inner in arguments["transforms"]]
    # YAML has lists where the library wants tuples.
    arguments = {k: tuple(v) if isinstance(v, list) and k != "transforms" else v for k, v in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return known[name](**arguments)
    except Exception as error:  # pydantic's ValidationError, TypeError, or a UserWarning on a bad value
        raise UserError(f"albumentations' {name} does not accept {arguments}: {error}") from None
