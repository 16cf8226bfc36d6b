"""SO-101 arms without hardware: LeRobot's own robot and teleoperator, on a motor bus and cameras that are stand-ins.

`put_in(setattr)` puts them in the place of Feetech's bus and of OpenCV's camera. What was read from and written to the
buses is in `EVENTS`; a process that has `STANDIN_LOG` set writes it there when the arm is disconnected.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MOTORS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
JOINTS = [f"{motor}.pos" for motor in MOTORS]
SIZE = (48, 64)  # height, width
CAMERAS = (
    "{"
    + ", ".join(
        f"{v}: {{type: opencv, index_or_path: {i}, width: 64, height: 48, fps: 30}}"
        for i, v in enumerate(("front", "wrist"))
    )
    + "}"
)
EVENTS: list[tuple[str, list[float]]] = []  # ("read" or "write", values of all motors) of the follower


def image_of(index: int) -> np.ndarray:
    """What camera `index` shows, always: uint8 [48, 64, 3]."""
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    return np.stack([4 * x, 5 * y, np.full_like(x, 90 * index)], -1).astype(np.uint8)


class Bus:
    """Motors that are at once where they are sent to."""

    is_calibrated = True

    def __init__(self, port: str, motors: dict[str, Any], calibration: Any = None) -> None:
        self.port, self.motors, self.is_connected = port, motors, False
        self.positions = {motor: 5.0 * i for i, motor in enumerate(motors)}

    def connect(self) -> None:
        self.is_connected = True

    def disconnect(self, disable_torque: bool = True) -> None:
        self.is_connected = False
        if "STANDIN_LOG" in os.environ:
            Path(os.environ["STANDIN_LOG"]).write_text(json.dumps(EVENTS))

    @contextlib.contextmanager
    def torque_disabled(self) -> Iterator[None]:
        yield

    def sync_read(self, name: str, *_: Any, **__: Any) -> dict[str, float]:
        if self.port == "leader":  # a hand moves it
            self.positions = {motor: value + 0.5 for motor, value in self.positions.items()}
        else:
            EVENTS.append(("read", [float(v) for v in self.positions.values()]))
        return dict(self.positions)

    def sync_write(self, name: str, values: dict[str, float], **_: Any) -> None:
        assert name == "Goal_Position" and list(values) == list(self.motors)
        self.positions = {motor: float(value) for motor, value in values.items()}
        EVENTS.append(("write", list(self.positions.values())))

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in ("write", "configure_motors", "disable_torque", "enable_torque"):
            return lambda *_, **__: None
        raise AttributeError(name)


class Camera:
    """A camera that shows one image."""

    use_rgb, use_depth = True, False

    def __init__(self, config: Any) -> None:
        self.index, self.width, self.height, self.fps = config.index_or_path, config.width, config.height, config.fps
        self.is_connected = False

    def connect(self, *_: Any, **__: Any) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def read_latest(self, *_: Any, **__: Any) -> np.ndarray:
        return image_of(self.index)

    read = async_read = read_latest


def put_in(put: Callable[[Any, str, Any], None]) -> None:
    """Replace bus and camera by `put(module, name, value)`, for example `setattr`."""
    import lerobot.cameras.opencv as opencv
    import lerobot.robots.so_follower.so_follower as follower
    import lerobot.teleoperators.so_leader.so_leader as leader

    EVENTS.clear()
    put(follower, "FeetechMotorsBus", Bus)
    put(leader, "FeetechMotorsBus", Bus)
    put(opencv, "OpenCVCamera", Camera)
