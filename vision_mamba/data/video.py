"""Reading a clip: some frames of a video file, evenly spread. PyAV is imported when asked for."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from PIL import Image

from vision_mamba.errors import UserError

VIDEO_EXTENSIONS = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"))


def is_video_name(name: str) -> bool:
    """True for a file name with a video extension that is not hidden."""
    path = Path(name)
    return path.suffix.lower() in VIDEO_EXTENSIONS and not path.name.startswith(".")


def import_av() -> ModuleType:
    """PyAV, or a UserError that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"videos are read by PyAV, which is not installed ({error}): pip install av (extra video)"
        ) from None
    return av


def frame_indices(count: int, num_frames: int) -> list[int]:
    """The middle frame of each of ``num_frames`` equal parts of a video of ``count`` frames; short videos repeat some.

    So the official VideoMamba samples Something-Something V2 for validation; its rule for Kinetics is the same but for
    rounding.
    """
    return [(2 * i + 1) * count // (2 * num_frames) for i in range(num_frames)]


def read_clip(path: str | os.PathLike, num_frames: int) -> list[Image.Image]:
    """``num_frames`` RGB pictures of a video file, upright, in the order of time.

    Raises:
        UserError: PyAV is not installed, or the file is no video that can be read.
    """
    av = import_av()
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise UserError(f"cannot read video {path}: it holds no pictures")
            # Counted, since the number in a header is optional and sometimes wrong.
            count = sum(packet.size > 0 for packet in container.demux(video=0))
        while count > 1:
            wanted = frame_indices(count, num_frames)
            found, seen = _decode(av, path, wanted)
            if seen > wanted[-1]:
                return [found[i] for i in wanted]
            count = seen  # some packets hold no frame that is shown
    except av.FFmpegError as error:
        raise UserError(f"cannot read video {path}: {error.strerror or error}") from error
    raise UserError(f"cannot read video {path}: frames in it: {count}, and a clip is of at least 2")


def _decode(av: ModuleType, path: str | os.PathLike, wanted: list[int]) -> tuple[dict[int, Image.Image], int]:
    """The frames whose numbers are ``wanted`` (ascending), and how many were decoded until the last of them."""
    found: dict[int, Image.Image] = {}
    seen = 0
    with av.open(os.fspath(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if seen in wanted:
                # Phones store what they filmed upright as lying pictures and an angle.
                found[seen] = frame.to_image().rotate(frame.rotation, expand=True)
            seen += 1
            if seen > wanted[-1]:
                break
    return found, seen
