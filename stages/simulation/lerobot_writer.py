"""LeRobot's dataset writer, given complete demonstrations: a dataset of v3.0 with h264 video, by lerobot 0.4 to 0.6."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common.mp4 import quiet_libav

VIDEO_CRF = (
    14  # h264 constant quality: about 2 kB per 128 px frame, mean error 3 of 255; lerobot's 30 blurs small objects
)


class LeRobotWriter:
    """A dataset in the making; `close` it in any case."""

    def __init__(
        self,
        root: Path,
        *,
        name: str,
        fps: int,
        robot_type: str,
        views: Mapping[str, tuple[int, int]],
        state_names: Sequence[str],
        action_names: Sequence[str],
        longest: int,
    ) -> None:
        """A new dataset in the folder `root`, which must not exist.

        Args:
            views: view name → height and width of its images.
            longest: frames of the longest episode.
        """
        from datasets import disable_progress_bars

        disable_progress_bars()
        quiet_libav()
        features: dict[str, dict[str, Any]] = {
            f"observation.images.{view}": {
                "dtype": "video",
                "shape": (*size, 3),
                "names": ["height", "width", "channels"],
            }
            for view, size in views.items()
        }
        for key, names in (("observation.state", state_names), ("action", action_names)):
            features[key] = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
        # Frames go straight to encoder threads (no PNG files). LeRobot drops frames when its queue is full, so the
        # queue holds a whole episode.
        self._dataset = _create(
            longest + 1, repo_id=f"dvla/{name}", fps=fps, features=features, root=root, robot_type=robot_type
        )

    def add(self, instruction: str, images: Mapping[str, np.ndarray], state: np.ndarray, action: np.ndarray) -> None:
        """Append one episode of T steps: images of each view [T, H, W, 3] uint8, state [T, ds], action [T, da]."""
        for t in range(len(action)):
            frame = {f"observation.images.{view}": frames[t] for view, frames in images.items()}
            self._dataset.add_frame({**frame, "observation.state": state[t], "action": action[t], "task": instruction})
        self._dataset.save_episode()

    def close(self) -> None:
        """Write the footers, also after an error: LeRobot's destructor would do so in a folder already removed."""
        self._dataset.finalize()


def _create(queue: int, **how: Any) -> Any:
    """LeRobot's dataset of video that is encoded while frames arrive; `queue` of them may wait."""
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)  # a page on FFmpeg, for a decoder not used
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if "rgb_encoder" in inspect.signature(LeRobotDataset.create).parameters:
        from lerobot.configs.video import RGBEncoderConfig

        encoder = RGBEncoderConfig(vcodec="h264", crf=VIDEO_CRF)
        return LeRobotDataset.create(**how, rgb_encoder=encoder, streaming_encoding=True, encoder_queue_maxsize=queue)
    from lerobot.datasets.video_utils import StreamingVideoEncoder

    dataset = LeRobotDataset.create(**how, vcodec="h264")  # before 0.6 it takes no quality
    holder = dataset if hasattr(dataset, "_streaming_encoder") else dataset.writer  # that of 0.4; of 0.5
    holder._streaming_encoder = StreamingVideoEncoder(how["fps"], vcodec="h264", crf=VIDEO_CRF, queue_maxsize=queue)
    return dataset
