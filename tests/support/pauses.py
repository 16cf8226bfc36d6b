"""Recordings of lerobot with pauses, and with marks of success."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from support.lerobot_samples import LENGTHS, rewrite, the_file


def with_pause(root: Path) -> None:
    """Of episodes 1 and 2, frames 0 to 11 are one pose: at 20 Hz, six tenths of a second."""

    def still(table: pa.Table) -> pa.Table:
        numbers, frames = (np.array(table[c].to_pylist()) for c in ("episode_index", "frame_index"))
        for name in ("action", "observation.state"):
            values = np.array(table[name].to_pylist(), np.float32)
            for number in (1, 2):
                pose = 0 if name == "action" else values[(numbers == number) & (frames == 0)]  # speeds are 0
                values[(numbers == number) & (frames < 12)] = pose
            values = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 4)
            table = table.set_column(table.column_names.index(name), table.schema.field(name), values)
        return table

    rewrite(the_file(root, "data/*/*.parquet"), still)


KEPT = {"0": range(10), "1": range(7, 13), "2": range(7, 16)}  # a margin of five frames before the motion


def marked(*failed: int, column: str = "next.success") -> Callable[[Path], None]:
    """A column of success whose last row is set in all but the `failed` episodes."""

    def change(root: Path) -> None:
        def add(table: pa.Table) -> pa.Table:
            numbers, frames = (np.array(table[c].to_pylist()) for c in ("episode_index", "frame_index"))
            last = frames == np.array(LENGTHS)[numbers] - 1
            return table.append_column(column, pa.array(last & ~np.isin(numbers, failed)))

        rewrite(the_file(root, "data/*/*.parquet"), add)
        info = json.loads((root / "meta/info.json").read_text())
        info["features"][column] = {"dtype": "bool", "shape": [1], "names": None}
        (root / "meta/info.json").write_text(json.dumps(info))

    return change
