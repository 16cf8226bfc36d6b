"""DexWild's HDF5 files (one per task, many episodes in each) as episodes.

What is read, below the folder given (or in the one file given):

    <task>_data/robot/robot_<task>_data.hdf5      any *.hdf5 or *.h5; tasks clothes, florist, pour, spray, toy
      ep_0000/                                    one group an episode
        right_arm_eef/right_arm_eef      [N, 1+7]     time, x y z (m), quaternion x y z w: the measured wrist
        right_leapv2/right_leapv2        [N, 1+17]    time, joint commands (rad) of the LEAP v2 hand
        right_leapv1/right_leapv1        [N, 1+16]    time, joint commands (rad) of a LEAP v1 hand; pour and spray only
        right_tracker/right_tracker_world_clipped_abs [N, 1+7]   human files: the wrist; several in one group
        right_thumb_cam/1744428163583061504.jpg       a dataset per image: uint8 [H, W, 3] RGB, or a JPEG file's bytes
        language/language                scalar text, where somebody added one

Column "right_arm_eef" of a dataset config is right_arm_eef/right_arm_eef without its time;
"right_tracker/zed_right_tracker" names an array whose name differs from its group's. Times and image names are
nanoseconds of one clock, but streams start, stop and lose rows by themselves (e.g. 365 images, 394 wrist poses, 395
hand commands): the frames of an episode are the images of the first view, and each takes the row (and the other views'
image) nearest in time.

Learnt from the project's code (kywch/dexwild: README, synchronize_data.py, dataset_to_robobuf.py: streams, units,
order, times) and from listings of robot_{clothes,pour,spray,toy} and human_clothes that users of boardd/dexwild-dataset
published (groups, shapes, dtypes, names). Nothing was verified on real bytes here; least certain are that the arrays
called .jpg are RGB, as their readers take them, and images as JPEG bytes, which those listings do not show. On the hub
each file is split into pieces of a tar archive: join and unpack them first.

Episode ids count the groups, by number, through the files, by name; a file that cannot be read counts as one episode,
which is refused. Letters: T frames of the episode, N rows of a stream, H × W image size.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from ....errors import Note, UserError, unknown
from ..base import Source, choose_views, common, listing_hash, look_around, rare_cameras
from ..config import DatasetConfig
from ..episode import CorruptEpisode, View
from ..hdf5 import SUFFIXES, find, find_array, opened, readable_group, success_of, text
from ..location import Location
from ..search import Files, choose_config
from ..tables import EpisodeTable, Rows
from .streams import Alignment, align, is_camera, read_images, read_stream, view_of

TASKS = {  # task in a file's name → our wording of it, since the files hold no text
    "clothes": "fold the clothes",
    "florist": "put the flowers into the vase",
    "pour": "pour the liquid into the cup",
    "spray": "spray the cloth with the spray bottle",
    "toy": "put the toy into the box",
}
_EPISODE = re.compile(r"ep_?(\d+)")
_FILE = re.compile(r"(?:robot|human)_([A-Za-z]+)_data.*")
_SURVEYED = 5  # episodes looked into when a dataset is opened


class DexWildSource(Source):
    """DexWild's files of one folder, or one of them."""

    format = "dexwild"

    def __init__(self, path_or_repo: str, config: DatasetConfig | None = None) -> None:
        """A folder, an HDF5 file or a hub id. `UserError` when there is no HDF5 file with episodes, or the config asks
        for streams, widths or views that the first episodes do not have."""
        location = Location(path_or_repo, ("*.hdf5", "*.h5"))
        one_file = location.root.is_file()
        self._root = location.root.parent if one_file else location.root
        self._paths = [location.root] if one_file else sorted(p for p in self._root.rglob("*") if p.suffix in SUFFIXES)
        if not self._paths:
            raise UserError(
                f"{path_or_repo} holds no .hdf5 file; DexWild's are published as pieces of tar archives: join and "
                f"unpack them (cat *.part_* | tar x) and give the folder with the .hdf5"
            )
        entries = [(path, name) for path in self._paths for name in _listed(path)]
        if all(name is None for _, name in entries):
            raise UserError(
                f"{path_or_repo}: no HDF5 file here can be read and holds groups ep_0000, ep_0001, …; download it "
                f"again, or give another folder"
            )
        self._episodes = dict(enumerate(entries))
        name = location.root.stem if one_file else location.name
        names = (name, location.hub_id or "", *(p.stem for p in self._paths))
        config = choose_config(config, self.format, Files(names, location.root, lambda: self._columns(name)))
        widths, cameras = self._survey(config, name)
        super().__init__(
            self._root,
            name,
            config,
            view_names=choose_views(sorted(cameras), config, name),
            episode_ids=tuple(self._episodes),
            widths=widths,
        )

    @classmethod
    def matches(cls, names: Sequence[str], root: Path | None) -> bool:
        """By the groups ep_<number> in a file; by names like robot_<task>_data.hdf5 where only names are known."""
        files = [n for n in names if n.endswith(SUFFIXES)]
        if root is None:
            return any(_FILE.fullmatch(Path(n).stem) for n in files)
        return any(_listed(root / n) != [None] for n in files[:4])

    @functools.cached_property
    def revision_hash(self) -> str:
        """sha256 hex over the names and sizes of the HDF5 files."""
        return listing_hash(self._root, self._paths)

    def notes(self) -> tuple[Note, ...]:
        """As in `Source`: cameras of few episodes."""
        return self._rare

    def length_of(self, episode_id: int) -> int:
        """Number of frames T: the first view's images that are left after alignment."""
        with self._open(episode_id) as (group, where):
            return len(self._align(group, where).times)

    def instruction_of(self, episode_id: int) -> str:
        """The episode's own text, else our wording of its file's task (TASKS), else the config's."""
        with self._open(episode_id) as (group, where):
            return self._instruction(group, self._episodes[episode_id][0], where)

    def success_of(self, episode_id: int) -> bool | None:
        """By an attribute or a dataset of the episode's group."""
        with self._open(episode_id) as (group, where):
            return success_of(group, where)

    def _rows(self, episode_id: int, columns: Sequence[str], where: str) -> Rows:
        with self._open(episode_id) as (group, place):
            found = self._align(group, place)
            return Rows(found.columns, self._instruction(group, self._episodes[episode_id][0], place), found.times)

    def _files(self, episode_id: int, view: str, where: str) -> Sequence[Path]:
        return (self._episodes[episode_id][0],)

    def _views(self, episode_id: int, names: Sequence[str], table: EpisodeTable, where: str) -> list[View]:
        with self._open(episode_id) as (group, place):
            images = self._align(group, place).images
            return [
                view_of(group, name, images[name], functools.partial(self._decode, episode_id, name), place)
                for name in names
            ]

    def _decode(self, episode_id: int, view: str, size: tuple[int, int], start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield uint8 [H, W, 3] of frames start..stop-1. The episode is aligned again: a source keeps no names."""
        with self._open(episode_id) as (group, place):
            yield from read_images(group, self._align(group, place).images[view][start:stop], size, place)

    @contextlib.contextmanager
    def _open(self, episode_id: int) -> Iterator[tuple[h5py.Group, str]]:
        """The episode's group, open inside the block, and how messages about it begin."""
        where = self.where(episode_id)
        path, name = self._episodes[episode_id]
        with opened(path, where) as file:
            if name is None:
                raise CorruptEpisode(f"{where}: {path.name} holds no group ep_0000, ep_0001, …")
            yield readable_group(file, name, where), f"{where} ({path.name} {name})"

    def _columns(self, dataset: str) -> dict[str, int]:
        """Numbers per row of each stream of the first readable episode, its time left out."""
        widths: dict[str, int] = {}
        for path, name in ((p, n) for p, n in self._episodes.values() if n and not widths):
            with contextlib.suppress(CorruptEpisode), opened(path, dataset) as file:
                group = readable_group(file, name, dataset)
                for stream in (s for s in group if s != "language" and not is_camera(group, s)):
                    with contextlib.suppress(CorruptEpisode):
                        widths[stream] = read_stream(group, stream, dataset).shape[1] - 1
        return widths

    def _survey(self, config: DatasetConfig, dataset: str) -> tuple[dict[str, int], set[str]]:
        """Width of each column the config asks for, and names of the cameras, of half of the episodes looked at."""
        wanted = config.columns
        streams: set[str] = set()

        def look(number: int) -> tuple[dict[str, int], list[str]] | None:
            path, name = self._episodes[number]
            if name is None:
                return None
            with opened(path, dataset) as file:
                group = readable_group(file, name, dataset)
                cameras = [n for n in group if is_camera(group, n)]
                streams.update(set(group) - set(cameras))
                return {c: read_stream(group, c, dataset).shape[1] - 1 for c in wanted if c in group}, cameras

        found, refused = look_around(look, tuple(self._episodes), _SURVEYED)
        if not found:
            raise UserError(f"{dataset}: no episode can be read: {refused[0]}")
        widths = {c: n for seen, _ in found for c, n in seen.items()}
        widths |= dict(common([seen.items() for seen, _ in found]))
        cameras = set(common([names for _, names in found]))
        self._rare = () if config.views else rare_cameras([names for _, names in found])
        for column in (c for c in wanted if c not in widths):
            raise UserError(
                f"{dataset}: {unknown('stream', column, streams)}; dataset config '{config.name}' asks for it"
            )
        return widths, cameras

    def _remedy(self, columns: Sequence[str]) -> str:
        if not any("leapv2" in c for c in columns):
            return super()._remedy(columns)
        return (
            "LEAP v2 has 17 joints, a single hand has 16 finger slots: say what becomes of the 17th (the bend of the "
            "palm), e.g. 'drop: 1' in the field map after 16 finger joints"
        )

    def _align(self, group: h5py.Group, where: str) -> Alignment:
        return align(group, self.view_names, self.config.columns, 0.5 / self.fps, where)

    def _instruction(self, group: h5py.Group, path: Path, where: str) -> str:
        if "language" in group:
            name = "language/language" if isinstance(find(group, "language", where), h5py.Group) else "language"
            return text(find_array(group, name, where)[()], f"{where}: '{name}'").strip() or self.config.instruction
        task = _FILE.fullmatch(path.stem)
        return TASKS.get(task[1] if task else "", self.config.instruction)


def _listed(path: Path) -> list[str | None]:
    """Names of the episodes in a file, by number; [None] when there is none or the file cannot be read."""
    try:
        with opened(path, path.name) as file:
            numbered = [(int(found[1]), name) for name in file if (found := _EPISODE.fullmatch(name))]
    except CorruptEpisode:
        return [None]
    return [name for _, name in sorted(numbered)] or [None]
