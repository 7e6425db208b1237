"""A scene's results in parts, so that a killed run goes on where it stopped and several processes share a scene."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vision_mamba.engine.distributed import barrier
from vision_mamba.errors import UserError
from vision_mamba.files import replacing

from .reader import SceneReader
from .windows import Grid

#: Jobs of a writer that wait, those of three batches or so: a GPU that has them all behind it has nothing left to do.
_WAITING = 16


class Writer:
    """A thread that stores results while the next are computed; used as a context."""

    def __init__(self) -> None:
        self._pool, self._waiting = ThreadPoolExecutor(1), deque[Future]()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; what has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def submit(self, job: Callable[..., None], *args: Any) -> Future:
        """Jobs are done in order. At most 16 wait: that bounds memory, and brings a full disk to light."""
        future = self._pool.submit(job, *args)
        self._waiting.append(future)
        while len(self._waiting) > _WAITING:
            self._waiting.popleft().result()
        return future

    def finish(self) -> None:
        """Waits for the jobs, and raises what went wrong in one."""
        while self._waiting:
            self._waiting.popleft().result()


class Parts:
    """Finished parts of a scene, files in a folder beside the results until these are whole.

    A part belongs to a group of window columns (:attr:`Grid.panels`) and has a number there, from the top down.
    """

    def __init__(self, folder: Path, reader: SceneReader, grid: Grid, count: int, options: dict[str, Any]) -> None:
        """
        Args:
            folder: of this scene alone.
            reader: of the scene.
            grid: its windows.
            count: parts in each group of columns.
            options: whatever else the parts depend on; a run to go on with must have the same.
        """
        self.folder, self.grid, self.count = folder, grid, count
        status = os.stat(reader.path) if reader.path.exists() else None
        self.plan = {
            "window": grid.window,
            "overlap": grid.overlap,
            "panels": len(grid.panels),
            **json.loads(json.dumps(options)),
            "source": str(reader.path.resolve()),
            "size": [reader.height, reader.width],
            "bands": reader.bands,
            "mean": list(map(float, reader.model.mean)),
            "std": list(map(float, reader.model.std)),
            "amp": str(reader.model.amp),
            "modified": status.st_mtime_ns if status else None,
        }

    def path(self, panel: int, index: int) -> Path:
        return self.folder / f"{panel:03d}-{index:06d}.npy"

    def open(self, results: Iterable[Path], *, resume: bool, overwrite: bool, rank: int = 0) -> None:
        """The first process makes the folder, or checks what it goes on with; the others wait.

        Args:
            results: what the parts will be made into.
            resume, overwrite: go on with a run that was interrupted; replace what exists.
            rank: this process.

        Raises:
            UserError: one of the results exists and is not to be replaced; the folder is there and neither ``resume``
                nor ``overwrite`` is set, or it is of other options.
        """
        if rank == 0:
            existing = [path for path in results if path.exists()]
            # Where parts are left, the results that exist are those of the run that goes on.
            if existing and not (overwrite or (resume and self.folder.exists())):
                raise UserError(f"{existing[0]} exists; --overwrite replaces it, --out takes another folder")
            self._open(resume, overwrite)
        barrier()

    def _open(self, resume: bool, overwrite: bool) -> None:
        plan = self.folder / "plan.json"
        if self.folder.exists() and resume:
            old = json.loads(plan.read_text()) if plan.exists() else {}
            changed = [key for key in self.plan if old.get(key) != self.plan[key]]
            if changed:
                raise UserError(
                    f"{self.folder} was begun with another {', '.join(changed)}; give the same options, or --overwrite"
                )
        elif self.folder.exists() and not overwrite:
            raise UserError(
                f"{self.folder} is of an interrupted run; --resume goes on with it, --overwrite starts anew"
            )
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(plan) as temporary:
                temporary.write_text(json.dumps(self.plan))
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror or error}") from None

    def missing(self, panel: int, rank: int, world_size: int) -> list[range]:
        """A process's runs of consecutive parts of a group of columns that are still to be made."""
        mine = range(self.count * rank // world_size, self.count * (rank + 1) // world_size)
        runs: list[range] = []
        for index in mine:
            if self.path(panel, index).exists():
                continue
            if runs and runs[-1].stop == index:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        return runs

    def progress(self, source: str | os.PathLike, planned: Iterable[tuple[int, range]], shown: bool) -> tqdm:
        """Windows a second and the time left for window rows of groups of columns."""
        total = sum(len(rows) * len(self.grid.panels[panel]) for panel, rows in planned)
        return tqdm(total=total, unit=" windows", desc=Path(source).name, disable=not shown)

    def save(self, path: Path, array: np.ndarray) -> None:
        """Writes a part's file, whole or not at all."""
        # Two processes write what they share at the border of their rows, the same numbers under the same name.
        with replacing(path) as temporary:
            np.save(temporary, array)

    def close(self, rank: int = 0) -> None:
        """Removes the folder, when all processes have arrived."""
        barrier()
        if rank == 0:
            shutil.rmtree(self.folder)
        barrier()
