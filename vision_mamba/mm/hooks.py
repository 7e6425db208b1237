"""Pictures that a run leaves behind: curves, and predictions on validation images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..files import replacing

_NOT_METRICS = ("time", "data_time", "memory", "iter", "epoch", "step", "lr", "base_lr")


@HOOKS.register_module()
class PicturesHook(Hook):
    """Draws ``curves.png`` and ``predictions/<image>.png`` in the run's folder at every evaluation.

    Args:
        images: how many images are drawn, evenly spaced over the set; each evaluation replaces the pictures.
        score_thr: detections below are not drawn.
    """

    priority = "LOWEST"

    def __init__(self, images: int = 8, score_thr: float = 0.3) -> None:
        self.images = images
        self.score_thr = score_thr

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._draw(runner, runner.val_dataloader, batch_idx, outputs)

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._draw(runner, runner.test_dataloader, batch_idx, outputs)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._curves(runner)

    def after_train(self, runner: Any) -> None:
        self._curves(runner)

    @master_only
    def _draw(self, runner: Any, loader: Any, batch_idx: int, outputs: Sequence[Any] | None) -> None:
        every = max(1, len(loader) // max(self.images, 1))
        if not self.images or batch_idx % every or batch_idx // every >= self.images or not outputs:
            return
        path = Path(runner.work_dir, "predictions", f"{Path(outputs[0].img_path).stem}.png")
        draw_sample(runner.visualizer, outputs[0], path, score_thr=self.score_thr)

    @master_only
    def _curves(self, runner: Any) -> None:
        rows = read_scalars(Path(runner.work_dir))
        if rows:
            plot_scalars(rows, Path(runner.work_dir) / "curves.png")


def draw_sample(visualizer: Any, sample: Any, path: Path, *, score_thr: float, draw_gt: bool = True) -> None:
    """Draws prediction (beside the truth, where there is one) over the image that ``sample`` was made from."""
    import mmcv

    image = mmcv.imread(sample.img_path, channel_order="rgb")
    extra = {"pred_score_thr": score_thr} if "pred_instances" in sample else {"with_labels": False}
    with replacing(path) as temporary:
        visualizer.add_datasample(
            path.stem, image, data_sample=sample.cpu(), draw_gt=draw_gt, out_file=str(temporary), **extra
        )


def read_scalars(work_dir: Path) -> list[dict[str, Any]]:
    """The log of a run, resumed parts joined, in the order written."""
    rows = []
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        rows += [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return rows


def plot_scalars(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Panels of losses and learning rate over iterations, and of metrics over evaluations."""
    from matplotlib.figure import Figure

    train = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "loss" not in row]
    panels: list[tuple[str, list[dict[str, Any]], list[str]]] = []
    losses = sorted({key for row in train for key in row if "loss" in key}, key=lambda key: (key != "loss", key))
    panels.append(("loss", train, losses[:6]))
    metrics = sorted({key for row in evaluations for key, v in row.items() if _is_metric(key, v)})
    panels.append(("evaluation", evaluations, metrics[:8]))
    panels.append(("learning rate", train, ["lr"]))
    panels = [panel for panel in panels if panel[1] and panel[2]]
    if not panels:
        return
    figure = Figure(figsize=(4.4 * len(panels), 3.4), dpi=120, layout="constrained")
    for i, (title, some, keys) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), i)
        for key in keys:
            points = {row["step"]: row[key] for row in some if isinstance(row.get(key), (int, float))}
            steps = sorted(points)
            axes.plot(
                steps, [points[s] for s in steps], marker="o" if len(steps) < 30 else None, markersize=3, label=key
            )
        axes.set_title(title)
        axes.set_xlabel("iteration" if title != "evaluation" or not train or "epoch" not in train[-1] else "epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _is_metric(key: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and key not in _NOT_METRICS
