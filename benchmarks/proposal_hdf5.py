"""The research plan's way of caching features against `dvla cache build`, on the same frames with the same model.

    python benchmarks/proposal_hdf5.py

The plan's: one HDF5 file, one group per sample, gzip, one image per encoder call; frames are fetched one by one with
`LeRobotDataset[i]`. A second row combines it with dvla's reader, so that only storing and batching differ. Then random
samples are read back from both stores. The tower returns features of Qwen3-VL-2B's size (196 × 2048 from 448 px) but is
much faster, like one on a GPU, so that the rest of the work shows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cache_build as common
import h5py
import numpy as np
import torch
from measuring import machine, ratios, spread, tower, turns
from read_episodes import CAMERAS

from dvla.cache.readers import open_source
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.encoder import VisionLanguageEncoder
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.stages.caching.build import build

READ = 200  # random samples
Samples = Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray]]  # (image uint8 [H,W,3] per view, state, action)


def by_lerobot(source: Path) -> Samples:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("dvla/bench", root=source, video_backend="pyav")
    for i in range(len(dataset)):
        item = dataset[i]
        images = [
            (item[f"observation.images.{c}"].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0) for c in CAMERAS
        ]
        yield [np.ascontiguousarray(i) for i in images], item["observation.state"].numpy(), item["action"].numpy()


def by_dvla(source: Path) -> Samples:
    opened = open_source(str(source), str(common.FIELDS))
    for number in opened.episode_ids:
        episode = opened.load(number)
        views = zip(*(view.frames() for view in episode.views))
        yield from ((list(images), *row) for images, *row in zip(views, episode.state, episode.action))


def proposal(samples: Samples, encoder: VisionLanguageEncoder, out: Path) -> int:
    """Write the plan's file; returns the number of samples."""
    count = 0
    with h5py.File(out, "w") as file, torch.inference_mode():
        for count, (images, state, action) in enumerate(samples, 1):
            hidden = torch.cat([encoder.encode_images(torch.from_numpy(i[None]))[0] for i in images])  # [V·K,D]
            group = file.create_group(f"sample_{count - 1}")
            group.create_dataset("hidden", data=hidden.cpu().half().numpy(), compression="gzip")
            group.create_dataset("state", data=state)
            group.create_dataset("action", data=action)
        file.flush()
        os.fsync(file.id.get_vfd_handle())
    return count


def read_hdf5(path: Path, rows: np.ndarray) -> float:
    began = time.perf_counter()
    with h5py.File(path) as file:
        for row in rows:
            file[f"sample_{row}"]["hidden"][()]
    return time.perf_counter() - began


def read_cache(path: Path, rows: np.ndarray) -> float:
    dataset = Cache.open(path).datasets[0]
    began = time.perf_counter()
    for row in rows:
        for view in dataset.views:
            dataset.feature(view, int(row))
    return time.perf_counter() - began


def compare(source: Path, vlm: Path, work: Path, repeats: int) -> None:
    encoder = load_encoder(EncoderSpec(str(vlm), resolution=448, dtype="float32"), "cpu")
    names = ("HDF5, LeRobotDataset[i]", "HDF5, dvla's reader", "dvla cache build")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sizes, files, frames = {}, {name: work / f"{i}.h5" for i, name in enumerate(names)}, 0
    next(by_lerobot(source))  # the clock starts when libraries are loaded
    for repeat, name in turns(names, repeats):
        began = time.perf_counter()
        if name == names[2]:
            shutil.rmtree(work / "cache", ignore_errors=True)
            sizes[name] = build(common.config(source, vlm, work / "cache")).bytes
        else:
            frames = proposal(by_lerobot(source) if name == names[0] else by_dvla(source), encoder, files[name])
            sizes[name] = files[name].stat().st_size
        seconds[name].append(time.perf_counter() - began)
        print(f"  repeat {repeat + 1}: {name} {seconds[name][-1]:.1f} s", flush=True)
    cached = Cache.open(work / "cache").datasets[0]
    with h5py.File(files[names[1]]) as file:  # the same numbers up to batching
        stored = np.concatenate([cached.feature(view, frames - 1) for view in cached.views]).astype(np.float32)
        error = (
            np.abs(file[f"sample_{frames - 1}"]["hidden"][()].astype(np.float32) - stored).max() / np.abs(stored).max()
        )
    rows = np.random.default_rng(0).integers(0, frames, READ)
    reading = {
        names[0]: [read_hdf5(files[names[0]], rows) for _ in range(3)],
        names[2]: [read_cache(work / "cache", rows) for _ in range(3)],
    }
    print(f"\n{frames} frames; features differ by {error:.1e} of the largest\n")
    print("| way | frames/s | × the plan's (median, min – max) | bytes per frame | random samples/s (in memory) |")
    print("|---|---|---|---|---|")
    for name in names:
        times = spread(ratios(seconds[names[0]], seconds[name]), ".2f")
        read = f"{READ / statistics.median(reading[name]):.0f}" if name in reading else ""
        rate, size = frames / statistics.median(seconds[name]), sizes[name] / frames / 1024
        print(f"| {name} | {rate:.1f} | {times} | {size:.0f} KiB | {read} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the recording and the model; default: a temporary one")
    parser.add_argument("--size", type=int, default=224, help="side of the recorded images in pixels")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--frames", type=int, default=60, help="frames per episode")
    parser.add_argument("--threads", type=int, default=1, help="threads of the encoder")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        if not (work / "quick").exists():
            make_tiny_qwen3vl(work / "quick", tower(1, 64, 2, 2048))
        common.write_fields()
        try:
            source = common.recording(work / f"rec{args.size}-{args.episodes}", args.size, args.episodes, args.frames)
            compare(source, work / "quick", Path(temporary), args.repeats)
        finally:
            common.FIELDS.unlink()


if __name__ == "__main__":
    main()
