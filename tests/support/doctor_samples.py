"""Healthy datasets in memory: smooth poses, a state that follows the action, moving images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dvla.cache.actions.action_map import FieldSpec
from dvla.cache.readers.base import Source
from dvla.cache.readers.config import DatasetConfig
from dvla.cache.readers.episode import CorruptEpisode, View
from dvla.cache.readers.tables import EpisodeTable, Rows
from dvla.errors import Kind

EPISODES, ROWS, HZ = 6, 60, 20.0
POSES = (
    FieldSpec(fields=("arm_joint_{0..2}_pos",)),
    FieldSpec(fields=("eef_pos_x", "eef_pos_y", "eef_pos_z")),
    FieldSpec(rotation="quat_xyzw"),
    FieldSpec(field="gripper_open"),
)  # joints 0-2, position 3-5, quaternion 6-9, gripper 10
DELTAS = (
    FieldSpec(fields=("eef_vel_x", "eef_vel_y", "eef_vel_z"), delta=True),
    FieldSpec(fields=("eef_angular_vel_roll", "eef_angular_vel_pitch", "eef_angular_vel_yaw"), delta=True),
    FieldSpec(field="gripper_open"),
)
PLACES = (
    FieldSpec(fields=("eef_pos_x", "eef_pos_y", "eef_pos_z")),
    FieldSpec(rotation="euler_xyz"),
    FieldSpec(field="gripper_open"),
)


@dataclasses.dataclass
class Record:
    """One episode in memory; a case of a test changes it."""

    action: np.ndarray
    state: np.ndarray
    times: np.ndarray
    text: str
    pictures: dict[str, np.ndarray]  # view → uint8 [T, H, W, 3]
    listed: int = ROWS
    fails: str = ""  # the reader refuses the rows with this message …
    undecodable: str = ""  # … or an image with this one
    kind: Kind = "unusable-episode"  # of either


class MemorySource(Source):
    """A dataset of `Record`s."""

    format = "rlds"

    def __init__(self, records: list[Record], config: DatasetConfig, fps: float = HZ) -> None:
        self.records = records
        super().__init__(
            Path(__file__),
            "memory",
            config,
            fps=fps,
            view_names=tuple(records[0].pictures),
            episode_ids=range(len(records)),
        )

    @classmethod
    def matches(cls, names: Any, root: Any) -> bool:
        return False

    @property
    def revision_hash(self) -> str:
        return "0" * 64

    def length_of(self, episode_id: int) -> int:
        return self.records[episode_id].listed

    def _rows(self, episode_id: int, columns: Any, where: str) -> Rows:
        record = self.records[episode_id]
        if record.fails:
            raise CorruptEpisode(f"{where}: {record.fails}", record.kind)
        return Rows({"action": record.action, "observation.state": record.state}, record.text, record.times)

    def _files(self, episode_id: int, view: str, where: str) -> list[Path]:
        return []

    def _views(self, episode_id: int, names: Any, table: EpisodeTable, where: str) -> list[View]:
        record = self.records[episode_id]

        def opener(pictures: np.ndarray) -> Callable[[int, int], Any]:
            def frames(start: int, stop: int) -> Any:
                for picture in pictures[start:stop]:
                    if record.undecodable:
                        raise CorruptEpisode(f"{where}: {record.undecodable}", record.kind)
                    yield picture

            return frames

        return [View(n, *p.shape[1:3], len(p), opener(p)) for n, p in record.pictures.items() if n in names]


def path(episode: int, rows: int) -> np.ndarray:
    """Smooth native poses [rows, 11] as in POSES, others in every episode."""
    t = np.arange(rows)[:, None] / HZ
    waves = np.sin(2 * np.pi * (0.3 + 0.05 * np.arange(10)) * t + 1.3 * episode + np.arange(10))
    turn = 0.4 * waves[:, 6:9] + [0.2, -0.1, 0.3]
    angle = np.linalg.norm(turn, axis=1, keepdims=True)
    return np.hstack(
        [
            0.8 * waves[:, :3],
            0.3 + 0.1 * waves[:, 3:6],
            turn / angle * np.sin(angle / 2),
            np.cos(angle / 2),
            0.5 + 0.4 * waves[:, 9:],
        ]
    )


def records(deltas: bool = False, episodes: int = EPISODES) -> list[Record]:
    """A healthy dataset: the state follows the action by one row; both cameras see the robot move."""
    made = []
    y, x = np.mgrid[0:32, 0:40]
    for episode in range(episodes):
        poses = path(episode, ROWS + 1)
        action, state = poses[1:], poses[:-1]
        if deltas:
            turn = 0.4 * np.sin(np.arange(ROWS + 1)[:, None] / 9 + np.arange(3) + episode)
            action = np.hstack([np.diff(poses[:, 3:6], axis=0), np.diff(turn, axis=0), poses[1:, 10:]])
            state = np.hstack([poses[:-1, 3:6], turn[:-1], poses[:-1, 10:]])
        shift = (100 * poses[:-1, 3:5]).astype(int)
        pictures = {
            name: np.stack(
                [np.stack([(x * 6 + 40 * dx + k * 50) % 256, (y * 7 + 30 * dz) % 256, x + y], -1) for dx, dz in shift]
            ).astype(np.uint8)
            for k, name in enumerate(("front", "wrist"))
        }
        made.append(
            Record(
                action.astype(np.float32),
                state.astype(np.float32),
                np.arange(ROWS) / HZ,
                f"do task {episode % 2}",
                pictures,
            )
        )
    return made


def config(deltas: bool = False, **changes: Any) -> DatasetConfig:
    action, state = (DELTAS, PLACES) if deltas else (POSES, POSES)
    return DatasetConfig(
        **{
            "name": "t",
            "match": (),
            "embodiment": "gripper_eef",
            "action": action,
            "state": state,
            "license": "MIT",
            **changes,
        }
    )
