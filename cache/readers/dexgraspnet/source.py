"""DexGraspNet 2.0: grasps of a LEAP hand in cluttered scenes, each an episode of one frame, with views rendered from
the cloud.

What is read, below the folder given (the archives of the hub, unpacked side by side):

    dex_grasps_new/scene_0000/leap_hand/005.npz     grasps of object 5 in scene 0, thousands of them:
        translation [G, 3] m, rotation [G, 3, 3], j0 … j15 [G] rad (LEAP's motor order), point [G, 3] m on the object
    scenes/scene_0000/realsense/
        camera_poses.npy [V, 4, 4]      camera → the scene's frame, which is that of the first camera
        cam0_wrt_table.npy [4, 4]       the scene's frame → the table's, z up
        depth_gt/0000.png, label_gt/0000.png, meta/0000.mat     rendered depth, objects, camera matrix, factor_depth
        depth/, label/, rgb/            the same measured, and photographs, where the source had them
        annotations/0000.xml            obj_id and obj_name (e.g. 011_banana.ply) of the objects
        network_input.npz               pc [V, N, 3] in camera frames, seg [V, N], extrinsics [V, 4, 4] to the table;
                                        used where there are no depth images

Columns: those of the npz as stored, in the scene's frame; and target_translation, target_rotation, the same pose in the
**target frame**: axes of the table, origin at the center of the box around the object's `point`s. The cameras
(render.CAMERAS) stand in the target frame, so that is the pose which the images can tell; in the scene's frame it
depends on where that scene's first camera happened to be. There is no time axis: one frame, and the loader masks the
rest of a chunk.

Of the thousands of grasps of an object in a scene GRASPS_PER_OBJECT are listed, evenly chosen: they share the views,
which a cache stores with each. Over all scenes that is about 600 000, the size of the research plan's subset. Episode
ids are (scene · 1000 + object) · GRASPS_PER_OBJECT + k.

Learnt from public code (PKU-EPIC/DexGraspNet2 and copies: README, src/utils/dataset.py,
src/preprocess/compute_network_input.py, tests/visualize_dex_grasp.py) and one published annotation file. Nothing was
verified on real bytes here. Which label an object has is not assumed but found at the `point`s, which also shows that
grasps and depth share a frame. Letters: G grasps of a file, V camera views, N points.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ....common.documents import read_file
from ....errors import UserError
from ..base import Source, choose_views, listing_hash
from ..config import DatasetConfig
from ..episode import CorruptEpisode, View
from ..location import Location
from ..search import Files, choose_config
from ..tables import EpisodeTable, Rows
from .render import CAMERAS, SIZE, VERSION, render, shade
from .scene import SPACING, find_scene, load_arrays, load_matrix, read_cloud, scene_files

GRASPS_PER_OBJECT = 8  # grasps listed of an object in a scene
REACH = 0.3  # m around the target that is drawn
_TARGET, _OTHER, _TABLE = (235, 140, 60), (125, 150, 180), (215, 215, 215)  # colors of surfaces without photographs
_POSE = {"point": (3,), "translation": (3,), "rotation": (3, 3)}  # arrays that every file needs → shape of one grasp
_CELL = 0.008  # m, within which a grasp's point meets the cloud
_SURELY_MANY = 64 << 10  # bytes: a file of this size holds more than GRASPS_PER_OBJECT grasps
_NAMED = re.compile(r"<obj_id>\s*(\d{1,9})\s*</obj_id>\s*<obj_name>([^<]*)</obj_name>")
_MOST_TEXT = 1 << 24  # bytes of an annotation


class DexGraspNetSource(Source):
    """A folder of unpacked DexGraspNet 2.0 archives."""

    format = "dexgraspnet"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A folder with dex_grasps_new/ and scenes/; `UserError` when it has no grasps, or not the config's views."""
        root = Path(path_or_repo).expanduser()
        if not (root / "dex_grasps_new").is_dir():
            raise UserError(
                f"{path_or_repo} has no folder dex_grasps_new; DexGraspNet 2.0 comes as archives: unpack "
                f"dex_grasps_new.tar.gz and scenes.tar.gz into one folder and give that"
            )
        self._paths = _grasp_files(root / "dex_grasps_new")
        numbers = [key * GRASPS_PER_OBJECT + k for key, path in self._paths.items() for k in range(_listed(path))]
        name = Location(str(root), ()).name
        config = choose_config(
            config, self.format, Files((name,), root, lambda: _columns(next(iter(self._paths.values()))))
        )
        super().__init__(root, name, config, view_names=choose_views(tuple(CAMERAS), config, name), episode_ids=numbers)
        # a few scenes at a time are kept: the grasps of an object follow one another, and so do the objects of a scene
        self._grasps = functools.lru_cache(4)(self._read_grasps)
        self._frame = functools.lru_cache(4)(self._read_frame)
        self._scene_files = functools.lru_cache(4)(scene_files)
        self._scene = functools.lru_cache(4)(find_scene)
        self._cloud = functools.lru_cache(2)(read_cloud)
        self._images = functools.lru_cache(8)(self._draw)
        self._names = functools.lru_cache(4)(_object_names)

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """By the folder dex_grasps_new, or the archive of that name on the hub."""
        return any(n.split("/")[0] in ("dex_grasps_new", "dex_grasps_new.tar.gz") for n in names)

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over the names and sizes of the grasp files."""
        return listing_hash(self.path, list(self._paths.values()))

    def length_of(self, episode_id: int) -> int:
        """1: a grasp is one pose."""
        self.where(episode_id)
        return 1

    def instruction_of(self, episode_id: int) -> str:
        """ "grasp the banana" where the scene's annotations name the object, else the config's."""
        self.where(episode_id)
        key = episode_id // GRASPS_PER_OBJECT
        known = self._names(self._folder(key) / "annotations").get(key % 1000)
        return f"grasp the {known}" if known else self.config.instruction

    def center_of(self, episode_id: int) -> np.ndarray:
        """Origin of the target frame in the table's frame, [3] m; `CorruptEpisode` for damaged files."""
        with _named(self.where(episode_id)):
            return self._frame(episode_id // GRASPS_PER_OBJECT)[2]

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        key, k = divmod(episode_id, GRASPS_PER_OBJECT)
        with _named(where):
            arrays = self._grasps(key)
            count = len(arrays["point"])
            if k >= count:
                raise CorruptEpisode(f"{self._label(key)} has {count} grasps only")
            row = (2 * k + 1) * count // (2 * GRASPS_PER_OBJECT) if count > GRASPS_PER_OBJECT else k
            found = {name: values[row : row + 1] for name, values in arrays.items()}
            if {"target_translation", "target_rotation"} & set(columns):
                axes, shift, center = self._frame(key)
                found["target_translation"] = found["translation"] @ axes.T + shift - center
                found["target_rotation"] = axes @ found["rotation"]
        return Rows({c: v for c, v in found.items() if c in columns}, self.instruction_of(episode_id))

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        path = self._paths[episode_id // GRASPS_PER_OBJECT]
        folder = self._folder(episode_id // GRASPS_PER_OBJECT)
        with _named(where):
            return path, folder / "cam0_wrt_table.npy", *(folder / name for name in self._scene_files(folder)[2])

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> Iterator[View]:
        key = episode_id // GRASPS_PER_OBJECT
        with _named(where):
            files, frame = self._scene(self._folder(key)), self._frame(key)
        for name in names:
            made_of = f"{VERSION};{CAMERAS[name]};{SPACING};{REACH};{key % 1000};{files.sha256};".encode()
            digest = hashlib.sha256(made_of + b"".join(a.tobytes() for a in frame)).hexdigest()
            yield View(name, SIZE, SIZE, 1, functools.partial(self._open, key, name, where), digest)

    def _open(self, key: int, view: str, where: str, start: int, stop: int) -> Iterator[np.ndarray]:
        with _named(where):
            yield self._images(key)[view].copy()  # the cached one stays unchanged

    # --- read once and kept; their messages lack the episode's name ---

    def _folder(self, key: int) -> Path:
        return self.path / "scenes" / self._paths[key].parts[-3] / "realsense"  # whose first pose is the grasps' frame

    def _label(self, key: int) -> str:
        return "/".join(self._paths[key].parts[-3:])

    def _read_grasps(self, key: int) -> dict[str, np.ndarray]:
        arrays = load_arrays(self._paths[key], tuple(dict.fromkeys((*_POSE, *self.config.columns))))
        count = len(arrays["point"]) if "point" in arrays and arrays["point"].ndim else 0
        for name in dict.fromkeys((*_POSE, *arrays)):
            if name not in arrays:
                raise CorruptEpisode(f"{self._label(key)} has no array '{name}'")
            values = arrays[name]
            tail = _POSE.get(name, values.shape[1:])
            if not count or values.shape != (count, *tail) or values.dtype.kind not in "fiu":
                raise CorruptEpisode(
                    f"{self._label(key)}: '{name}' is {values.dtype} {list(values.shape)} for {count} grasps"
                )
        if not np.isfinite(arrays["point"]).all():
            raise CorruptEpisode(f"{self._label(key)}: a 'point' is not finite", "not-finite")
        return arrays

    def _read_frame(self, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(axes [3, 3], shift [3], center [3]): scene to table is axes @ x + shift, to target that less center."""
        table = load_matrix(self._folder(key) / "cam0_wrt_table.npy")
        axes, shift = table[:3, :3], table[:3, 3]
        if table.ndim > 2 or np.abs(axes @ axes.T - np.eye(3)).max() > 1e-3 or np.linalg.det(axes) < 0:
            raise CorruptEpisode(
                f"{self._label(key)}: the scene's cam0_wrt_table.npy is not a rotation and shift", "rotation-norm"
            )
        points = self._grasps(key)["point"] @ axes.T + shift
        return axes, shift, (points.min(0) + points.max(0)) / 2

    def _draw(self, key: int) -> dict[str, np.ndarray]:
        """Each view of an object, from the points of its scene that are near; the object stands out in color."""
        cloud, (axes, shift, center) = self._cloud(self._scene(self._folder(key))), self._frame(key)
        points = cloud.points - center
        near = np.abs(points).max(1) < REACH
        points, labels = points[near], cloud.labels[near]
        own = _label_at(points, labels, self._grasps(key)["point"] @ axes.T + shift - center)
        if own is None:
            raise CorruptEpisode(
                f"{self._label(key)}: the scene's images show no object where its points are; grasps and "
                f"images are not of one scene, or not in one frame"
            )
        if cloud.colors is not None:
            return render(points, cloud.colors[near], SPACING)
        base = np.where((labels == own)[:, None], _TARGET, np.where((labels > 0)[:, None], _OTHER, _TABLE))
        return render(points, shade(points, base, None if cloud.normals is None else cloud.normals[near]), SPACING)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except CorruptEpisode as error:
        raise CorruptEpisode(f"{where}: {error}", error.kind) from None


def _grasp_files(folder: Path) -> dict[int, Path]:
    """scene · 1000 + object → its file, in that order; `UserError` when there is none, or a name is no number."""
    files = {}
    for path in folder.glob("scene_*/leap_hand/*.npz"):
        scene, thing = path.parts[-3].removeprefix("scene_"), path.stem
        if not (scene.isdecimal() and thing.isdecimal() and int(thing) < 1000):
            raise UserError(
                f"{path}: grasps are in scene_<number>/leap_hand/<object number below 1000>.npz; move other files away"
            )
        files[int(scene) * 1000 + int(thing)] = path
    if not files:
        raise UserError(f"{folder} holds no scene_<number>/leap_hand/<object>.npz; unpack dex_grasps_new.tar.gz again")
    return dict(sorted(files.items()))


def _columns(path: Path) -> dict[str, int]:
    """Numbers per grasp of each array of a file of grasps."""
    with contextlib.suppress(CorruptEpisode):
        numbers = {name: values for name, values in load_arrays(path).items() if values.dtype.kind in "fiu"}
        return {name: math.prod(values.shape[1:]) for name, values in numbers.items()}
    return {}


def _listed(path: Path) -> int:
    """Grasps listed of a file. Only a small one is opened for that; a damaged one counts as one, refused later."""
    try:
        if path.stat().st_size >= _SURELY_MANY:
            return GRASPS_PER_OBJECT
        return max(1, min(GRASPS_PER_OBJECT, len(load_arrays(path, ("point",)).get("point", ()))))
    except (CorruptEpisode, OSError, TypeError):  # TypeError: a point without dimensions
        return 1


def _object_names(folder: Path) -> dict[int, str]:
    """Object number → name, from the first annotation file that can be read: 011_banana.ply is "banana"."""
    for path in sorted(folder.glob("*.xml")):
        try:
            found = _NAMED.findall(read_file(path, _MOST_TEXT).decode(errors="replace"))
        except UserError:
            continue
        if found:
            return {
                int(number): re.sub(r"^\d+_|\.\w+$", "", name.strip()).replace("_", " ").strip()
                for number, name in found
            }
    return {}


def _label_at(points: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> int | None:
    """The most frequent label of those `points [N, 3]` that are where `wanted [G, 3]` are; None without an object."""

    def cells(values: np.ndarray) -> np.ndarray:
        whole = np.floor(values / _CELL).astype(np.int64)
        return (whole[:, 0] * 4096 + whole[:, 1]) * 4096 + whole[:, 2]

    there = labels[np.isin(cells(points), np.unique(cells(wanted))) & (labels > 0)]
    return int(np.bincount(there).argmax()) if len(there) else None
