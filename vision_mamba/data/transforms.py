"""From a decoded image to a normalised tensor: timm's transforms, or an albumentations pipeline from a config."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vision_mamba.data.images import check_in_chans
from vision_mamba.errors import UserError, nearest

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")
_AUTO_AUGMENT = ("rand", "augmix", "3a", "original", "originalr", "v0", "v0r")

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
) -> Callable[[Image.Image], torch.Tensor]:
    """The transform of one split.

    ``split="train"`` augments; any other resizes the shorter side to ``size / crop_pct`` and crops the centre.

    Args:
        split: name of the split.
        img_size: side, or ``[height, width]``, in pixels.
        in_chans: channels of the images; 1 or 4 reuse three-valued ``mean`` and ``std`` by their average.
        mean, std: of images scaled to 0..1, one value a channel.
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

    Returns:
        A function from a PIL image to a float32 tensor (in_chans, height, width).

    Raises:
        UserError: an unknown name or a value out of range; the nearest known name is given.
    """
    check_in_chans(in_chans)
    size = _size(img_size)
    mean, std = _per_channel(mean, in_chans, "mean"), _per_channel(std, in_chans, "std")
    if interpolation not in INTERPOLATIONS or (interpolation == "random" and split != "train"):
        raise UserError(
            f"unknown interpolation {interpolation!r}{nearest(interpolation, INTERPOLATIONS)} "
            f"(known: {', '.join(INTERPOLATIONS)})"
        )
    if library not in ("timm", "albumentations"):
        raise UserError(f"unknown augmentation library {library!r}; give 'timm' or 'albumentations'")
    if library == "albumentations" and split == "train":
        return AlbumentationsTransform(albumentations or (), size, in_chans, mean, std)
    if albumentations and library == "timm":
        raise UserError("an albumentations pipeline is given, but library is 'timm'; set library: albumentations")
    if split != "train":
        return _timm_transform(size, in_chans, mean, std, False, interpolation=interpolation, crop_pct=crop_pct)

    _check_auto_augment(auto_augment)
    if in_chans == 4 and (auto_augment or color_jitter):
        raise UserError("color_jitter and auto_augment work on grey and RGB images; unset them for in_chans=4")
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high or (name == "scale" and high > 1):
            raise UserError(f"{name}={[low, high]} is not a range of positive numbers{' up to 1' * (name == 'scale')}")
    return _timm_transform(
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


def _timm_transform(size, in_chans, mean, std, is_training: bool, **options):
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
    return transform


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


def _per_channel(values: Sequence[float], in_chans: int, name: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in values)
    if len(values) == in_chans:
        return values
    if len(values) == 3:
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
    """An albumentations pipeline given as data, then normalisation.

    albumentations keeps random generators of its own, so the loader calls ``set_random_seed`` before each sample.
    """

    def __init__(
        self,
        pipeline: Sequence[Mapping[str, Any] | str],
        size: tuple[int, int],
        in_chans: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        import albumentations

        if not pipeline:
            raise UserError("library is 'albumentations', but the list of transforms is empty; give [{Name: {...}}]")
        self.compose = albumentations.Compose([_build_albumentation(entry) for entry in pipeline])
        self.size = size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        probe = np.zeros((2 * size[0] + 1, 2 * size[1] + 3, in_chans), dtype=np.uint8)
        self._run(probe)

    def set_random_seed(self, seed: int) -> None:
        self.compose.set_random_seed(seed)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        array = np.array(image)
        pixels = self._run(array[..., None] if array.ndim == 2 else array)
        return (pixels - self.mean) / self.std

    def _run(self, array: np.ndarray) -> torch.Tensor:
        """(H, W, C) uint8 -> (C, H, W) float in 0..1."""
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
        result = result.reshape(*self.size, -1)
        scaled = result.astype(np.float32) / 255 if result.dtype == np.uint8 else result.astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


def _build_albumentation(entry: Mapping[str, Any] | str) -> Any:
    import albumentations as library

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
    if name not in known:
        raise UserError(f"albumentations has no transform {name!r}{nearest(name, known)}")
    accepted = [p for p in inspect.signature(known[name].__init__).parameters if p != "self"]
    for argument in arguments:
        if argument not in accepted:
            raise UserError(
                f"albumentations' {name} has no argument {argument!r}{nearest(argument, accepted)} "
                f"(it takes: {', '.join(accepted)})"
            )
    if "transforms" in arguments:
        arguments["transforms"] = [_build_albumentation(inner) for inner in arguments["transforms"]]
    # YAML has lists where the library wants tuples.
    arguments = {k: tuple(v) if isinstance(v, list) and k != "transforms" else v for k, v in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return known[name](**arguments)
    except Exception as error:  # pydantic's ValidationError, TypeError, or a UserWarning on a bad value
        raise UserError(f"albumentations' {name} does not accept {arguments}: {error}") from None
