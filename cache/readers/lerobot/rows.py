"""The rows of one episode put in order: `frame_index`, timestamps, row order and the listed length decide together.

Letters: T rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ....errors import Note
from ..episode import CorruptEpisode
from .parquet import plain_values, to_matrix

_UNITS = {1e3: "milliseconds", 1e6: "microseconds", 1e9: "nanoseconds"}
_SAME_UNIT = 0.2  # a median step this near to one row, relatively, is one


@dataclass(frozen=True)
class Clock:
    """What rows say about the images that belong to them, beyond ordinary times since the episode's start."""

    start: float | None = 0.0  # seconds at which the stored timestamps begin; None: there are none that can be used
    damaged: bool = False  # there are timestamps, but they do not increase
    frames: np.ndarray | None = None  # [T] frame_index; None: the table has none
    counted: bool = True  # False: the listed length is another, so only as many images can prove the rows


@dataclass(frozen=True)
class Listed:
    """What the metadata says about the number of an episode's rows."""

    length: int | None  # None: nothing
    span: int | None = None  # the same by v3.0's dataset_from_index and dataset_to_index
    has_video: bool = False  # whose frames can prove another number


@dataclass(frozen=True)
class OrderedRows:
    """The rows in the order of their frames."""

    table: pa.Table  # [T]
    order: np.ndarray | None  # [T] places in the given table; None: as given
    times: np.ndarray  # [T] seconds since the episode's start
    clock: Clock | None  # None: ordinary times, one row per frame
    notes: tuple[Note, ...]


def put_in_order(table: pa.Table, listed: Listed, fps: float, path: str, where: str) -> OrderedRows:
    """Order and time of an episode's rows; `CorruptEpisode`, beginning with `where`, when the witnesses contradict each
    other.

    Args:
        path: of the file, for messages.
    """
    count, length = table.num_rows, listed.length
    notes: list[Note] = []
    if not count:
        raise CorruptEpisode(f"{where}: {path} has 0 rows, meta/ lists {length}", "row-count")
    frames, order = _frames(table, notes, where), None
    if frames is not None and not (frames[1:] > frames[:-1]).all():
        order = np.argsort(frames, kind="stable")
        frames = frames[order]
        same = np.diff(frames) == 0
        if same.any():
            reason = f"frame_index {frames[same.argmax()]} is given to several of its {count} rows"
            raise CorruptEpisode(f"{where}: {reason}, meta/ lists {length}", "row-count")
    if frames is None:
        order = _order_by_time(table, where)
    times, start, damaged = _times(table, order, fps, notes, where)
    if order is not None:
        table = table.take(order)
        name = "timestamp" if frames is None else "frame_index"
        notes.append(Note("row-order", f"its rows are not in the order of {name}; they were sorted by it"))
    counted = length == count
    if not counted:
        is_complete = length is None if frames is None else frames[0] == 0 and frames[-1] == count - 1
        if not is_complete or not (length is None or listed.span == count or listed.has_video):
            raise CorruptEpisode(f"{where}: {path} has {count} rows, meta/ lists {length}", "row-count")
    steady = frames is None or (frames[0] == 0 and frames[-1] == count - 1)
    if times is None:
        times = np.arange(count) / fps if frames is None else (frames - frames[0]) / fps
    ordinary = steady and counted and start == 0 and frames is not None
    clock = None if ordinary else Clock(start, damaged, frames, counted or listed.span == count)
    return OrderedRows(table, order, times, clock, tuple(notes))


def _frames(table: pa.Table, notes: list[Note], where: str) -> np.ndarray | None:
    """`frame_index` [T] int64 as stored; None where there is none, or one number for all rows."""
    if _is_empty(table, "frame_index"):
        return None
    values = plain_values(table["frame_index"])
    if _is_text(values.type):
        notes.append(Note("row-order", "frame_index is a text; the rows were taken in file order"))
        return None
    if values.type == pa.int64() and not values.null_count:
        found = values.to_numpy()[:, None]
    else:
        found = to_matrix(table, "frame_index", where)
    if found.shape[1] != 1 or (found.dtype.kind == "f" and (found != np.floor(found)).any()):
        raise CorruptEpisode(f"{where}: frame_index is not one whole number per row")
    frames = found[:, 0].astype(np.int64)
    if len(frames) > 1 and (frames == frames[0]).all():
        notes.append(Note("row-order", f"frame_index is {frames[0]} in all rows; they were taken in file order"))
        return None
    return frames


def _order_by_time(table: pa.Table, where: str) -> np.ndarray | None:
    """Order of rows without a `frame_index`: that of their timestamps, where these are evenly spaced then; None for
    file order, which timestamps do not contradict. `CorruptEpisode` where they do."""
    if _is_empty(table, "timestamp"):
        return None
    times = _seconds(table, where)
    steps = np.diff(times[np.isfinite(times)])
    if not (steps < 0).any():
        return None
    order = np.argsort(times, kind="stable")
    steps = np.diff(times[order])
    usual = float(np.median(steps))
    if not (np.isfinite(times).all() and usual > 0 and (np.abs(steps - usual) < 0.5 * usual).all()):
        reason = "timestamps go back, and there is no frame_index that tells the order of its rows"
        raise CorruptEpisode(f"{where}: {reason}", "time-order")
    return order


def _times(
    table: pa.Table, order: np.ndarray | None, fps: float, notes: list[Note], where: str
) -> tuple[np.ndarray | None, float | None, bool]:
    """Seconds [T] since the episode's start, the second at which they begin by the file, and whether they are damaged.
    None, None where the file has none that can be used.

    A first time that is nearer to 0 than to the second one is left as it is.
    """
    if _is_empty(table, "timestamp"):
        return None, None, False
    stored = _seconds(table, where)
    times = stored if order is None else stored[order]
    if not ((times[1:] > times[:-1]).all() and np.isfinite(times[[0, -1]]).all()):
        backwards = ~((np.diff(times, prepend=-np.inf) > 0) & np.isfinite(times))
        if order is not None and (np.diff(stored) > 0).all():
            reason = "frame_index and timestamps order its rows differently"
            raise CorruptEpisode(f"{where}: {reason}", "time-order")
        frame = int(backwards.argmax())
        after = f" after {times[frame - 1]:.10g}" if frame else ""
        text = f"timestamps do not increase at frame {frame} ({times[frame]:.10g}{after}); rows are 1/{fps:g} s apart"
        notes.append(Note("time-order", text))
        return None, None, True
    step = float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / fps
    for unit, name in _UNITS.items() if step * fps > 100 else ():
        step = float(np.median(np.diff(times)))
        if abs(step * fps / unit - 1) < _SAME_UNIT:
            notes.append(Note("time-unit", f"timestamps count {name}: rows are {step:g} apart at {fps:g} per second"))
            times, step = times / unit, step / unit
    start = float(times[0])
    if abs(start) <= 0.25 * step and start >= 0:
        return times, 0.0, False
    notes.append(Note("time-start", f"timestamps begin at {start:.10g} s; times are since the episode's first row"))
    return times - start, start, False


def _is_empty(table: pa.Table, column: str) -> bool:
    return column not in table.column_names or table[column].null_count == table.num_rows


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _seconds(table: pa.Table, where: str) -> np.ndarray:
    """The column `timestamp` [T] float64, NaN where a row has none."""
    values = plain_values(table["timestamp"])
    if pa.types.is_timestamp(values.type) or pa.types.is_duration(values.type):
        scale = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[values.type.unit]
        whole = pc.cast(values, pa.int64())
        first = next((v.as_py() for v in whole if v.is_valid), 0)
        return pc.fill_null(pc.cast(pc.subtract(whole, first), pa.float64()), np.nan).to_numpy() / scale
    if _is_text(values.type):
        return np.full(table.num_rows, np.nan)
    if pa.types.is_floating(values.type):
        return values.to_numpy(zero_copy_only=False).astype(np.float64)
    return to_matrix(table, "timestamp", where)[:, 0]
