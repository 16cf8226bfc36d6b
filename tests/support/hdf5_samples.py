"""Small datasets in the documented layouts of Episode-HDF5, robomimic HDF5 and Diffusion Policy's Zarr replay buffer.

Also helpers to damage and to compare them.

Letters: T frames of an episode, H × W picture size.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import h5py
import numpy as np

from dvla.cache.readers.search import load_config

CAN = load_config("robomimic")
LENGTHS = (7, 5, 9)
HZ = 20
OSC_POSE = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "control_delta": True,
}  # robosuite's default
IN_BODY_PARTS = {"type": "BASIC", "body_parts": {"right": {**OSC_POSE, "gripper": {"type": "GRIP"}}}}  # robosuite 1.5
ARM = tuple(range(6)) + (10,)  # slots of six joints and a gripper
QUATERNION = (30, 31, 32, 33, 34, 35, 36)  # position, and a quaternion in slots of a 6D rotation


def pictures(episode: int, length: int, height: int = 6, width: int = 8) -> np.ndarray:
    """uint8 [T, H, W, 3], every frame different, none all zero."""
    frame, y, x, colour = np.meshgrid(*(np.arange(n) for n in (length, height, width, 3)), indexing="ij")
    return ((13 * frame + 5 * y + 3 * x + 50 * colour + 31 * episode) % 251 + 2).astype(np.uint8)


def values(episode: int, length: int, width: int) -> np.ndarray:
    """float32 [T, width] in [0.1, 0.9]."""
    return np.random.default_rng(episode).uniform(0.1, 0.9, (length, width)).astype(np.float32)


def write_episode_file(path: Path, episode: int, length: int, slots=ARM, proprio_slots=ARM, **attributes) -> None:
    """One file of the proposal's layout, and nothing more."""
    with h5py.File(path, "w") as file:
        for name, used in (("actions", slots), ("proprio", proprio_slots)):
            table = np.zeros((length, 128), np.float32)
            table[:, list(used)] = values(episode, length, len(used))
            file[name] = table
        mask = np.zeros(128, bool)
        mask[list(slots)] = True
        file["action_mask"] = mask
        file["language"] = f"task {episode}"
        for k, size in enumerate(((6, 8), (4, 4))):
            file[f"images/view_{k}"] = pictures(episode + k, length, *size)
        file.attrs.update(
            {
                "dataset_name": "sample",
                "embodiment_id": 1,
                "episode_length": length,
                "n_views": 2,
                "action_dim": len(slots),
                **attributes,
            }
        )


def write_episode_folder(folder: Path, **how) -> Path:
    """Three of them; `control_hz`, which the layout lacks, is there unless it is None."""
    folder.mkdir(parents=True)
    how = {"control_hz": float(HZ), **how}
    for episode, length in enumerate(LENGTHS):
        write_episode_file(
            folder / f"ep_{episode:06d}.hdf5", episode, length, **{k: v for k, v in how.items() if v is not None}
        )
    return folder


def write_robomimic(
    path: Path,
    *,
    env_name: str = "PickPlaceCan",
    controller: dict | None = OSC_POSE,
    images: bool = True,
    control_freq: int | None = HZ,
    compression: str | None = None,
) -> Path:
    """Three demonstrations, numbered 0, 2 and 10, as robomimic's dataset_states_to_obs.py leaves them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kwargs = {"robots": ["Panda"], "control_freq": control_freq, "controller_configs": controller}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(LENGTHS)
        data.attrs["env_args"] = json.dumps({"env_name": env_name, "type": 1, "env_kwargs": kwargs}, indent=4)
        for number, length in zip((0, 2, 10), LENGTHS):
            demo = data.create_group(f"demo_{number}")
            demo.attrs.update({"num_samples": length, "model_file": "<mujoco/>"})
            demo["actions"] = values(number, length, 7).astype(np.float64) * 2 - 1
            demo["states"] = np.zeros((length, 45))
            demo["obs/robot0_eef_pos"] = values(number + 1, length, 3).astype(np.float64)
            quaternion = values(number + 2, length, 4).astype(np.float64)
            demo["obs/robot0_eef_quat"] = quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)
            demo["obs/robot0_gripper_qpos"] = values(number + 3, length, 2).astype(np.float64) * [0.04, -0.04]
            demo["next_obs/robot0_eef_pos"] = np.zeros((length, 3))
            for i, key in enumerate(("agentview_image", "robot0_eye_in_hand_image") if images else ()):
                demo.create_dataset(f"obs/{key}", data=pictures(number + i, length), compression=compression)
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    return path


def write_replay_buffer(path: Path, *, zarr_format: int = 2, pixels: np.ndarray | None = None, chunk: int = 4) -> Path:
    """Push-T's arrays: three episodes, float32 pictures in 0 to 255, chunks that cross the ends of episodes."""
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    rows = sum(LENGTHS)
    arrays = {
        "img": np.concatenate([pictures(e, n) for e, n in enumerate(LENGTHS)]).astype(np.float32)
        if pixels is None
        else pixels,
        "action": values(0, rows, 2) * 512,
        "state": values(1, rows, 5) * 512,
        "keypoint": np.ones((rows, 9, 2), np.float32),
    }
    for name, data in arrays.items():
        group.create_array(f"data/{name}", data=data, chunks=(chunk, *data.shape[1:]))
    group.create_array("meta/episode_ends", data=np.cumsum(LENGTHS))
    return path


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def exchange(name, data, **how):
    """A change that puts another dataset in the place of `name`."""

    def change(file):
        del file[name]
        file.create_dataset(name, data=data, **how)

    return change


def outside(name, target):
    def change(file):
        del file[name]
        file[name] = h5py.ExternalLink(*target)

    return change


def frames(view, *span):
    return np.stack(list(view.frames(*span)))


def same_unified(a, b):
    """Everything a cache is built from is equal, bit for bit."""
    assert (a.episode_ids, a.view_names, a.control_hz) == (b.episode_ids, b.view_names, b.control_hz)
    assert a.config.embodiment == b.config.embodiment
    assert np.array_equal(a.action_map.mask, b.action_map.mask) and np.array_equal(a.state_map.mask, b.state_map.mask)
    assert np.array_equal(a.action_map.rotation_slots, b.action_map.rotation_slots)
    assert np.array_equal(a.state_map.rotation_slots, b.state_map.rotation_slots)
    for number in a.episode_ids:
        one, other = a.load(number), b.load(number)
        assert (one.instruction, one.length) == (other.instruction, other.length)
        assert np.array_equal(one.timestamps, other.timestamps)
        assert np.array_equal(a.action_map.to_unified(one.action), b.action_map.to_unified(other.action))
        assert np.array_equal(a.state_map.to_unified(one.state), b.state_map.to_unified(other.state))
        for view, copy in zip(one.views, other.views, strict=True):
            assert (view.name, view.height, view.width) == (copy.name, copy.height, copy.width)
            assert np.array_equal(frames(view), frames(copy))


def serve(monkeypatch, remote: Path, commit: Path) -> list[str]:
    """Let the hub consist of the files below `remote` and return the names of those fetched so far, in order."""
    import huggingface_hub

    asked: list[str] = []
    names = [p.relative_to(remote).as_posix() for p in sorted(remote.rglob("*")) if p.is_file()]

    def fetch(repo, filename, **_):
        if filename not in names:
            raise huggingface_hub.errors.EntryNotFoundError("404")
        if not (commit / filename).exists():
            asked.append(filename)
            (commit / filename).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / filename, commit / filename)

    def snapshot(repo, *, allow_patterns, **_):
        commit.mkdir(exist_ok=True)
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                fetch(repo, name)
        return str(commit)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, **_: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.chdir(remote.parent)
    return asked
