"""Writing mp4 video, and keeping libav quiet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def quiet_libav() -> None:
    """Let FFmpeg's libraries print errors only, and never through Python.

    PyAV's own log callback takes the interpreter lock in FFmpeg's threads: closing a file that is still decoding (the lock is
    held while those threads are joined) then waits for ever. Other libraries put that callback back when they are
    imported (torchvision does), so this is called at every opening.
    """
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.FATAL)  # what is wrong with a file is said by `CorruptEpisode`


@contextlib.contextmanager
def mp4_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that adds one picture, uint8 `[H, W, 3]` with even sides, all of one size, to an mp4 (h264, yuv420p).

    The file appears under its name, or replaces the one there, when the block ends well; otherwise nothing is left.
    """
    quiet_libav()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "20"})
            begun = False

            def write(picture: np.ndarray) -> None:
                nonlocal begun
                if not begun:
                    stream.height, stream.width, stream.pix_fmt, begun = (
                        picture.shape[0],
                        picture.shape[1],
                        "yuv420p",
                        True,
                    )
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

            yield write
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
