"""What a run says while it trains: progress on the console, one CSV row an epoch, TensorBoard."""

from __future__ import annotations

import csv
import io
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vision_mamba.engine.checkpoint import LOG, write_text


class EpochLog:
    """One row of numbers for each epoch, in `log.csv` and, if asked for, in TensorBoard.

    Args:
        folder: Folder of the run.
        finished_epochs: Rows of later epochs are dropped: a killed run may have logged an epoch whose checkpoint
            it did not live to write, or half a row.
        tensorboard: Also write event files into `folder/tensorboard`.
    """

    def __init__(self, folder: Path, *, finished_epochs: int, tensorboard: bool):
        self.path = folder / LOG
        self.rows = [row for row in _read_rows(self.path) if row["epoch"] <= finished_epochs]
        if self.path.exists():
            write_text(_to_csv(self.rows), self.path)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Events of the epochs that are done again are hidden.
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=finished_epochs + 1)

    def add(self, row: dict[str, float]) -> None:
        """Adds an epoch's row; `row["epoch"]` counts from 1."""
        self.rows.append(row)
        # Rewritten whole, as it is small: no torn last line, and a column may be empty in some epochs.
        write_text(_to_csv(self.rows), self.path)
        if self.writer is not None:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self.writer.add_scalar(name, value, row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        """Closes the TensorBoard writer."""
        if self.writer is not None:
            self.writer.close()


class Progress:
    """A progress bar on a terminal, a line every `interval` seconds elsewhere; silent unless `enabled`."""

    def __init__(self, *, epochs: int, batches: int, interval: float, enabled: bool):
        self.epochs, self.batches = epochs, batches
        self.enabled = enabled
        self.bar = None
        self.terminal = sys.stderr.isatty()
        self.interval = 0.5 if self.terminal else interval
        self.run_start = self.shown = time.perf_counter()
        self.done = 0

    def start_epoch(self, epoch: int, start_batch: int) -> None:
        """Begins epoch number `epoch` (from 0) at a batch."""
        self.epoch, self.batch = epoch, start_batch
        self.epoch_start, self.images = time.perf_counter(), 0
        if self.enabled and self.terminal:
            self.bar = tqdm(
                total=self.batches,
                initial=start_batch,
                desc=f"epoch {epoch + 1}/{self.epochs}",
                leave=False,
                dynamic_ncols=True,
                # tqdm's own rate and time are of the epoch; the text holds those of the run.
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def advance(self, images: int) -> bool:
        """Counts one batch of `images` (over all processes); true when it is time to `show`."""
        self.batch += 1
        self.done += 1
        self.images += images
        if not self.enabled or (time.perf_counter() - self.shown < self.interval and self.batch < self.batches):
            return False
        self.shown = time.perf_counter()
        return True

    def show(self, *, loss: float, lr: float) -> None:
        """Shows loss, learning rate, speed, and the time the whole run still needs."""
        text = f"loss {loss:.4f}  lr {lr:.2e}  {self.images_per_s:.1f} images/s  ETA {self.eta}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(self.batch - self.bar.n)
        else:
            print(f"epoch {self.epoch + 1}/{self.epochs}  batch {self.batch}/{self.batches}  {text}", flush=True)

    def end_epoch(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    @property
    def images_per_s(self) -> float:
        """Training speed in this epoch."""
        return self.images / max(time.perf_counter() - self.epoch_start, 1e-9)

    @property
    def eta(self) -> timedelta:
        """Time to the end of the run, evaluations included, at the speed of this session so far."""
        left = (self.epochs - self.epoch) * self.batches - self.batch
        return timedelta(seconds=round((time.perf_counter() - self.run_start) / max(self.done, 1) * left))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    with open(path, newline="") as file:
        for record in csv.DictReader(file):
            try:
                row = {k: float(v) if v else None for k, v in record.items()}
                row["epoch"] = int(record["epoch"])
            except (TypeError, ValueError, KeyError):
                continue  # not a row of ours, or a torn one: its epoch is trained again
            rows.append(row)
    return rows


def _to_csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
