"""`dvla data stats` over large tables: seconds, rows/s, and memory beyond that of opening the dataset.

    python benchmarks/table_statistics.py                       # 100 thousand and 1 million rows, three times each
    python benchmarks/table_statistics.py --rows 10000000 --repeats 1

Writes LeRobot v3.0 tables of 26-d action and 26-d state (float32), 300 rows per episode, in lerobot's row groups of one
episode each and in one row group. Statistics never open a video, so none is written. Every measurement is a process of
its own, which first measures 3000 rows to load libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import spread

WIDTH, EPISODE, HZ, CAMERA = 26, 300, 30, "observation.images.cam_high"


def write(root: Path, rows: int, one_group: bool) -> None:
    """`rows // EPISODE` episodes of random walks in one parquet file."""
    count = rows // EPISODE
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    vector = {"dtype": "float32", "shape": [WIDTH], "names": None}
    features = {
        "action": vector,
        "observation.state": vector,
        CAMERA: {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]},
    }
    (root / "meta/info.json").write_text(
        json.dumps(
            {
                "codebase_version": "v3.0",
                "robot_type": "Unitree_G1_Inspire",
                "fps": HZ,
                "features": features,
                "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            }
        )
    )
    pq.write_table(pa.table({"task_index": [0], "__index_level_0__": ["pick"]}), root / "meta/tasks.parquet")
    zeros = [0] * count
    pq.write_table(
        pa.table(
            {
                "episode_index": range(count),
                "length": [EPISODE] * count,
                "tasks": [["pick"]] * count,
                "data/chunk_index": zeros,
                "data/file_index": zeros,
                f"videos/{CAMERA}/chunk_index": zeros,
                f"videos/{CAMERA}/file_index": zeros,
                f"videos/{CAMERA}/from_timestamp": [0.0] * count,
            }
        ),
        root / "meta/episodes/chunk-000/file-000.parquet",
    )
    rng, frames, parts = np.random.default_rng(0), np.arange(EPISODE), []
    with pq.ParquetWriter(root / "data/chunk-000/file-000.parquet", _episode(rng, frames, 0).schema) as writer:
        for number in range(count):
            parts.append(_episode(rng, frames, number))
            if not one_group:
                writer.write_table(parts.pop())
        if one_group:
            writer.write_table(pa.concat_tables(parts), row_group_size=rows)


def _episode(rng: np.random.Generator, frames: np.ndarray, number: int) -> pa.Table:
    walk = np.cumsum(rng.normal(0, 0.02, (2, EPISODE, WIDTH)), axis=1).astype(np.float32)
    vectors = [pa.FixedSizeListArray.from_arrays(w.ravel(), WIDTH) for w in walk]
    return pa.table(
        {
            "action": vectors[0],
            "observation.state": vectors[1],
            "timestamp": (frames / HZ).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(EPISODE, number),
            "index": frames + number * EPISODE,
            "task_index": np.zeros(EPISODE, np.int64),
        }
    )


def measure(root: Path, warm: Path) -> None:
    """Print seconds, rows, MiB after opening and MiB at the peak, of this process."""
    from dvla.cache.readers import open_source
    from dvla.stages.data.statistics import measure as statistics_of

    statistics_of(open_source(warm), lambda *_: None)
    source = open_source(root)
    before = _memory("VmRSS")
    begin = time.perf_counter()
    report = statistics_of(source, lambda *_: None)
    seconds = time.perf_counter() - begin
    peak = _memory("VmHWM")  # not getrusage, whose peak includes the parent's
    print(json.dumps([seconds, report["datasets"][0]["rows"], before, peak]))


def _memory(field: str) -> float:
    """A field of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}")
    print(
        "| rows | row groups | table | seconds, median (min – max) | rows/s | memory after opening | peak beyond that |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        write(warm, 10 * EPISODE, False)
        for rows in args.rows:
            for groups in ("one per episode", "one"):
                root = Path(folder) / f"{rows}-{groups}"
                write(root, rows, groups == "one")
                size = (root / "data/chunk-000/file-000.parquet").stat().st_size / 2**20
                command = [sys.executable, __file__, "--measure", root, warm]
                runs = [
                    json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                    for _ in range(args.repeats)
                ]
                seconds, found, before, peak = zip(*runs)
                rate, beyond = found[0] / statistics.median(seconds), max(p - b for p, b in zip(peak, before))
                cells = (f"{found[0]:,}", groups, f"{size:.0f} MiB", spread(seconds, ".1f"), f"{rate:,.0f}")
                print(f"| {' | '.join(cells)} | {max(before):.0f} MiB | {beyond:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
