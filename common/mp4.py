"""Writing mp4 video, and keeping libav quiet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from .files import discard


def quiet_libav() -> None:
    """Silence FFmpeg's libraries except for fatal errors, and keep their log out of Python.

    PyAV's own log callback takes the interpreter lock in FFmpeg's threads: closing a file that is still decoding (the
    lock is held while those threads are joined) then waits forever. Other libraries restore that callback when they are
    imported (torchvision does), so call this whenever a file is opened.
    """
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.FATAL)  # `CorruptEpisode` says what is wrong with a file


@contextlib.contextmanager
def mp4_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Open an mp4 (h264, yuv420p); gives a function that adds a frame, uint8 `[H, W, 3]`, H and W even and constant.

    The file appears under its name, or replaces the one there, when the block ends without an error.
    """
    quiet_libav()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "20"})
            stream.pix_fmt = "yuv420p"

            def write(frame: np.ndarray) -> None:
                if not stream.codec_context.is_open:
                    stream.height, stream.width = frame.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

            yield write
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        discard(temporary)
