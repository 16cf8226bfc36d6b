"""A tiny dataset of every format that can be read, and which of its files are metadata."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dvla.common.config import configs_dir
from support import dex_samples, hdf5_samples, lerobot_samples, rlbench_samples, rlds_samples


def _lerobot(kind: str, version: str | None = None) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        if version is None:
            lerobot_samples.record(root / "tiny", *lerobot_samples.KINDS[kind])
        else:
            recorded = lerobot_samples.record(root / "recorded", *lerobot_samples.KINDS[kind])
            lerobot_samples.convert_to_v2(recorded, root / "tiny", version)
            shutil.rmtree(recorded)
        return "tiny"

    return write


def _config(root: Path) -> str:
    """Images in parquet, which take no time, with a dataset config beside them."""
    name = _lerobot("image")(root)
    shutil.copy(configs_dir() / "datasets" / "metaworld.yaml", root / name / "dvla.yaml")
    return name


def _robomimic(root: Path) -> str:
    hdf5_samples.write_robomimic(root / "can.hdf5")
    return "can.hdf5"


def _episode_hdf5(root: Path) -> str:
    hdf5_samples.write_episode_folder(root / "folder")
    return "folder"


def _replay_buffer(zarr_format: int) -> Callable[[Path], str]:
    def write(root: Path) -> str:
        hdf5_samples.write_replay_buffer(root / "pusht.zarr", zarr_format=zarr_format)
        return "pusht.zarr"

    return write


def _rlds(root: Path) -> str:
    folder, _ = rlds_samples.write_rt1(root)
    return folder.relative_to(root).as_posix()


def _rlbench(root: Path) -> str:
    rlbench_samples.write_task(root / "rlbench", "close_jar", 3)
    return "rlbench/close_jar"


def _dexwild(root: Path) -> str:
    dex_samples.write_dexwild(root, (4, 3, 3), encoded=True)
    return "pour_data"


def _dexgraspnet(root: Path) -> str:
    dex_samples.write_dexgraspnet(root / "dexgraspnet", (0, 1), views=2, size=(96, 54), grasps=2)
    return "dexgraspnet"


@dataclass(frozen=True)
class Format:
    """How a format's sample is written, and which of its files say what the others mean."""

    write: Callable[[Path], str]  # into an empty folder; returns the dataset's path below it
    metadata: tuple[str, ...] = ()  # patterns of names relative to that folder
    checked: tuple[str, ...] = ()  # of files that carry a checksum of their content
    only: str = "*"  # pattern of the names of files that are damaged

    def vouched(self, name: str, sound: bool) -> bool:
        """Whether a change of this file must never give other rows or images without a word: it is metadata, or a
        checksum of its own tells. `sound`: it is a whole file of its kind, whose checksums are right."""
        patterns = self.metadata if sound else (*self.metadata, *self.checked)
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


FORMATS = {
    "lerobot-v21": Format(
        _lerobot("hevc", "v2.1"), ("*/meta/info.json", "*/meta/episodes.jsonl", "*/meta/tasks.jsonl")
    ),
    "lerobot-v30": Format(_lerobot("h264"), ("*/meta/info.json", "*/meta/*.parquet")),
    "lerobot-images": Format(_lerobot("image"), ("*/meta/info.json", "*/meta/*.parquet")),
    "robomimic": Format(_robomimic),
    "episode-hdf5": Format(_episode_hdf5),
    "rlds": Format(_rlds, ("*.json",), ("*.tfrecord*",)),
    "replay-v2": Format(_replay_buffer(2), ("*/.z*",)),
    "replay-v3": Format(_replay_buffer(3), ("*/zarr.json",)),
    "rlbench": Format(_rlbench, (), ("*.png",)),
    "dexwild": Format(_dexwild),
    "dexgraspnet": Format(_dexgraspnet, (), ("*.npz",)),
    "config": Format(_config, only="dvla.yaml"),
}
