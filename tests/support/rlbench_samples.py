"""Small RLBench demonstrations written as RLBench and PerAct lay them out, unpacked, zipped and in a tar.

The layout is that of stepjam/RLBench (tools/dataset_generator.py, rlbench/backend/const.py, rlbench/demo.py) and of
PerAct's data; the classes have their names in rlbench, so that the pickles are the bytes a real run would write.
"""

from __future__ import annotations

import io
import pickle
import shutil
import sys
import tarfile
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

CAMERAS = ("front", "left_shoulder", "right_shoulder", "overhead", "wrist")
LENGTH = 4  # of every episode
TEXT = {"close_jar": "close the red jar", "open_drawer": "open the bottom drawer"}


class Observation:
    """Stands for rlbench.backend.observation.Observation."""


class Demo:
    """Stands for rlbench.demo.Demo."""

    def __init__(self, observations):
        self._observations = observations
        self.random_seed = np.random.RandomState(0).get_state()  # a tuple with text, an array and numbers
        self.num_reset_attempts = None


@contextmanager
def as_rlbench() -> Iterator[None]:
    """While this lasts, the two classes are those of rlbench for pickle."""
    names = ("rlbench", "rlbench.backend", "rlbench.backend.observation", "rlbench.demo")
    modules = {name: types.ModuleType(name) for name in names}
    for kind, module in ((Observation, "rlbench.backend.observation"), (Demo, "rlbench.demo")):
        kind.__module__ = module
        setattr(modules[module], kind.__name__, kind)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def dump(value, protocol: int = 4) -> bytes:
    with as_rlbench():
        return pickle.dumps(value, protocol)


def as_numpy1(data: bytes) -> bytes:
    """The same pickle as numpy 1 writes it: other module names, so other lengths."""
    out = data.replace(b"numpy._core.", b"numpy.core.")  # protocol 2 and 3: up to the end of line
    for tail in (b"multiarray", b"numeric"):  # protocol 4 and 5: a length before the text
        new = b"numpy.core." + tail
        out = out.replace(bytes([0x8C, len(new) + 1]) + new, bytes([0x8C, len(new)]) + new)
    if data[1] >= 4:  # one frame, and its length
        assert data[2] == 0x95 and int.from_bytes(data[3:11], "little") == len(data) - 11
        out = out[:3] + (len(out) - 11).to_bytes(8, "little") + out[11:]
    return out


def observations(length: int, seed: int) -> list[Observation]:
    rng = np.random.default_rng(seed)
    found = []
    for t in range(length):
        one = Observation()
        for name in CAMERAS:
            for what in ("rgb", "depth", "mask", "point_cloud"):
                setattr(one, f"{name}_{what}", None)
        quaternion = rng.normal(size=4)
        one.gripper_pose = np.concatenate([rng.uniform(-0.5, 1.5, 3), quaternion / np.linalg.norm(quaternion)])
        one.gripper_open = float(t % 3 > 0)
        one.joint_positions, one.joint_velocities = rng.normal(size=7), rng.normal(size=7)
        one.gripper_joint_positions = rng.uniform(0, 0.04, 2)
        one.gripper_matrix = np.asfortranarray(rng.normal(size=(4, 4)))
        one.joint_forces = None
        one.ignore_collisions = np.array(True)
        one.misc = {
            "front_camera_near": 0.01,
            "front_camera_extrinsics": rng.normal(size=(4, 4)),
            "variation_index": 2,
            "joint_position_action": None if t == 0 else rng.normal(size=8),
        }
        found.append(one)
    return found


def picture(episode: int, frame: int, camera: int, size: tuple[int, int] = (16, 12)) -> np.ndarray:
    """uint8 [H, W, 3], different for every episode, frame and camera."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return np.stack([x * 5 + frame, y * 7 + 30 * camera, np.full_like(x, 20 * episode)], axis=-1).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_episode(
    folder: Path, number: int, length: int = LENGTH, protocol: int = 4, text: str = "", plain_list: bool = False
) -> None:
    """`folder` is episodeN; there are depth and mask folders too, with one picture for brevity."""
    demo = observations(length, seed=number)
    for index, camera in enumerate(CAMERAS):
        for kind in ("rgb", "depth", "mask"):
            (folder / f"{camera}_{kind}").mkdir(parents=True)
            for t in range(length if kind == "rgb" else 1):
                (folder / f"{camera}_{kind}" / f"{t}.png").write_bytes(png(picture(number, t, index)))
    (folder / "low_dim_obs.pkl").write_bytes(dump(demo if plain_list else Demo(demo), protocol))
    (folder / "variation_number.pkl").write_bytes(dump(2, protocol))
    if text:
        (folder / "variation_descriptions.pkl").write_bytes(dump([text, "another way to say it"], protocol))


def write_task(root: Path, task: str, episodes: int = 2, **how) -> Path:
    """`root`/task/all_variations/episodes/episode0, …, as PerAct has them."""
    for number in range(episodes):
        write_episode(
            root / task / "all_variations" / "episodes" / f"episode{number}", number, text=TEXT.get(task, ""), **how
        )
    return root / task


def write_tree(root: Path, episodes: int = 11) -> Path:
    """`root` with two tasks of PerAct: close_jar and two episodes of open_drawer, these in protocol 2."""
    write_task(root, "close_jar", episodes)
    write_task(root, "open_drawer", protocol=2)
    return root


def copy_two(tree: Path, root: Path) -> tuple[Path, Path]:
    """Episodes 0 and 1 of close_jar copied to `root`: (root, folder of episode 1)."""
    inner = "close_jar/all_variations/episodes"
    for number in (0, 1):
        shutil.copytree(tree / inner / f"episode{number}", root / inner / f"episode{number}")
    return root, root / inner / "episode1"


def pack(folder: Path, target: Path, with_folder: bool = True) -> Path:
    """`folder` as a .zip or .tar, its own name before the members' or not; as macOS zips it, with its extra files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    base = folder.parent if with_folder else folder
    if target.suffix == ".tar":
        with tarfile.open(target, "w") as tar:
            tar.add(folder, arcname=folder.name if with_folder else ".")
        return target
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(base))
        first = next(folder.rglob("episode0")).relative_to(base)
        file.writestr(f"__MACOSX/{first}/front_rgb/._0.png", b"litter")
        file.writestr(f"{first}/front_rgb/.DS_Store", b"litter")
    return target
