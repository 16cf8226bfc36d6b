"""Reading every frame, state and action of every episode: lerobot's `LeRobotDataset[i]` against dvla's reader.

    python benchmarks/read_episodes.py              # records 20 episodes × 100 frames × 2 cameras of 224 px, then reads
    python benchmarks/read_episodes.py --size 480 --keep data/bench480
    python benchmarks/read_episodes.py --dataset data/bench480

Both read the same files in the same process, in turn, and must return the same pixels. A third row reads only the
images with PyAV, file by file, front to back: the cost of decoding alone.
"""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
from measuring import machine, ratios, spread, turns

from dvla.cache.actions.action_map import FieldSpec
from dvla.cache.readers import Source, open_source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.lerobot.metadata import Metadata
from dvla.cache.readers.video import DECODER_THREADS
from dvla.common.mp4 import quiet_libav

FPS = 20
CAMERAS = ("front", "wrist")
SAMPLE = 97  # every so many frames, one is compared pixel by pixel


def record(root: Path, size: int, episodes: int, frames: int, codec: str, noise: float = 3.0) -> None:
    """With lerobot's own writer: a moving texture with a little noise, two cameras, 7-d state and action."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    encoding: dict[str, object] = {"vcodec": codec}
    if "vcodec" not in inspect.signature(LeRobotDataset.create).parameters:  # from 0.6 on
        from lerobot.configs.video import RGBEncoderConfig

        encoding = {"rgb_encoder": RGBEncoderConfig(vcodec=codec)}
    vector = {"dtype": "float32", "shape": (7,), "names": [f"joint_{i}" for i in range(7)]}
    features = {"observation.state": vector, "action": vector}
    features |= {
        f"observation.images.{c}": {
            "dtype": "video",
            "shape": (size, size, 3),
            "names": ["height", "width", "channels"],
        }
        for c in CAMERAS
    }
    dataset = LeRobotDataset.create(
        "dvla/bench", fps=FPS, features=features, root=root, robot_type="bench", image_writer_threads=2, **encoding
    )
    rng = np.random.default_rng(0)
    coarse = rng.uniform(40, 215, (len(CAMERAS), 17, 17, 3))
    grid = np.linspace(0, 15.99, 2 * size)
    low, part = grid.astype(int), (grid % 1)[:, None, None]
    textures = []
    for c in coarse:  # bilinear, twice as wide as an image
        rows = c[low] * (1 - part) + c[low + 1] * part
        rows = rows.transpose(1, 0, 2)
        textures.append((rows[low] * (1 - part) + rows[low + 1] * part).transpose(1, 0, 2))
    for episode in range(episodes):
        for frame in range(frames):
            at = [(7 * episode + 2 * frame) % size, (13 * episode + frame) % size]
            images = {
                f"observation.images.{name}": np.clip(
                    t[at[0] : at[0] + size, at[1] : at[1] + size] + rng.normal(0, noise, (size, size, 1)), 0, 255
                ).astype(np.uint8)
                for name, t in zip(CAMERAS, textures)
            }
            vectors = {k: rng.uniform(-1, 1, 7).astype(np.float32) for k in ("observation.state", "action")}
            dataset.add_frame({**vectors, **images, "task": "move"})
        dataset.save_episode()
        print(f"\rrecording: episode {episode + 1} of {episodes}", end="", flush=True)
    dataset.finalize()
    print()


def checksum(image: np.ndarray, state: np.ndarray, action: np.ndarray) -> int:
    """crc32 of uint8 [H, W, 3], float32 [d], float32 [d]."""
    crc = 0
    for part in (image, state, action):
        crc = zlib.crc32(np.ascontiguousarray(part).tobytes(), crc)
    return crc


def read_lerobot(root: Path) -> tuple[float, dict[tuple, int]]:
    """(seconds, checksums of the sample) of `LeRobotDataset[i]` for every i."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset, sums = LeRobotDataset("dvla/bench", root=root, video_backend="pyav"), {}
    dataset[0]  # the clock starts when libraries are loaded
    begin = time.perf_counter()
    for i in range(len(dataset)):
        item = dataset[i]
        if i % SAMPLE == 0:
            for key in dataset.meta.video_keys:
                image = (item[key].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
                vectors = item["observation.state"].numpy(), item["action"].numpy()
                sums[i, key.rsplit(".", 1)[-1]] = checksum(image, *vectors)
    return time.perf_counter() - begin, sums


def read_dvla(root: Path, config: DatasetConfig) -> tuple[float, dict[tuple, int]]:
    """The same through `Source.load` and its views."""
    source, sums, first = open_source(root, config), {}, 0
    source.table(source.episode_ids[0])
    begin = time.perf_counter()
    for number in source.episode_ids:
        episode = source.load(number)
        for view in episode.views:
            for t, image in enumerate(view.frames()):
                if (first + t) % SAMPLE == 0:
                    sums[first + t, view.name] = checksum(image, episode.state[t], episode.action[t])
        first += episode.length
    return time.perf_counter() - begin, sums


def read_pixels(root: Path) -> tuple[float, dict[tuple, int]]:
    """Every image of every file to RGB with PyAV alone."""
    quiet_libav()
    begin = time.perf_counter()
    for path in sorted(root.glob("videos/**/*.mp4")):
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            container.streams.video[0].codec_context.thread_count = DECODER_THREADS
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")
    return time.perf_counter() - begin, {}


def plain_config(root: Path) -> DatasetConfig:
    """A config that maps no field: this measures reading, not mapping."""
    features = Metadata(str(root)).features
    widths = [math.prod(features[key]["shape"]) for key in ("action", "observation.state")]
    return DatasetConfig("bench", (), "gripper_joint", *((FieldSpec(drop=width),) for width in widths))


def describe_files(source: Source) -> str:
    files = sorted(source.path.glob("videos/**/*.mp4"))
    with av.open(str(files[0])) as container:
        stream = container.streams.video[0]
        keys = sum(p.is_keyframe for p in container.demux(video=0) if p.pts is not None)
        return (
            f"{stream.codec_context.name} {stream.width}×{stream.height}, {len(files)} files, a keyframe every "
            f"{stream.frames / max(keys, 1):.1f} frames, {sum(f.stat().st_size for f in files) / 2**20:.1f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="a LeRobot v3.0 dataset to read instead of recording one")
    parser.add_argument("--keep", type=Path, help="folder to record into; default: a temporary one")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--frames", type=int, default=100, help="frames per episode")
    parser.add_argument("--codec", default="h264", help="h264, hevc or libsvtav1")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with ExitStack() as stack:
        root = args.dataset or args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "dataset"
        if args.dataset is None:
            record(root, args.size, args.episodes, args.frames, args.codec)
        compare(root, open_source(root, plain_config(root)), args.repeats)


def compare(root: Path, source: Source, repeats: int) -> None:
    episodes, frames = len(source.episode_ids), sum(map(source.length_of, source.episode_ids))
    images = frames * len(source.view_names)
    print(f"{episodes} episodes, {frames} frames, {images} images; {describe_files(source)}; {machine()}")
    readers: dict[str, Callable[[], tuple[float, dict]]] = {
        "LeRobotDataset[i]": lambda: read_lerobot(root),
        "dvla": lambda: read_dvla(root, source.config),
        "PyAV, images only": lambda: read_pixels(root),
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    sums: dict[str, dict] = {}
    for repeat, name in turns(readers, repeats):
        taken, sums[name] = readers[name]()
        seconds[name].append(taken)
        print(f"  repeat {repeat + 1}: {name} {taken:.2f} s", flush=True)
        if {"dvla", "LeRobotDataset[i]"} <= sums.keys():
            assert sums["dvla"] and sums["dvla"] == sums["LeRobotDataset[i]"], "pixels, states or actions differ"
    print(f"{len(sums['dvla'])} images with their states and actions compared: equal\n")
    print("| reader | episodes/s | images/s | × LeRobotDataset[i] (median, min – max of the repeats) |")
    print("|---|---|---|---|")
    for name, taken in seconds.items():
        median, times = statistics.median(taken), spread(ratios(seconds["LeRobotDataset[i]"], taken), ".1f")
        print(f"| {name} | {episodes / median:.2f} | {images / median:.0f} | {times} |")


if __name__ == "__main__":
    main()
