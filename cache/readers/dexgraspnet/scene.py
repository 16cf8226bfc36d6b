"""The point cloud of one DexGraspNet 2.0 scene, from its depth images or the network's input (layout: see
dexgraspnet.py).

Letters: N points, H × W size of a depth image. Lengths in m. Frames: the scene's frame is that of its first camera
pose; the table's has z up; `cam0_wrt_table` leads from the one to the other.
"""

from __future__ import annotations

import hashlib
import math
import os
import tokenize
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ....common.documents import open_regular
from ....common.text import first_line
from ..episode import CorruptEpisode
from ..images import DAMAGE, check_size
from ..location import regular
from .mat_file import read_matrices

CLOUD_VIEWS = 8  # of up to 256 depth images, chosen evenly: enough to see an object from all sides
SPACING = 0.002  # m; one point is kept per cube of this size
_STRIDE = 3  # pixels of a depth image between two points: 1.6 mm at 0.5 m
_FAR = 1e3  # m
_MOST = 1 << 29  # bytes of a file, or of an array unpacked
_RIM = 0.01  # m of depth between neighbors: more is the rim of a surface
_DAMAGE = (
    *DAMAGE,
    KeyError,
    IndexError,
    TypeError,
    MemoryError,
    NotImplementedError,
    tokenize.TokenError,  # of the header of an .npy
    zipfile.BadZipFile,
)  # numpy's, too


@dataclass(frozen=True)
class SceneFiles:
    """What a scene's cloud is made of."""

    folder: Path  # scenes/scene_0000/realsense
    images: tuple[str, ...]  # stems of the depth images used, e.g. "0032"; empty: network_input.npz is used
    suffix: str  # "_gt" for rendered depth, "" for measured
    sha256: str  # hex over the bytes of every file used


@dataclass(frozen=True)
class Cloud:
    """Points of a scene in the table's frame."""

    points: np.ndarray  # [N, 3] float32
    labels: np.ndarray  # [N] int, 0 = no object
    normals: np.ndarray | None  # [N, 3] float32, unit length
    colors: np.ndarray | None  # [N, 3] uint8, where the scene has photographs


def find_scene(folder: Path) -> SceneFiles:
    """The files of a scene, hashed; `CorruptEpisode` as `scene_files`."""
    images, suffix, names = scene_files(folder)
    return SceneFiles(folder, images, suffix, _hash(folder, names))


def scene_files(folder: Path) -> tuple[tuple[str, ...], str, list[str]]:
    """(stems of the depth images used, their suffix, names of all files used) of a scene; `CorruptEpisode` (without the
    episode's name) when it has neither depth nor network input."""
    for suffix in ("_gt", ""):
        kinds = (f"depth{suffix}/*.png", f"label{suffix}/*.png", "meta/*.mat")
        stems = sorted(set.intersection(*({p.stem for p in folder.glob(kind)} for kind in kinds)))
        if stems:
            chosen = tuple(stems[i] for i in _evenly(len(stems)))
            names = [kind.replace("*", stem) for stem in chosen for kind in (*kinds, "rgb/*.png")]
            return chosen, suffix, ["camera_poses.npy", "cam0_wrt_table.npy", *names]
    if (folder / "network_input.npz").is_file():
        return (), "", ["network_input.npz"]
    raise CorruptEpisode(
        f"scenes/{folder.parent.name}/{folder.name} has neither depth, label and meta of any view nor a "
        f"network_input.npz"
    )


def read_cloud(files: SceneFiles) -> Cloud:
    """The cloud of a scene, one point per cube of SPACING. `CorruptEpisode` (without the episode's name) for damage."""
    parts = _from_depth(files) if files.images else _from_network_input(files.folder)

    def joined(name: str) -> np.ndarray | None:
        values = [getattr(p, name) for p in parts]
        return None if any(v is None for v in values) else np.concatenate(values)

    points, labels = np.concatenate([p.points for p in parts]), np.concatenate([p.labels for p in parts])
    normals, colors = joined("normals"), joined("colors")
    order: np.ndarray = np.arange(len(points))
    if normals is not None:  # of the points in a cube one that has a normal is kept, where there is one
        order = np.argsort(~normals.any(axis=1), kind="stable")
        normals = np.where(normals.any(axis=1, keepdims=True), normals, np.array([0, 0, 1], np.float32))
    kept = order[_one_per_cube(points[order], files.folder.parent.name)]
    return Cloud(
        points[kept], labels[kept], None if normals is None else normals[kept], None if colors is None else colors[kept]
    )


def _one_per_cube(points: np.ndarray, scene: str) -> np.ndarray:
    """Index of the first of the points in each cube of SPACING, in the order of cubes."""
    if not len(points):
        raise CorruptEpisode(f"{scene}: its depth images hold no point")
    if not (np.abs(points) < _FAR).all():
        raise CorruptEpisode(f"{scene}: a point is {np.abs(points).max():.3g} m away; check its camera poses")
    cells = np.floor(points / SPACING).astype(np.int64)
    cells -= cells.min(0)
    span = cells.max(0) + 1
    if span.max() >= 2**20:
        raise CorruptEpisode(f"{scene}: its points span {span.max() * SPACING:.0f} m")
    return np.unique((cells[:, 0] * span[1] + cells[:, 1]) * span[2] + cells[:, 2], return_index=True)[1]


def load_matrix(path: Path, several: bool = False) -> np.ndarray:
    """An .npy of one finite 4 × 4 matrix, or of `several`, as float64; else `CorruptEpisode`. Never unpickled."""
    try:
        # mapped: its header cannot promise more than there is
        stored = np.load(regular(path), mmap_mode="r", allow_pickle=False)
        values = stored.astype(np.float64, casting="same_kind")
    except (*_DAMAGE, AttributeError) as error:  # an .npz under that name is no array
        raise CorruptEpisode(f"{_short(path)} cannot be read ({first_line(error)})", "unreadable-file") from None
    if values.ndim != 2 + several or values.shape[-2:] != (4, 4) or not np.isfinite(values).all():
        expected = "[n, 4, 4]" if several else "[4, 4]"
        raise CorruptEpisode(f"{_short(path)} is {list(values.shape)}, or not finite; a finite {expected} is expected")
    return values


def load_arrays(path: Path, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Those of the arrays `names` (none: all) that an .npz has, never unpickled; `CorruptEpisode` when it cannot be
    read."""
    try:
        with open(open_regular(path), "rb") as file, zipfile.ZipFile(file) as archive:
            members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            wanted = [n for n in names or members if n in members]
            return {name: _member(archive, members[name]) for name in wanted}
    except _DAMAGE as error:
        raise CorruptEpisode(f"{_short(path)} cannot be read ({first_line(error)})", "unreadable-file") from None


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """One array of an .npz; `ValueError` where its header promises more than there is, or than is read at once."""
    with archive.open(entry) as file:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > min(entry.file_size, _MOST):
        raise ValueError(f"'{entry.filename}' claims {nbytes:,} bytes")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _from_depth(files: SceneFiles) -> list[Cloud]:
    poses = load_matrix(files.folder / "camera_poses.npy", several=True)
    table = load_matrix(files.folder / "cam0_wrt_table.npy")
    parts = []
    for stem in files.images:
        if not stem.isdigit() or int(stem) >= len(poses):
            raise CorruptEpisode(
                f"{files.folder.parent.name}: depth image {stem} has none of the {len(poses)} camera poses"
            )
        parts.append(_moved(_back_projected(files, stem), table @ poses[int(stem)]))
    return parts


def _back_projected(files: SceneFiles, stem: str) -> Cloud:
    """The points of one depth image in its camera's frame."""
    folder, suffix = files.folder, files.suffix
    depth = _image(folder / f"depth{suffix}" / f"{stem}.png", 2)
    labels = _image(folder / f"label{suffix}" / f"{stem}.png", 2)
    photo = folder / "rgb" / f"{stem}.png"
    colors = _image(photo, 3) if photo.is_file() else None
    if labels.shape != depth.shape or colors is not None and colors.shape[:2] != depth.shape:
        raise CorruptEpisode(f"{files.folder.parent.name}: depth, label and photograph {stem} differ in size")
    intrinsics, factor = _intrinsics(folder / "meta" / f"{stem}.mat")
    v, u = np.mgrid[0 : depth.shape[0] : _STRIDE, 0 : depth.shape[1] : _STRIDE]
    z = depth[::_STRIDE, ::_STRIDE] / factor
    grid = np.stack(
        [(u - intrinsics[0, 2]) * z / intrinsics[0, 0], (v - intrinsics[1, 2]) * z / intrinsics[1, 1], z], -1
    )
    seen = z > 0
    taken = None if colors is None else colors[::_STRIDE, ::_STRIDE][seen]
    return Cloud(grid[seen], labels[::_STRIDE, ::_STRIDE][seen].astype(np.int64), _normals(grid)[seen], taken)


def _normals(grid: np.ndarray) -> np.ndarray:
    """Unit normals of the surfaces on a grid [h, w, 3], from the neighbors; 0 at the rim of a surface."""
    down, right = np.gradient(grid, axis=0), np.gradient(grid, axis=1)
    normals = np.cross(right, down)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    inside = (length > 1e-12) & (np.maximum(np.abs(down[..., 2:]), np.abs(right[..., 2:])) < _RIM)
    return np.where(inside, normals / np.maximum(length, 1e-12), 0.0)


def _from_network_input(folder: Path) -> list[Cloud]:
    arrays = load_arrays(folder / "network_input.npz", ("pc", "seg", "extrinsics"))
    shapes = {n: a.shape for n, a in arrays.items()}
    views, count = shapes.get("pc", (0, 0))[:2]
    if (
        shapes != {"pc": (views, count, 3), "seg": (views, count), "extrinsics": (views, 4, 4)}
        or not views
        or not all(a.dtype.kind in "fiu" and np.isfinite(a).all() for a in arrays.values())
    ):
        raise CorruptEpisode(
            f"{_short(folder / 'network_input.npz')} holds {shapes}; finite pc [V, N, 3], seg [V, N] and "
            f"extrinsics [V, 4, 4] are expected"
        )
    return [
        _moved(Cloud(arrays["pc"][i], arrays["seg"][i].astype(np.int64), None, None), arrays["extrinsics"][i])
        for i in _evenly(views)
    ]


def _evenly(count: int) -> list[int]:
    """CLOUD_VIEWS of `count` views, or all."""
    return list(range(count)) if count <= CLOUD_VIEWS else [i * count // CLOUD_VIEWS for i in range(CLOUD_VIEWS)]


def _moved(cloud: Cloud, pose: np.ndarray) -> Cloud:
    with np.errstate(all="ignore"):  # a pose that makes no sense puts its points far away, where they are refused
        points = (cloud.points @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32)
        normals = None if cloud.normals is None else (cloud.normals @ pose[:3, :3].T).astype(np.float32)
    return Cloud(points, cloud.labels, normals, cloud.colors)


def _image(path: Path, dimensions: int) -> np.ndarray:
    try:
        with open(open_regular(path), "rb") as file, Image.open(file, formats=("PNG",)) as image:
            check_size(image.height, image.width, _short(path))
            values = np.asarray(image.convert("RGB") if dimensions == 3 else image)
    except _DAMAGE as error:
        raise CorruptEpisode(f"{_short(path)} cannot be decoded ({first_line(error)})", "unreadable-file") from None
    if values.ndim != dimensions or values.dtype.kind not in "iu":
        raise CorruptEpisode(f"{_short(path)} is {values.dtype} {list(values.shape)}, not an integer image")
    return values


def _intrinsics(path: Path) -> tuple[np.ndarray, float]:
    """(camera matrix [3, 3] in pixels, units of depth per m)."""
    try:
        found = read_matrices(_read(path))
        matrix, factor = found["intrinsic_matrix"], float(found["factor_depth"].reshape(-1)[0])
    except _DAMAGE as error:
        raise CorruptEpisode(f"{_short(path)} cannot be read ({first_line(error)})", "unreadable-file") from None
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not min(matrix[0, 0], matrix[1, 1], factor) > 0:
        raise CorruptEpisode(f"{_short(path)} holds no camera matrix and depth factor that can be used")
    return matrix, factor


def _hash(folder: Path, names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        try:
            data = _read(path) if path.is_file() or not name.startswith("rgb/") else b""
        except OSError as error:
            raise CorruptEpisode(
                f"{_short(path)} cannot be read ({error.strerror or error})", "unreadable-file"
            ) from None
        digest.update(f"{name}:{len(data)};".encode() + data)
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MOST:
            raise OSError(f"it is larger than {_MOST >> 20} MiB")
        return file.read()


def _short(path: Path) -> str:
    return "/".join(path.parts[-3:])
