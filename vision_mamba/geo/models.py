"""What a scene needs to know of a model, and where such models come from."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_mamba.engine.export import open_exported
from vision_mamba.errors import UserError

Turn = tuple[int, bool]  # quarter turns, and whether the image is flipped first

#: Views of an image for test-time augmentation.
TTA: dict[str, tuple[Turn, ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "turns": tuple((turn, flip) for flip in (False, True) for turn in range(4)),
}


@dataclass(kw_only=True)
class SceneModel:
    """How a model's input is made from a raster's bands.

    Attributes:
        classes: names, in the order of the model's scores.
        mean, std: a value a band, in the units of the raster's numbers (0 to 255 for 8-bit images).
        palette: (red, green, blue) a class, 0 to 255; None takes a default.
        bands: which bands of a raster, from 1, in the model's order; None takes as many as ``mean`` has.
        device: where the model is.
        amp: autocast type, or None.
        eight_bit: ``mean`` and ``std`` are of images with values 0 to 255.
    """

    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    palette: Sequence[Sequence[int]] | None = None
    bands: Sequence[int] | None = None
    device: torch.device | str = "cpu"
    amp: torch.dtype | None = None
    eight_bit: bool = True

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or (self.bands is not None and len(self.bands) != len(self.mean)):
            raise ValueError(
                f"{len(self.mean)} means, {len(self.std)} standard deviations and "
                f"{'no' if self.bands is None else len(self.bands)} bands; give one of each a band"
            )
        if not 1 <= len(self.classes) <= 255:
            raise ValueError(f"{len(self.classes)} classes: 1 to 255 are possible")

    def colours(self) -> list[tuple[int, int, int]]:
        """The palette, or evenly spaced hues."""
        if self.palette is not None:
            return [(int(r), int(g), int(b)) for r, g, b in self.palette]
        count = len(self.classes)
        found = [colorsys.hsv_to_rgb(i / count, 0.75, 0.9 - 0.3 * (i % 2)) for i in range(count)]
        return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in found]

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, self.amp, enabled=self.amp is not None)


@dataclass(kw_only=True)
class Segmentor(SceneModel):
    """A model that gives class scores for pixels.

    Attributes:
        model: (N, bands, height, width) float32, normalised -> logits (N, classes, h, w), of any size; where there
            are two classes, one score may stand for both (a sigmoid's). Any torch module or function.
    """

    model: Callable[[Tensor], Tensor]

    def probabilities(self, x: Tensor, views: Sequence[Turn] = TTA["none"], scales: Sequence[float] = (1.0,)) -> Tensor:
        """Normalised windows (N, bands, h, w) -> class probabilities (N, classes, h, w), float32.

        The mean over ``views`` (turned and flipped, turned back) and ``scales`` (resized, scores resized back).
        """
        size, total = x.shape[-2:], None
        for turn, flip in views:
            for scale in scales:
                view = x.flip(-1) if flip else x
                view = torch.rot90(view, turn, (-2, -1)) if turn else view
                if scale != 1:
                    sides = [max(round(side * scale / 32) * 32, 32) for side in view.shape[-2:]]
                    view = F.interpolate(view, sides, mode="bilinear", align_corners=False)
                with self.autocast():
                    logits = self.model(view)
                if not isinstance(logits, Tensor) or logits.ndim != 4:
                    what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
                    raise UserError(f"the model gives {what}, not scores of pixels (images, classes, height, width)")
                logits = torch.rot90(logits.float(), -turn, (-2, -1)) if turn else logits.float()
                logits = logits.flip(-1) if flip else logits
                if logits.shape[-2:] != size:
                    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
                found = self._activate(logits)
                total = found if total is None else total + found
        assert total is not None
        count = len(views) * len(scales)
        return total / count if count > 1 else total

    def _activate(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1 and len(self.classes) == 2:
            one = logits.sigmoid()
            return torch.cat([1 - one, one], dim=1)
        if logits.shape[1] != len(self.classes):
            raise UserError(f"the model gives {logits.shape[1]} scores a pixel for {len(self.classes)} classes")
        return logits.softmax(1)


@dataclass(kw_only=True)
class Detector(SceneModel):
    """A model that finds objects.

    Attributes:
        model: (N, bands, height, width) float32, normalised -> for each image boxes (n, 4) as left, top, right,
            bottom in pixels, scores (n,) and class numbers (n,).
    """

    model: Callable[[Tensor], list[tuple[Tensor, Tensor, Tensor]]]


def load_mmseg(
    config: str | os.PathLike, checkpoint: str | os.PathLike, *, device: torch.device | str = "cpu", **options
) -> Segmentor:
    """A segmentor of mmsegmentation: one of ``configs/segmentation`` or any other config, and its checkpoint.

    Args:
        options: ``bands`` and ``amp`` of :class:`SceneModel`.

    Raises:
        UserError: no such file, or a config that is not of a segmentor.
    """
    model, fields, order = _open_mm("seg", config, checkpoint, device)

    def logits(x: Tensor) -> Tensor:
        shape = tuple(x.shape[-2:])
        return model.encode_decode(x[:, order], [dict(ori_shape=shape, img_shape=shape, pad_shape=shape)] * len(x))

    return Segmentor(model=logits, device=device, **fields, **options)


def load_mmdet(
    config: str | os.PathLike, checkpoint: str | os.PathLike, *, device: torch.device | str = "cpu", **options
) -> Detector:
    """A detector of mmdetection: one of ``configs/detection`` or any other config, and its checkpoint.

    Windows are seen at the scale of the scene: nothing is resized.

    Args:
        options: ``bands`` and ``amp`` of :class:`SceneModel`.

    Raises:
        UserError: no such file, or a config that is not of a detector.
    """
    model, fields, order = _open_mm("det", config, checkpoint, device)
    from mmdet.structures import DetDataSample

    def detect(x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        shape = tuple(x.shape[-2:])
        meta = dict(ori_shape=shape, img_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
        samples = model.predict(x[:, order], [DetDataSample(metainfo=meta) for _ in x])
        found = [sample.pred_instances for sample in samples]
        return [(item.bboxes, item.scores, item.labels) for item in found]

    return Detector(model=detect, device=device, **fields, **options)


def _open_mm(task: str, config, checkpoint, device) -> tuple[nn.Module, dict[str, Any], list[int]]:
    """The model, its classes, palette, mean and std in RGB order, and the order of bands that it takes."""
    from vision_mamba.mm.run import open_model

    model = open_model(task, config, checkpoint, device=device)
    data, meta = getattr(model, "data_preprocessor", None), model.dataset_meta
    if data is None or getattr(data, "mean", None) is None or not meta.get("classes"):
        raise UserError(f"{config} has no data_preprocessor with mean and std, or no named classes")
    mean, std = data.mean.flatten().tolist(), data.std.flatten().tolist()
    order = list(range(len(mean)))
    # OpenMMLab reads colour images as BGR; with a conversion, mean and std are RGB's, as ours.
    if len(mean) == 3 and not getattr(data, "_channel_conversion", getattr(data, "channel_conversion", False)):
        mean, std, order = mean[::-1], std[::-1], order[::-1]
    return model, dict(classes=meta["classes"], palette=meta.get("palette"), mean=mean, std=std), order


def load_exported(
    path: str | os.PathLike,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    device: torch.device | str = "cpu",
    **options,
) -> Segmentor:
    """A model in one file: ``.pt2`` (torch.export) or ``.onnx`` (onnxruntime).

    Args:
        path: the file, for windows and batches as it was exported with.
        classes, mean, std: as in :class:`SceneModel`; None takes what :func:`vision_mamba.engine.export.export_model`
            wrote into the file, which for ``mean`` and ``std`` is of values 0 to 1.
        options: ``palette``, ``bands`` and ``amp`` of :class:`SceneModel`.

    Raises:
        UserError: no such file, another ending, onnxruntime is missing, or classes, mean or std are not known.
    """
    exported = open_exported(path, device=device)
    about = exported.about
    if not about.get("raster"):  # statistics of other rasters are not in the units of this one's numbers
        mean, std = (
            [255 * value for value in about[name]] if given is None and name in about else given
            for name, given in (("mean", mean), ("std", std))
        )
    classes = about.get("classes") if classes is None else classes
    unknown = [name for name, value in (("classes", classes), ("mean", mean), ("std", std)) if not value]
    if classes is None or mean is None or std is None or unknown:
        raise UserError(f"{path} does not say its {' and '.join(unknown)}; give {'--' + ', --'.join(unknown)}")
    return Segmentor(model=exported.run, classes=classes, mean=mean, std=std, device=device, **options)
