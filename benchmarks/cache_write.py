"""Writing features: the cache's shard writer against a plain synced write of the same bytes, and against zarr-python.

    python benchmarks/cache_write.py                          # 2 GiB of 784 KiB records into a temporary folder
    python benchmarks/cache_write.py --folder /dev/shm        # no disk: what checksums and checks alone cost

All write the same blocks, 64 records each, in turn: one file per shard, synced. "Plain" has no checksum, index, commit
record or rename. "Verified" also reads every byte of the finished cache back against its checksum. K tokens, D width.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from measuring import machine, ratios, spread, turns

from dvla.cache.store.plan import BuildPlan, DatasetPlan, EpisodePlan, ShardTask
from dvla.cache.store.writer import CacheWriter
from dvla.common.files import file_crc32c

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support import synthetic_cache as synthetic  # noqa: E402

K, D, BLOCK = 196, 2048, 64  # Qwen3-VL-2B at 448 px; records handed over at a time


def make_plan(shards: int, frames: int) -> BuildPlan:
    episodes = (EpisodePlan(0, shards * frames, "move", "hash"),)
    return BuildPlan((DatasetPlan("bench", ("front",), episodes),), K, D, frames)


def blocks(source: np.ndarray, task: ShardTask) -> Iterator[np.ndarray]:
    """float16 [≤BLOCK,K,D], from a ring of two."""
    for i, at in enumerate(range(task.start, task.stop, BLOCK)):
        yield source[i % 2][: min(BLOCK, task.stop - at)]


def plain(root: Path, plan: BuildPlan, source: np.ndarray) -> None:
    for task in plan.tasks():
        with open(root / f"{task.index}.bin", "wb", buffering=0) as file:
            for block in blocks(source, task):
                view = memoryview(block.reshape(-1).view(np.uint8))
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())


def cache(root: Path, plan: BuildPlan, source: np.ndarray) -> None:
    with CacheWriter.create_or_resume(root / "cache", synthetic.FINGERPRINT, plan) as writer:
        for task in writer.missing():
            writer.write_shard(task, blocks(source, task))


def verified(root: Path, plan: BuildPlan, source: np.ndarray) -> None:
    cache(root, plan, source)
    for shard in sorted(root.glob("cache/*/features/*/c/*/0/0")):
        file_crc32c(shard)


def zarr_python(root: Path, plan: BuildPlan, source: np.ndarray) -> None:
    import zarr

    rows = plan.datasets[0].frames
    array = zarr.create_array(
        root / "zarr",
        shape=(rows, K, D),
        dtype="float16",
        shards=(plan.shard_frames, K, D),
        chunks=(1, K, D),
        compressors=None,
    )
    for task in plan.tasks():  # a shard must be written in one piece
        array[task.start : task.stop] = np.concatenate(list(blocks(source, task)))
    os.sync()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--frames", type=int, default=334, help="records per shard (334: 256 MiB)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    plan = make_plan(args.shards, args.frames)
    source = np.random.default_rng(0).standard_normal((2, BLOCK, K, D), np.float32).astype(np.float16)
    nbytes = plan.datasets[0].frames * K * D * 2
    ways: dict[str, Callable[[Path, BuildPlan, np.ndarray], None]] = {
        "plain file write + fsync": plain,
        "CacheWriter": cache,
        "CacheWriter, verified": verified,
        "zarr-python, sharded": zarr_python,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    where = args.folder or Path(tempfile.gettempdir())
    print(f"{nbytes / 2**30:.2f} GiB in {args.shards} shards; {machine()}")
    for repeat, name in turns(ways, args.repeats):
        root = Path(tempfile.mkdtemp(dir=where))
        os.sync()
        try:
            began = time.perf_counter()
            ways[name](root, plan, source)
            seconds[name].append(time.perf_counter() - began)
        finally:
            shutil.rmtree(root)
        print(f"  repeat {repeat + 1}: {name} {seconds[name][-1]:.2f} s", flush=True)
    print("\n| writer | GB/s | × plain file write (median, min – max of the repeats) |\n|---|---|---|")
    for name, taken in seconds.items():
        times = spread(ratios(seconds["plain file write + fsync"], taken), ".2f")
        print(f"| {name} | {nbytes / statistics.median(taken) / 1e9:.2f} | {times} |")


if __name__ == "__main__":
    main()
