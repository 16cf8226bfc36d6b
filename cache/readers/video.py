"""Video files: which stored frames belong to an episode (demuxing only), and decoding those in order.

A frame is known by its presentation time stamp (pts, in ticks of the stream's time base), never by counting: one file
may hold many episodes and start anywhere. Letters: T frames of the episode, H × W image size.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from ...common.mp4 import quiet_libav
from .episode import CorruptEpisode
from .location import unreadable

DECODER_THREADS = 2  # per open file; a build decodes several files at once


@dataclass(frozen=True, slots=True)
class VideoExtent:
    """The part of one video file that belongs to one episode."""

    path: Path
    pts: Sequence[int]  # one time stamp per frame of the episode, ascending; a range where they are evenly spaced
    height: int  # H
    width: int  # W
    sha256: str  # hex, over the time (relative to the episode) and the compressed bytes of its packets


def find_extent(path: Path, times: np.ndarray, where: str) -> VideoExtent:
    """Match each of `times` [T] (ascending, seconds into the file) to the nearest stored frame, without decoding.

    `CorruptEpisode`, beginning with `where`, when the file cannot be read or is cut off, or when a time has no frame of
    its own within a quarter of the shortest step (so a video shorter than its table, or one that drifts, is refused).
    """
    tolerance = 0.25 * float(np.diff(times).min()) if len(times) > 1 else 0.01
    packets: list[tuple[int, bytes]] = []
    with _opened(path, where) as (container, stream):
        base = _tick(stream)
        first, last = math.floor((times[0] - tolerance) / base), math.ceil((times[-1] + tolerance) / base)
        _seek(container, stream, first, 1.0)  # a second early: reordered frames may be stored before their key frame
        for packet in container.demux(stream):
            if packet.pts is None:  # the flush packet at the end
                continue
            if packet.is_corrupt:
                raise CorruptEpisode(f"{where}: {path.name} is cut off at {packet.pts * base:.3f} s", "unreadable-file")
            if first <= packet.pts <= last:
                packets.append((packet.pts, bytes(packet)))
            elif packet.dts is not None and packet.dts > last:  # pts ≥ dts: nothing of this episode follows
                break
        height, width = stream.codec_context.height, stream.codec_context.width
    packets.sort(key=lambda p: p[0])
    stored = np.array([p for p, _ in packets], dtype=np.int64)
    if not len(stored):
        span = f"between {times[0]:.3f} and {times[-1]:.3f} s"
        raise CorruptEpisode(f"{where}: {path.name} has no frame {span}", "unreadable-file")
    nearest = np.searchsorted((stored[1:] + stored[:-1]) / 2, times / base)  # midpoints separate the nearest neighbors
    wrong = np.abs(stored[nearest] * base - times) > tolerance
    wrong[1:] |= np.diff(nearest) == 0
    if wrong.any():
        row = int(wrong.argmax())
        raise CorruptEpisode(
            f"{where}: {path.name} has no frame for row {row} at {times[row]:.3f} s "
            f"({len(times)} rows, {len(stored)} stored frames in their span)",
            "row-count",
        )
    digest = hashlib.sha256()
    for pts, data in packets:
        digest.update(f"{pts - packets[0][0]}:{len(data)};".encode())
        digest.update(data)
    return VideoExtent(path, _compact(stored[nearest]), height, width, digest.hexdigest())


def _compact(pts: np.ndarray) -> Sequence[int]:
    """Ascending integers in little memory: a source keeps those of every episode."""
    steps = np.diff(pts)
    if len(steps) and (steps == steps[0]).all():
        return range(int(pts[0]), int(pts[-1]) + 1, int(steps[0]))
    return array("q", pts.tolist())


def decode(extent: VideoExtent, where: str, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] RGB of frames start..stop-1 of `extent`: the file is opened once and decoded forwards from
    the key frame before `start`. `CorruptEpisode` when a frame cannot be decoded or is damaged."""
    with _opened(extent.path, where) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = DECODER_THREADS
        frames = _decoded_from(container, stream, extent.pts[start])
        frame = next(frames, None)
        for index in range(start, stop):
            while frame is not None and (frame.pts is None or frame.pts < extent.pts[index]):
                frame = next(frames, None)
            if frame is None or frame.pts != extent.pts[index] or frame.is_corrupt:
                reason = f"{where}: frame {index} of {extent.path.name} cannot be decoded"
                raise CorruptEpisode(reason, "unreadable-file")
            yield frame.to_ndarray(format="rgb24")


def frames_listed(path: Path, where: str) -> int:
    """Frames of a video by its container, none of them read; 0 where it does not say."""
    with _opened(path, where) as (_, stream):
        return stream.frames


def _decoded_from(container: av.container.InputContainer, stream: av.VideoStream, pts: int) -> Iterator[av.VideoFrame]:
    """Decode forwards from a key frame that is shown at or before `pts`. A seek goes by decoding time, so it may find a
    key frame that is shown later (reordered frames, open groups of images): then step back further and further."""
    for seconds in (0, 1, 4, 16, math.inf):
        _seek(container, stream, pts, seconds)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= pts:
            return itertools.chain([first], frames)
    return iter(())


def _seek(container: av.container.InputContainer, stream: av.VideoStream, pts: int, seconds_before: float) -> None:
    """To the last key frame stored at or before `pts` less some seconds, or to the beginning of the file."""
    container.seek(int(max(pts - seconds_before / _tick(stream), 0)), stream=stream, backward=True)


def _tick(stream: av.VideoStream) -> float:
    """Seconds from one time stamp to the next; libav gives every stream of an open file a time base."""
    assert stream.time_base is not None
    return float(stream.time_base)


@contextmanager
def _opened(path: Path, where: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open `path`; any FFmpeg or file error inside the block becomes `CorruptEpisode`."""
    quiet_libav()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise CorruptEpisode(f"{where}: {path.name} holds no video stream", "unreadable-file")
            yield container, container.streams.video[0]
    except FileNotFoundError:
        raise CorruptEpisode(f"{where}: {path} is missing", "missing-file") from None
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorruptEpisode(f"{where}: {unreadable(path, 'video', reason)}", "unreadable-file") from None
