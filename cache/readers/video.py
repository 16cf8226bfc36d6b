"""Video files: which stored frames belong to an episode (demuxing only), and decoding those in order.

A frame is known by its presentation time stamp (pts, in ticks of the stream's time base), never by counting: one file
may hold many episodes and start anywhere. Its pixels are those of the `ffmpeg` command line: turned as the file says,
converted to RGB by the matrix and range it is tagged with (BT.601, limited, where it is not), neither scaled to square
pixels nor tone mapped. Letters: T frames of the episode, H × W image size.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from ...common.mp4 import quiet_libav
from ...errors import Note
from .episode import CorruptEpisode
from .images import check_size, renamed
from .location import regular, unreadable

DECODER_THREADS = 2  # per open file; a build decodes several files at once
# Containers of recordings alone: a list of other files or addresses, as of HLS or ffconcat, is none.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,ivf,h264,hevc,obu,gif,mxf,nut,mjpeg"
)
_ALLOWED = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
# A title in Latin-1 is no damage; to PyAV 19 it never is.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
_STILLS = Disposition.attached_pic | Disposition.timed_thumbnails  # video streams that are no recording
_UNTAGGED = (0, 2, 5, 6)  # color matrices that mean BT.601, which is also what libswscale takes without a tag
_MATRICES = (*_UNTAGGED, 1, 4, 7, 9)  # those libswscale knows, by their numbers in H.273
_HDR = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_…
_FULL = 2  # AVCOL_RANGE_JPEG
_SLANT = 0.02  # of a display matrix that is taken for straight: 1 degree
_PLAIN = {f"yuv{how}p" for how in ("420", "422", "444")} | {"nv12", "nv21", "yuva420p", "yuyv422", "uyvy422"}
_PLAIN_FULL = {f"yuvj{how}p" for how in ("420", "422", "444")}  # these are of full range by their name


@dataclass(frozen=True, slots=True)
class VideoExtent:
    """The part of one video file that belongs to one episode."""

    path: Path
    pts: Sequence[int]  # one time stamp per frame of the episode, ascending; a range where they are evenly spaced
    height: int  # H of the frames as they are shown
    width: int  # W
    sha256: str  # hex, over the time (relative to the episode) and compressed bytes of its packets, and the conversion
    turn: str = ""  # how decoded frames are turned: t (axes exchanged), then r, c (rows, columns reversed)
    in_file: int = 0  # frames of the whole file by its header; 0 where that does not say
    begins: float = 0.0  # seconds at which the first frame of the file is shown
    notes: tuple[Note, ...] = ()  # what to know about its pixels


class NoFrame(CorruptEpisode):
    """A time has no frame of its own."""


def stored_times(path: Path, where: str, count: int = 0) -> np.ndarray:
    """Seconds [n], ascending, at which the frames of a file are shown, without decoding; those that are decoded but
    never shown (before the start that an edit list gives) are left out. `CorruptEpisode` as `find_extent`.

    With `count`, none at once for a file whose header gives another number of frames.
    """
    with _opened(path, where) as (container, stream):
        if count and stream.frames not in (0, count):
            return np.zeros(0)
        shown = []
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise CorruptEpisode(f"{where}: {path.name} is cut off", "unreadable-file")
            if packet.pts is not None and not packet.is_discard:
                shown.append(packet.pts)
        return np.unique(np.array(shown, np.int64)) * _tick(stream)


def find_extent(path: Path, times: np.ndarray, where: str) -> VideoExtent:
    """Match each of `times` [T] (ascending, seconds into the file) to the nearest stored frame, without decoding.

    `CorruptEpisode`, beginning with `where`, when the file cannot be read or is cut off, or when a time has no frame of
    its own within a quarter of the shortest step (so a video shorter than its table, or one that drifts, is refused).
    """
    tolerance = 0.25 * float(np.diff(times).min()) if len(times) > 1 else 0.01
    packets: list[tuple[int, bytes]] = []
    look = None  # what the first frame found says about all
    with _opened(path, where) as (container, stream):
        base = _tick(stream)
        what = f"{where}: {path.name}"
        check_size(stream.height, stream.width, what)
        first, last = math.floor((times[0] - tolerance) / base), math.ceil((times[-1] + tolerance) / base)
        _seek(container, stream, first, 1.0)  # a second early: reordered frames may be stored before their key frame
        for packet in container.demux(stream):
            if look is None and (frame := _decoded_alone(stream, packet)) is not None:
                look = _turn(frame, what) or "", _conversion(frame, what), frame.height, frame.width
            if packet.pts is None or packet.is_discard:  # the flush packet at the end; a frame that is never shown
                continue
            if packet.is_corrupt:
                raise CorruptEpisode(f"{where}: {path.name} is cut off at {packet.pts * base:.3f} s", "unreadable-file")
            if first <= packet.pts <= last:
                packets.append((packet.pts, bytes(packet)))
            elif packet.dts is not None and packet.dts > last:  # pts ≥ dts: nothing of this episode follows
                break
        in_file, begins = stream.frames, (stream.start_time or 0) * base
        notes = _notes(stream, path.name)
    packets.sort(key=lambda p: p[0])
    stored = np.array([p for p, _ in packets], dtype=np.int64)
    if not len(stored):
        span = f"between {times[0]:.3f} and {times[-1]:.3f} s"
        raise NoFrame(f"{where}: {path.name} has no frame {span}", "unreadable-file")
    nearest = np.searchsorted((stored[1:] + stored[:-1]) / 2, times / base)  # midpoints separate the nearest neighbors
    wrong = np.abs(stored[nearest] * base - times) > tolerance
    wrong[1:] |= np.diff(nearest) == 0
    if wrong.any():
        row = int(wrong.argmax())
        raise NoFrame(
            f"{where}: {path.name} has no frame for row {row} at {times[row]:.3f} s "
            f"({len(times)} rows, {len(stored)} stored frames in their span)",
            "row-count",
        )
    digest = hashlib.sha256()
    for pts, data in packets:
        digest.update(f"{pts - packets[0][0]}:{len(data)};".encode())
        digest.update(data)
    if look is None:
        raise CorruptEpisode(f"{where}: no frame of {path.name} can be decoded", "unreadable-file")
    turn, conversion, height, width = look
    height, width = (width, height) if "t" in turn else (height, width)
    name = renamed(conversion + turn, digest.hexdigest())
    return VideoExtent(path, _compact(stored[nearest]), height, width, name, turn, in_file, begins, notes)


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
            try:
                image = _to_rgb(frame, extent)
            except CorruptEpisode as error:
                raise CorruptEpisode(f"{where}: frame {index} of {error}", error.kind) from None
            yield image


def frames_listed(path: Path, where: str) -> int:
    """Frames of a video by its container, none of them read; 0 where it does not say."""
    with _opened(path, where) as (_, stream):
        return stream.frames


def _decoded_from(container: av.container.InputContainer, stream: av.VideoStream, pts: int) -> Iterator[av.VideoFrame]:
    """Decode forwards from a key frame that is shown at or before `pts`. A seek goes by decoding time, so it may find a
    key frame that is shown later (reordered frames, open groups of images): then step back further and further."""
    if stream.codec_context.pix_fmt == "pal8":  # the palette comes with the first packet only
        return container.decode(stream)
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
        with av.open(str(regular(path)), options=_ALLOWED, **_LENIENT) as container:
            # A stream whose codec is not known has no context.
            moving = [s for s in container.streams.video if s.codec_context and not s.disposition & _STILLS]
            if not moving:
                raise CorruptEpisode(
                    f"{where}: {path.name} holds no video stream that can be decoded", "unreadable-file"
                )
            yield container, max(moving, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))
    except FileNotFoundError:
        raise CorruptEpisode(f"{where}: {path} is missing", "missing-file") from None
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, av.FFmpegError) and error.errno == errno.EINVAL:  # also for a format that is not allowed
            reason = "it is damaged, or no recording"
        raise CorruptEpisode(f"{where}: {unreadable(path, 'video', reason)}", "unreadable-file") from None


# --- pixels ---


def is_depth_video(path: Path, where: str) -> bool:
    """Whether a video has one channel of more than 8 bits; `CorruptEpisode` when it cannot be read."""
    with _opened(path, where) as (_, stream):
        form = stream.codec_context.format
        return form is not None and _is_deep(form)


def _is_deep(form: av.VideoFormat) -> bool:
    return len(form.components) < 3 and form.components[0].bits > 8 and not form.is_rgb


def _decoded_alone(stream: av.VideoStream, packet: av.Packet) -> av.VideoFrame | None:
    """The frame of a packet that can be decoded without others, as a key frame can; None where it cannot."""
    context = stream.codec_context
    if not context.is_open:
        context.thread_count = 1  # starting threads takes longer than the frame
    try:
        frames = context.decode(packet) or context.decode(None)
        context.flush_buffers()
    except av.FFmpegError:  # what is damaged shows when the episode is decoded
        return None
    return frames[0] if frames else None


def _notes(stream: av.VideoStream, name: str) -> tuple[Note, ...]:
    """What to know about the pixels of a stream."""
    transfer = _HDR.get(stream.codec_context.color_trc)
    return (Note("hdr", f"{name} is HDR ({transfer}): read without tone mapping, pale"),) if transfer else ()


def _to_rgb(frame: av.VideoFrame, extent: VideoExtent) -> np.ndarray:
    """uint8 [H, W, 3] of a decoded frame; `CorruptEpisode`, which begins with the file's name, for one of another size
    or orientation than the first."""
    what = extent.path.name
    turn = _turn(frame, what)
    if turn not in (None, extent.turn):
        raise CorruptEpisode(f"{what} is turned another way than the first")
    if _conversion(frame, what) and not frame.format.has_palette:
        full = frame.color_range == _FULL or frame.format.name in _PLAIN_FULL
        frame = frame.reformat(
            format="rgb24",
            interpolation="BICUBIC",
            src_colorspace=frame.colorspace,
            dst_colorspace=1 if frame.colorspace == 5 else 5,  # RGB has none, but PyAV heeds only one that differs
            src_color_range=_FULL if full else 1,
            dst_color_range=_FULL,
        )
    image: np.ndarray = frame.to_ndarray(format="rgb24")
    if extent.turn:
        image = image.transpose(1, 0, 2) if "t" in extent.turn else image
        image = np.ascontiguousarray(image[:: -1 if "r" in extent.turn else 1, :: -1 if "c" in extent.turn else 1])
    if image.shape[:2] != (extent.height, extent.width):
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise CorruptEpisode(f"{what} is {size}, the first is {extent.width}x{extent.height}")
    return image


def _turn(frame: av.VideoFrame, what: str) -> str | None:
    """How a frame is to be turned (as `VideoExtent.turn`) by its display matrix; None without one."""
    matrix = frame.side_data.get("DISPLAYMATRIX") if len(frame.side_data) else None
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # type: ignore[call-overload]
    # (x, y) is shown at (a·x + c·y, b·x + d·y)
    across = abs(b) + abs(c) > abs(a) + abs(d)
    straight, slanted = ((b, c), (a, d)) if across else ((a, d), (b, c))
    if max(map(abs, slanted)) > _SLANT * min(map(abs, straight)):
        degrees = math.degrees(math.atan2(b, a))
        raise CorruptEpisode(f"{what} is shown turned by {degrees:.0f} degrees; only quarter turns and flips are read")
    rows, columns = straight if across else straight[::-1]
    return "t" * across + "r" * (rows < 0) + "c" * (columns < 0)


def _conversion(frame: av.VideoFrame, what: str) -> str:
    """How a frame becomes RGB, "" as it always did; `CorruptEpisode` for what has no colors."""
    form, matrix = frame.format, frame.colorspace
    full = frame.color_range == _FULL
    if matrix in _UNTAGGED and (form.name in _PLAIN_FULL or (form.name in _PLAIN and not full)):
        return ""
    if form.is_rgb:
        return ""
    if form.has_palette:
        return "palette;"
    if len(form.components) < 3:
        if _is_deep(form):
            raise CorruptEpisode(
                f"{what} is gray of {form.components[0].bits} bits, a depth map; leave that camera out with `views`"
            )
        return ""
    if matrix not in _MATRICES:
        raise CorruptEpisode(
            f"{what} has colors of matrix {matrix} (H.273), which cannot be read; encode it again, e.g. as BT.709"
        )
    return f"{form.name} matrix {matrix} {'full' if full else 'limited'};"
