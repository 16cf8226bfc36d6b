"""Reading for training: dvla's loader against the disk, zarr-python and WebDataset workers, safetensors and HDF5.

    python benchmarks/loader.py                     # 2 GiB into a temporary folder, about 3 minutes on 2 cores
    python benchmarks/loader.py --gib 8 --folder /mnt/nvme --repeats 7

Samples are single images of 196 × 2048 and 784 × 1024 float16 (784 KiB and 1.53 MiB). Every way yields batches of 32 as
one float16 tensor; dvla's batches also have text, actions, masks and everything else. All read in turn, for a given
time, and "×" is within the same repeat (median, min – max): against one thread that calls `preadv` on random records
into a ring of buffers, and against the fastest number of such threads. Warm: everything was read once before. Cold:
synced and dropped from the page cache before each pass (of all records, in windows of an eighth of them); a hypervisor
may still have it, so look first at what "dd" reaches. HDF5 holds fewer records, since gzip is slow to write. Last: the
time to open a cache of a million frames in 10,000 shards, and memory. Letters: K tokens, D width, B batch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measuring import machine, ratios, spread, turns

from dvla.cache.loader import read_ahead as ahead
from dvla.cache.loader.loader import Loader
from dvla.cache.store.cache import Cache
from dvla.cache.store.writer import CacheWriter
from dvla.stages.caching.transfer.webdataset import export

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support import sparse_cache as sparse  # noqa: E402

B, SIZES = 32, {"784 KiB": (196, 2048), "1.53 MiB": (784, 1024), "98 KiB": (49, 1024), "25 KiB": (25, 512)}
Way = Callable[[], Iterator[object]]  # yields batches, forever or once


class Data:
    """The same records in every store. `n` records of [K, D]."""

    def __init__(self, root: Path, k: int, d: int, nbytes: int) -> None:
        self.root, self.k, self.d, self.record = root, k, d, 2 * k * d
        per_shard = max(1, min(4096, (64 << 20) // self.record))
        self.shards = max(2, nbytes // (per_shard * self.record))
        self.plan = sparse.make_plan(self.shards, per_shard, k, d)
        self.n = self.shards * per_shard
        self.path = root / "cache"
        block = (
            np.random.default_rng(0)
            .standard_normal((max(64, (32 << 20) // self.record), k, d), np.float32)
            .astype(np.float16)
        )
        with CacheWriter.create_or_resume(self.path, {"encoder": {}}, self.plan) as writer:
            for task in writer.missing():
                rows = task.stop - task.start
                writer.write_shard(task, (block[: min(len(block), rows - at)] for at in range(0, rows, len(block))))
            writer.write_tables("sparse", sparse.tables(self.plan))
            writer.finish()
        self.cache = Cache.open(self.path)
        self.files = [self.cache.datasets[0].shard_path("front", i) for i in range(self.shards)]

    def at(self, row: int) -> tuple[int, int]:
        """(shard, byte) of a record."""
        shard, inner = divmod(row, self.plan.shard_frames)
        return shard, inner * self.record

    def others(self) -> None:
        """Write the stores of the other libraries."""
        import h5py
        from safetensors.numpy import save_file

        export(self.path, str(self.root / "tars"), shard_nbytes=64 << 20)
        features = self.cache.datasets[0]
        for i in range(self.shards):
            rows = np.arange(i * self.plan.shard_frames, (i + 1) * self.plan.shard_frames)
            save_file({"features": features.features("front", rows)}, self.root / f"{i}.safetensors")
        self.few = min(self.n, max(2 * B, (48 << 20) // self.record))
        with h5py.File(self.root / "gzip.h5", "w") as file:
            for row in range(self.few):
                file.create_dataset(f"sample_{row}", data=features.feature("front", row), compression="gzip")


# --- ways to read -----------------------------------------------------------------------------------------------------


def shuffled(n: int) -> Iterator[int]:
    rng = np.random.default_rng(1)
    while True:
        yield from rng.permutation(n).tolist()


def raw(data: Data, threads: int) -> Iterator[object]:
    """`preadv` into a ring of batch buffers, and nothing else. One batch waits while each thread reads another."""
    handles = [os.open(f, os.O_RDONLY) for f in data.files]
    # Torch's buffers are aligned; NumPy's are not, and half as fast.
    ring = [torch.zeros((B, data.k, data.d), dtype=torch.float16).numpy() for _ in range(threads + 2)]
    views = [[memoryview(r).cast("B") for r in batch] for batch in ring]
    order = shuffled(data.n)

    def read(slot: int, rows: list[int]) -> np.ndarray:
        for target, row in zip(views[slot], rows):
            shard, offset = data.at(row)
            os.preadv(handles[shard], [target], offset)
        return ring[slot]

    with ThreadPoolExecutor(threads) as pool:
        coming = [pool.submit(read, i % len(ring), list(itertools.islice(order, B))) for i in range(threads + 1)]
        for i in itertools.count(threads + 1):
            batch = coming.pop(0).result()
            coming.append(pool.submit(read, i % len(ring), list(itertools.islice(order, B))))
            yield batch


def dvla(data: Data, threads: int, order: str = "global") -> Iterator[object]:
    with Loader(data.cache, batch_size=B, threads=threads, order=order) as loader:
        yield from loader


def cache_dataset(data: Data, workers: int) -> Iterator[object]:
    samples = data.cache.dataset()
    while True:
        yield from torch.utils.data.DataLoader(samples, B, shuffle=True, num_workers=workers)


class ZarrRecords(torch.utils.data.Dataset):
    def __init__(self, data: Data) -> None:
        self.path, self.n, self.array = data.path, data.n, None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> torch.Tensor:
        if self.array is None:
            import zarr

            self.array = zarr.open_group(self.path, mode="r")["sparse/features/front"]
        return torch.from_numpy(np.asarray(self.array[row]))


def zarr_python(data: Data, workers: int) -> Iterator[object]:
    while True:
        yield from torch.utils.data.DataLoader(ZarrRecords(data), B, shuffle=True, num_workers=workers)


def web_dataset(data: Data, workers: int) -> Iterator[object]:
    import webdataset

    urls = sorted(str(p) for p in (data.root / "tars").glob("sparse-*.tar"))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(200)
        .decode()
        .to_tuple("features.front.npy", "action.npy")
    )
    while True:
        yield from webdataset.WebLoader(dataset.batched(B), batch_size=None, num_workers=workers)


def safetensors_mmap(data: Data) -> Iterator[object]:
    from safetensors import safe_open

    files = [safe_open(data.root / f"{i}.safetensors", "pt") for i in range(data.shards)]
    slices, order = [f.get_slice("features") for f in files], shuffled(data.n)
    while True:
        rows = [divmod(row, data.plan.shard_frames) for row in itertools.islice(order, B)]
        yield torch.cat([slices[shard][i : i + 1] for shard, i in rows])


def hdf5_gzip(data: Data) -> Iterator[object]:
    import h5py

    with h5py.File(data.root / "gzip.h5") as file:
        order = shuffled(data.few)
        while True:
            yield torch.stack([torch.from_numpy(file[f"sample_{row}"][()]) for row in itertools.islice(order, B)])


def timed(batches: Iterator[object], seconds: float, ahead: int) -> float:
    """Samples/s, after `ahead` unmeasured batches in which workers start and buffers are first used."""
    for _ in range(ahead):
        next(batches)
    began, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < seconds:
        batch = next(batches)
        done += B
        del batch
    batches.close()
    return done / taken


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rates: dict[str, list[float]], record: int, bases: dict[str, list[float]]) -> None:
    """Ratios to each of `bases` within the same repeat: median (min – max)."""
    print(f"\n| | samples/s | GB/s |{''.join(f' × {base} |' for base in bases)}\n|---|---|---|{'---|' * len(bases)}")
    for name, values in rates.items():
        rate = statistics.median(values)
        times = "".join(f" {spread(ratios(values, base), '.2f')} |" for base in bases.values())
        print(f"| {name} | {rate:.0f} | {rate * record / 1e9:.2f} |{times}")


def warm(data: Data, threads: list[int], repeats: int, seconds: float, others: bool) -> None:
    base = "preadv, 1 thread"
    ways: dict[str, Way] = {base: lambda: raw(data, 1)}
    ways |= {f"preadv, {t} threads": lambda t=t: raw(data, t) for t in threads if t > 1}
    ways |= {f"dvla, {t} thread{'s' * (t > 1)}": lambda t=t: dvla(data, t) for t in threads}
    ways |= {
        "dvla, block, 2 threads": lambda: dvla(data, 2, "block"),
        "dvla, sequential, 2 threads": lambda: dvla(data, 2, "sequential"),
    }
    ways |= {f"Cache.dataset + DataLoader, {w} workers": lambda w=w: cache_dataset(data, w) for w in (0, 2)}
    if others:
        ways |= {
            f"{name}, {w} workers": lambda way=way, w=w: way(data, w)
            for name, way in (("zarr-python + DataLoader", zarr_python), ("WebDataset", web_dataset))
            for w in (0, 2)
        }
        ways |= {"safetensors, mmap": lambda: safetensors_mmap(data), "HDF5, gzip": lambda: hdf5_gzip(data)}
    for path in sorted(p for p in data.root.rglob("*") if p.is_file()):
        path.read_bytes()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in turns(ways, repeats):
        first = 2 * max(threads) + 4 if name.startswith(("preadv", "dvla")) else 2
        rates[name].append(timed(ways[name](), seconds, first))
    fastest = [max(values) for values in zip(*(rates[name] for name in ways if name.startswith("preadv")))]
    table(rates, data.record, {base: rates[base], "the fastest preadv": fastest})


def drop(data: Data) -> None:
    for path in data.files:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def dd(data: Data) -> int:
    """Every shard from its beginning, a MiB at a time, with the kernel's own read-ahead."""
    buffer, total = bytearray(1 << 20), 0
    for path in data.files:
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                total += got
    return total // data.record


def one_pass(data: Data, threads: int, order: str) -> int:
    count = data.n // B
    with Loader(data.cache, batch_size=B, threads=threads, prefetch=threads, order=order) as loader:
        for _ in range(count):
            next(loader)
    return count * B


def cold(data: Data, threads: int, repeats: int) -> None:
    ways: dict[str, Callable[[], int]] = {"dd": lambda: dd(data)}
    ways |= {
        f"dvla, {order}, {threads} threads": lambda order=order: one_pass(data, threads, order)
        for order in ("block", "sequential", "global")
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in turns(ways, repeats):
        drop(data)
        began = time.perf_counter()
        rates[name].append(ways[name]() / (time.perf_counter() - began))
    table(rates, data.record, {"dd": rates["dd"]})


def memory() -> str:
    """Resident memory, and how much of it is not pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    rss, anonymous = (int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon"))
    return f"{rss:.0f} MiB resident, {anonymous:.0f} of it not pages of files"


def opening(root: Path, repeats: int) -> None:
    columns = ("frames", "shards", "opening, s", "loader and its first batch of 8, s", "memory after 200 batches")
    print(f"\n| {' | '.join(columns)} | open files |\n|---|---|---|---|---|---|")
    for shards in (100, 10_000):
        plan = sparse.make_plan(shards, 100, 196, 2048)
        sparse.build(root / f"sparse{shards}", plan, marked=False)
        opened, first = [], []
        for _ in range(repeats):
            began = time.perf_counter()
            cache = Cache.open(root / f"sparse{shards}")
            opened.append(time.perf_counter() - began)
            loader = Loader(cache, batch_size=8, threads=2)
            next(loader)
            first.append(time.perf_counter() - began - opened[-1])
            for _ in range(200):
                next(loader)
            resident, files = memory(), len(os.listdir("/proc/self/fd"))
            loader.close()
        times = f"{spread(opened, '.3f')} | {spread(first, '.3f')}"
        print(f"| {plan.datasets[0].frames} | {shards} | {times} | {resident} | {files} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--gib", type=float, default=2.0, help="size of all stores of one record size together")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="reading time of each way in a repeat")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["784 KiB", "1.53 MiB"])
    parser.add_argument("--only", choices=["warm", "cold", "open"], help="run one part")
    parser.add_argument("--without-others", action="store_true", help="leave out the other libraries")
    args = parser.parse_args()
    print(machine())
    for size in args.sizes if args.only != "open" else ():
        root = Path(tempfile.mkdtemp(dir=args.folder or tempfile.gettempdir()))
        try:
            if args.only != "cold":
                data = Data(root / "warm", *SIZES[size], int(args.gib * 2**30 / 3))
                print(f"\n## Records of {size}, warm: {data.n} in {data.shards} shards")
                if not args.without_others:
                    data.others()
                warm(data, args.threads, args.repeats, args.seconds, not args.without_others)
                shutil.rmtree(data.root)
            if args.only != "warm":
                data = Data(root / "cold", *SIZES[size], int(args.gib * 2**30))
                print(f"\n## Records of {size}, cold: {data.n} in {data.shards} shards")
                with mock.patch.object(ahead, "WINDOW_NBYTES", data.n * data.record // 8):  # many, as in a large cache
                    cold(data, max(args.threads[-1] // 2, 1), args.repeats)
        finally:
            shutil.rmtree(root)
    if args.only in (None, "open"):
        root = Path(tempfile.mkdtemp(dir=args.folder or tempfile.gettempdir()))
        try:
            opening(root, args.repeats)
        finally:
            shutil.rmtree(root)
    print(f"\nload at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
