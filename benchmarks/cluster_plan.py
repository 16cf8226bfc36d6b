"""The cost model of `dvla cache plan --cluster` against real builds: 1 to 8 workers, two corpus sizes, two shard sizes.

    python benchmarks/cluster_plan.py

Three builds with one worker calibrate the model: two sizes for the seconds until a worker encodes and per image, and
one with small shards for the overhead per shard. Every other build is predicted from them, then run. Where workers
share processors, the model gets the number that can work at a time (`--devices`, default: the cores). The tower is
small with random weights, one thread per worker.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import tower
from read_episodes import record

from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.stages.caching.planning.cluster import Pool, Work, stage_one

FIELDS = "name: bench\nmatch: []\nembodiment: gripper_joint\naction:\n- {drop: 7}\nstate:\n- {drop: 7}\n"
VIEWS = 2


def built(folder: Path, source: Path, workers: int, shard_frames: int) -> float:
    """Seconds of one `dvla cache build` in processes of its own, from the command's start to its end."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "cache"
    command = [sys.executable, "-m", "dvla.cli", "cache", "build", str(source), "--out", str(out), "--device", "cpu"]
    command += ["--vlm", "tiny_qwen3vl", "--vlm-path", str(folder / "vlm"), "--resolution", "224"]
    command += ["--dataset-config", str(folder / "fields.yaml")]
    command += ["--shard-frames", str(shard_frames), "--workers", str(workers)]
    began = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--frames", type=int, default=96, help="frames of the smaller corpus; the larger has three times as many"
    )
    parser.add_argument("--shard-frames", type=int, default=24, help="frames per shard; small shards have a quarter")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="1 is always run, for calibration")
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="workers that can encode at a time")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_tiny_qwen3vl(folder / "vlm", tower())
        (folder / "fields.yaml").write_text(FIELDS)
        sizes = (args.frames, 3 * args.frames)
        sources = {n: folder / f"data-{n}" for n in sizes}
        for n, source in sources.items():
            record(source, 224, n // args.frames, args.frames, "h264")

        def seconds(n: int, workers: int, shard_frames: int) -> float:
            return statistics.median(built(folder, sources[n], workers, shard_frames) for _ in range(args.repeats))

        small = max(1, args.shard_frames // 4)
        cases = ((sizes[0], args.shard_frames), (sizes[1], args.shard_frames), (sizes[1], small))
        first, second, cut = (seconds(n, 1, shard_frames) for n, shard_frames in cases)
        shards = {s: VIEWS * -(-sizes[1] // s) for s in (args.shard_frames, small)}
        overhead = max(0.0, (cut - second) / (shards[small] - shards[args.shard_frames]))
        each = max(0.0, (second - first) / (VIEWS * (sizes[1] - sizes[0])) - overhead / args.shard_frames)
        start = max(0.0, first - VIEWS * sizes[0] * each - overhead * VIEWS * -(-sizes[0] // args.shard_frames))
        print(
            f"three builds with one worker ({first:.1f}, {second:.1f}, {cut:.1f} s): {start:.1f} s until it encodes, "
            f"{1 / each:.1f} images/s, {overhead:.3f} s per shard; {args.devices} workers at a time\n"
        )
        print(
            "| frames | frames per shard | workers | predicted | measured | predicted / measured |\n" + 6 * "|---" + "|"
        )
        for n, shard_frames in cases:
            for workers in sorted({*args.workers} - {1}):  # the model was fitted to one worker
                work = Work(n, VIEWS, 0.0, 0.0, 0.0, each, 0.0, 0.0, shard_frames)
                predicted = stage_one(work, Pool(workers, args.devices, 1.0, start, overhead)).seconds
                took = seconds(n, workers, shard_frames)
                cells = (n, shard_frames, workers, f"{predicted:.1f} s", f"{took:.1f} s", f"{predicted / took:.2f}")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
