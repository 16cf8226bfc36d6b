"""Small files made to the documented layouts of DexWild (HDF5) and DexGraspNet 2.0 (npz, depth pictures, poses)."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

PERIOD_NS = 33_333_333
START_NS = 1_744_428_163_583_061_504
CAMERAS = ("right_pinky_cam", "right_thumb_cam")
PICTURE_SIZE = (24, 32)  # H, W


# --- DexWild ---


def dex_picture(camera: int, frame: int, height: int = PICTURE_SIZE[0], width: int = PICTURE_SIZE[1]) -> np.ndarray:
    """Smooth, different for every frame and camera, and red is not blue."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([4 * x + 3 * frame, 5 * y + 40 * camera, np.full_like(x, 200 - 8 * frame)], -1).astype(np.uint8)


def jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def streams(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Stream → [length, 1 + d]: time in ns and values; times are those of the pictures."""
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=(length, 4))
    quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
    values = {
        "right_arm_eef": np.hstack([rng.uniform(-0.5, 0.5, (length, 3)), quaternion]),
        "right_leapv1": rng.uniform(-1.5, 1.5, (length, 16)),
        "right_leapv2": rng.uniform(0, 1.5, (length, 17)),
        "right_manus": rng.normal(size=(length, 70)),
    }
    times = (START_NS + PERIOD_NS * np.arange(length)).astype(np.float64)[:, None]
    return {name: np.hstack([times, v]) for name, v in values.items()}


def write_episode(
    file: h5py.File,
    name: str,
    length: int = 8,
    seed: int = 0,
    encoded: bool = False,
    change: Callable[[dict[str, np.ndarray]], None] = lambda streams: None,
) -> None:
    """One episode group; `change` may edit the streams before they are written; `encoded`: pictures as JPEG bytes."""
    group, values = file.create_group(name), streams(length, seed)
    change(values)
    for stream, array in values.items():
        group.create_group(stream).create_dataset(stream, data=array)
    for number, camera in enumerate(CAMERAS):
        folder = group.create_group(camera)
        for frame in range(length):
            picture = dex_picture(number, frame)
            stored = np.frombuffer(jpeg(picture), np.uint8) if encoded else picture
            folder.create_dataset(f"{START_NS + PERIOD_NS * frame}.jpg", data=stored)
    group.create_group("right_tracker").create_dataset("right_tracker_world.png", data=np.zeros((4, 4, 4), np.uint8))
    group.create_group("timesteps").create_dataset(
        "timesteps", data="\n".join(str(int(t)) for t in values["right_manus"][:, 0])
    )


def write_dexwild(root: Path, lengths: tuple[int, ...] = (8, 6), task: str = "pour", **how: object) -> Path:
    """`root`/<task>_data/robot/robot_<task>_data.hdf5 with an episode per length; the path of the file."""
    path = root / f"{task}_data" / "robot" / f"robot_{task}_data.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for number, length in enumerate(lengths):
            write_episode(file, f"ep_{number:04d}", length, seed=number, **how)  # type: ignore[arg-type]
    return path


# --- DexGraspNet 2.0 ---

JOINTS = tuple(f"j{i}" for i in range(16))
OBJECTS = {5: (0.05, -0.04, 0.035), 14: (-0.09, 0.07, 0.05)}  # number → x, y of the ball on the table and its radius, m
NAMES = {5: "013_apple.ply", 14: "darlie_box.ply"}


def look_at(eye: tuple[float, float, float], target: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """Camera → table [4, 4]: x right, y down, z forward."""
    forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = eye
    return pose


def balls(number: int) -> list[tuple[np.ndarray, float]]:
    """Centre (table's frame) and radius of the parts of an object."""
    x, y, radius = OBJECTS[number]
    main = [(np.array([x, y, radius]), radius)]
    return main + [(np.array([x + 0.8 * radius, y + 0.3 * radius, radius * 1.6]), radius * 0.45)] * (number == 5)


def cast(pose: np.ndarray, intrinsics: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(depth [H, W] in m, label [H, W]) of the objects on a table of 0.8 m, seen by a camera; 0 where nothing is."""
    v, u = np.mgrid[0:height, 0:width]
    ray = np.stack(
        [(u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1], np.ones_like(u)], -1
    )
    ray, eye = ray @ pose[:3, :3].T, pose[:3, 3]  # in the table's frame, one metre of depth long
    down = np.where(ray[..., 2] < -1e-9, -eye[2] / np.minimum(ray[..., 2], -1e-9), np.inf)
    hit = eye[:2] + np.where(np.isfinite(down), down, 0)[..., None] * ray[..., :2]
    depth, label = np.where(np.abs(hit).max(-1) < 0.4, down, np.inf), np.zeros((height, width), np.uint8)
    for number in OBJECTS:
        for centre, radius in balls(number):
            a, b, c = (ray**2).sum(-1), ray @ (eye - centre), (eye - centre) @ (eye - centre) - radius**2
            inside = b**2 - a * c
            near = np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
            label = np.where(near < depth, number + 1, label).astype(np.uint8)
            depth = np.minimum(depth, near)
    return np.where(np.isfinite(depth), depth, 0.0), label


def grasp_arrays(number: int, count: int, to_scene: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of one grasp file in the scene's frame: points on the object, hand poses near them, joints.

    In the table's frame they are the same in every scene.
    """
    rng = np.random.default_rng(number)
    normal = rng.normal(size=(count, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    centre, radius = balls(number)[0]
    rotation = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))[:, None, None]

    def moved(points: np.ndarray) -> np.ndarray:
        return (points @ to_scene[:3, :3].T + to_scene[:3, 3]).astype(np.float32)

    arrays = {
        "point": moved(centre + radius * normal),
        "translation": moved(centre + (radius + 0.1) * normal),
        "rotation": (to_scene[:3, :3] @ rotation).astype(np.float32),
    }
    return arrays | {j: rng.uniform(-0.5, 1.5, count).astype(np.float32) for j in JOINTS}


def write_view(
    folder: Path, name: str, suffix: str, depth: np.ndarray, label: np.ndarray, intrinsics: np.ndarray
) -> None:
    """Depth in millimeters, labels and camera of one view."""
    from scipy.io import savemat

    Image.fromarray(np.round(depth * 1000).astype(np.uint16)).save(folder / f"depth{suffix}" / f"{name}.png")
    Image.fromarray(label).save(folder / f"label{suffix}" / f"{name}.png")
    savemat(folder / "meta" / f"{name}.mat", {"intrinsic_matrix": intrinsics, "factor_depth": np.array([[1000]])})


def write_clouds(folder: Path, clouds: list[tuple[np.ndarray, np.ndarray]], cameras: list[np.ndarray]) -> None:
    """The point clouds of all views in one file, as a network reads them, cut to one length."""
    few = min(len(points) for points, _ in clouds)
    np.savez(
        folder / "network_input.npz",
        pc=np.stack([p[:: len(p) // few][:few] for p, _ in clouds]).astype(np.float32),
        seg=np.stack([label[:: len(label) // few][:few] for _, label in clouds]).astype(np.int32),
        extrinsics=np.stack(cameras),
        edge=np.zeros((len(clouds), few), np.int32),
    )


def write_dexgraspnet(
    root: Path,
    scenes: tuple[int, ...] = (0,),
    views: int = 6,
    size: tuple[int, int] = (320, 180),
    grasps: int = 50,
    suffix: str = "_gt",
    photographs: bool = False,
    network_input: bool = False,
) -> Path:
    """The unpacked archives with two objects a scene; `size`: width and height of the depth pictures."""
    width, height = size
    intrinsics = np.array([[0.72 * width, 0, width / 2], [0, 0.72 * width, height / 2], [0, 0, 1]])
    for scene in scenes:
        folder = root / "scenes" / f"scene_{scene:04d}" / "realsense"
        for name in ("depth" + suffix, "label" + suffix, "meta", "annotations", "rgb"):
            (folder / name).mkdir(parents=True)
        turns = [0.3 * scene + 2 * np.pi * i / views for i in range(views)]
        cameras = [look_at((0.45 * np.cos(a), 0.45 * np.sin(a), 0.4)) for a in turns]
        to_scene = np.linalg.inv(cameras[0])
        np.save(folder / "camera_poses.npy", np.stack([to_scene @ c for c in cameras]))
        np.save(folder / "cam0_wrt_table.npy", cameras[0])
        clouds = []
        for i, camera in enumerate(cameras):
            depth, label = cast(camera, intrinsics, width, height)
            v, u = np.nonzero(depth)
            z = depth[v, u]
            clouds.append(
                (
                    np.stack([(u - width / 2) * z / intrinsics[0, 0], (v - height / 2) * z / intrinsics[1, 1], z], -1),
                    label[v, u],
                )
            )
            if not network_input:
                write_view(folder, f"{i:04d}", suffix, depth, label, intrinsics)
            if photographs:
                paint = np.array([[200, 200, 200], [180, 20, 20], [20, 120, 40]], np.uint8)[np.digitize(label, (1, 10))]
                Image.fromarray(paint).save(folder / "rgb" / f"{i:04d}.png")
        if network_input:
            write_clouds(folder, clouds, cameras)
        entries = "".join(
            f"<obj>\n<obj_id>{n}</obj_id>\n<obj_name>{name}</obj_name>\n</obj>\n" for n, name in NAMES.items()
        )
        (folder / "annotations" / "0000.xml").write_text(f'<?xml version="1.0" ?>\n<scene>{entries}</scene>\n')
        target = root / "dex_grasps_new" / f"scene_{scene:04d}" / "leap_hand"
        target.mkdir(parents=True)
        for number in OBJECTS:
            np.savez_compressed(target / f"{number:03d}.npz", **grasp_arrays(number, grasps, to_scene))
    return root
