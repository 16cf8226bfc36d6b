"""The cost model of `dvla cache plan --cluster` against real builds: 1, 2, 4 and 8 workers, two corpus sizes, two shard sizes.

    python benchmarks/cluster_plan.py

Two builds with one worker, of two sizes, give the model its numbers (seconds until a worker encodes, seconds a picture, and from a third one with small
shards the overhead of a shard); every other build is foretold from them and then made. Where workers share processors the model is told how
many can work at a time (`--devices`, default: the cores). The tower is a small one with random weights, in one thread a worker.
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

from read_episodes import record

from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.stages.caching.planning.cluster import Pool, Work, stage_one

TOWER = TinySpec(vision_depth=6, vision_width=256, vision_heads=4, out_width=512, text_layers=1, vocabulary=512)
FIELDS = "name: bench\nmatch: []\nembodiment: gripper_joint\naction:\n- {drop: 7}\nstate:\n- {drop: 7}\n"
VIEWS = 2


def built(folder: Path, source: Path, workers: int, shard_frames: int) -> float:
    """Seconds of one `dvla cache build` in processes of its own, from the command's start to its end."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "cache"
    command = [
        sys.executable,
        "-m",
        "dvla.cli",
        "cache",
        "build",
        str(source),
        "--vlm",
        "tiny_qwen3vl",
        "--vlm-path",
        str(folder / "vlm"),
        "--resolution",
        "224",
        "--dataset-config",
        str(folder / "fields.yaml"),
        "--shard-frames",
        str(shard_frames),
        "--workers",
        str(workers),
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    began = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--frames", type=int, default=96, help="of the smaller corpus; the larger has three times as many"
    )
    parser.add_argument("--shard-frames", type=int, default=24, help="the small shards have a quarter")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="1: always made, for the model")
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="workers that can encode at a time")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_tiny_qwen3vl(folder / "vlm", TOWER)
        (folder / "fields.yaml").write_text(FIELDS)
        sizes = (args.frames, 3 * args.frames)
        sources = {n: folder / f"data-{n}" for n in sizes}
        for n, source in sources.items():
            record(source, 224, n // args.frames, args.frames, "h264")

        def seconds(n: int, workers: int, shard_frames: int) -> float:
            return statistics.median(built(folder, sources[n], workers, shard_frames) for _ in range(args.repeats))

        small = max(1, args.shard_frames // 4)
        first, second, cut = (
            seconds(sizes[0], 1, args.shard_frames),
            seconds(sizes[1], 1, args.shard_frames),
            seconds(sizes[1], 1, small),
        )
        shards = {s: VIEWS * -(-sizes[1] // s) for s in (args.shard_frames, small)}
        overhead = max(0.0, (cut - second) / (shards[small] - shards[args.shard_frames]))
        each = max(0.0, (second - first) / (VIEWS * (sizes[1] - sizes[0])) - overhead / args.shard_frames)
        start = max(0.0, first - VIEWS * sizes[0] * each - overhead * VIEWS * -(-sizes[0] // args.shard_frames))
        print(
            f"from three builds with one worker ({first:.1f}, {second:.1f}, {cut:.1f} s): {start:.1f} s until it encodes, {1 / each:.1f} pictures/s, "
            f"{overhead:.3f} s a shard; {args.devices} workers at a time\n"
        )
        print("| frames | frames a shard | workers | foretold | made | foretold / made |\n|---|---|---|---|---|---|")
        for n, shard_frames in ((sizes[0], args.shard_frames), (sizes[1], args.shard_frames), (sizes[1], small)):
            for workers in args.workers:
                if workers == 1:
                    continue  # the model was fitted to these
                work = Work(n, VIEWS, 0.0, 0.0, 0.0, each, 0.0, 0.0, shard_frames)
                told = stage_one(work, Pool(workers, args.devices, 1.0, start, overhead)).seconds
                made = seconds(n, workers, shard_frames)
                print(
                    f"| {n} | {shard_frames} | {workers} | {told:.1f} s | {made:.1f} s | {told / made:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
