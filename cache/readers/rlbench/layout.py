"""Where RLBench episodes are: in a folder, in zips and tars in it, in one zip or tar, here or on the hub.

An episode's path is the same packed and unpacked ("train/close_jar/all_variations/episodes/episode7"); its camera
folders are known as soon as it is found, its files only when they are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....errors import UserError
from ..archive import COMPRESSED, SUFFIXES, Archive, open_archive
from ..location import Location

LOW_DIM, TEXTS = "low_dim_obs.pkl", "variation_descriptions.pkl"
TASKS = (  # PerAct's 18
    "close_jar", "insert_onto_square_peg", "light_bulb_in", "meat_off_grill", "open_drawer", "place_cups",
    "place_shape_in_shape_sorter", "place_wine_at_rack_location", "push_buttons", "put_groceries_in_cupboard",
    "put_item_in_drawer", "put_money_in_safe", "reach_and_drag", "slide_block_to_color_target", "stack_blocks",
    "stack_cups", "sweep_to_dustpan_of_size", "turn_tap",
)  # fmt: skip

_WANTED = r"(_rgb/[^/]*\.png|low_dim_obs\.pkl|variation_descriptions\.pkl)$"  # of the members of a zip or tar
_PATTERNS = ("*.zip", "*.tar", "*_rgb/*.png", f"*{LOW_DIM}", f"*{TEXTS}")  # what is fetched from the hub
_SIGNS = re.compile(r"(^|/)(low_dim_obs\.pkl|all_variations|variation\d+/episodes)(/|$)")
_SPLITS = ("train", "val", "valid", "validation", "test")
_COMMON = re.compile(
    rf"data|{'|'.join(_SPLITS)}|all_variations|variation\d+|episodes|episode\d+"
)  # names of parts of datasets
_EPISODE = re.compile(r"episode[0-9]+/")
_SKIPPED = re.compile(r"\..*|__MACOSX/|.*_(rgb|depth|mask)/")  # never looked into for episodes
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+(?:/[\w.-]+)*)/([\w.-]+\.(?:zip|tar))(@[\w./-]+)?", re.IGNORECASE)
_MAX_DEPTH = 8  # folders between the given one and an episode


@dataclass(frozen=True)
class Place:
    """Where one episode is."""

    archive: Archive
    folder: str  # in the archive, e.g. "close_jar/all_variations/episodes/episode7"; "" is its top
    path: str  # the same packed and unpacked: "train/close_jar/all_variations/episodes/episode7"
    label: str  # of the archive, in messages: "train/close_jar.zip"; "" for the given folder
    cameras: tuple[str, ...]  # those with a folder of images
    damage: str = ""  # why nothing of the archive can be read: it counts as one episode

    def member(self, name: str) -> str:
        """Name in the archive of something in the episode's folder."""
        return f"{self.folder}/{name}" if self.folder else name

    def spot(self, where: str) -> str:
        """How messages begin about a member of the archive."""
        return f"{where}: {self.label}" if self.label else where


def locate(given: str) -> tuple[Path, list[str]]:
    """The local path (fetched from the hub where needed) and what the dataset goes by: its name and those of up to
    three folders around it, innermost first. `UserError` when there is no such path or hub file."""
    found = None if Path(given).expanduser().exists() else _HUB_FILE.fullmatch(given)
    if found:
        location = Location(found[1] + (found[3] or ""), (found[2],))
        path, known = location.root / found[2], f"{location.hub_id}/{found[2]}"
        if not path.is_file():
            raise UserError(f"'{location.hub_id}' on the hub has no file {found[2]}")
    else:
        location = Location(given, _PATTERNS)
        path, known = location.root, location.hub_id or os.path.abspath(location.root)
    names = [n for n in reversed(known.split("/")) if n][:4] or ["rlbench"]
    if path.is_file():
        names[0] = Path(names[0]).stem
    return path, names


def dataset_name(names: Sequence[str]) -> str:
    """The dataset's name, safe for a folder: "close_jar", but "rlbench_train" for rlbench/train."""
    parts = list(names[:1])
    for outer in names[1:]:
        if not (_COMMON.fullmatch(parts[0]) or _COMMON.fullmatch(outer)):
            break
        parts.insert(0, outer)
    return re.sub(r"[^\w.-]+", "_", "_".join(parts))


def find_episodes(path: Path) -> list[Place]:
    """Every episode folder in a folder, .zip or .tar, and in the zips and tars in that folder, in the natural order of
    their paths; an archive that cannot be read or is refused is one, with its `damage`. `UserError` when none can be
    read, or an episode appears twice."""
    places = sorted(_all_episodes(path), key=lambda p: _natural(p.path))
    if places and all(p.damage for p in places):
        raise UserError(places[0].damage)
    for one, other in zip(places, places[1:]):
        if one.path == other.path:
            raise UserError(
                f"{one.path} appears twice, in {one.archive.path} and {other.archive.path}; move one of them away"
            )
    return places


def looks_like_rlbench(names: Sequence[str], root: Path | None) -> bool:
    """By `low_dim_obs.pkl` or the folders around it, zips named like PerAct's tasks, or what the first zip holds."""
    packed = [n for n in names if n.lower().endswith(SUFFIXES) and not n.lower().endswith(".zarr.zip")]
    if any(_SIGNS.search(n) for n in names) or any(Path(n).stem in TASKS for n in packed):
        return True
    if root is None:
        return False
    tasks = (n for n in names if n.count("/") == 2 and n.split("/")[1] in _SPLITS)  # data/train/close_jar
    if any((root / n / "all_variations").is_dir() for n in tasks):
        return True
    try:
        return bool(packed) and next(_all_episodes(root / packed[0]), None) is not None
    except UserError:
        return len(names) == 1  # a file that cannot be read, and all there is: opening it says why


def _all_episodes(path: Path) -> Iterator[Place]:
    archive = open_archive(path, _WANTED)
    if path.is_file():
        yield from _walk(archive, "", path.stem, path.name)
    elif LOW_DIM in archive.entries():
        yield _place(archive, "", path.name, "")  # the folder of one episode was given
    else:
        yield from _walk(archive, "", "", "")


def _walk(archive: Archive, folder: str, outside: str, label: str, depth: int = 0) -> Iterator[Place]:
    """Episodes below `folder` of an archive; `outside` is the path of the archive's top when it were unpacked."""
    for entry in archive.entries(folder):
        inside = f"{folder}/{entry}".strip("/")
        if _EPISODE.fullmatch(entry):
            parent = outside.rpartition("/")[0] if inside.startswith(f"{Path(outside).name}/") else outside
            yield _place(archive, inside, f"{parent}/{inside}", label)  # close_jar.zip may hold close_jar/ or not
        elif _SKIPPED.fullmatch(entry):
            continue
        elif entry.endswith("/"):
            if depth < _MAX_DEPTH:
                yield from _walk(archive, inside, outside, label, depth + 1)
        elif not label and (entry.lower().endswith(SUFFIXES) or COMPRESSED.search(entry)):
            unpacked = inside.rpartition(".")[0]
            try:
                packed = open_archive(archive.path / inside, _WANTED)
                packed.entries()
            except UserError as error:
                yield Place(archive, inside, unpacked, inside, (), str(error))
            else:
                yield from _walk(packed, "", unpacked, inside)


def _place(archive: Archive, folder: str, path: str, label: str) -> Place:
    cameras = (e.removesuffix("_rgb/") for e in archive.entries(folder) if e.endswith("_rgb/"))
    return Place(archive, folder, path.strip("/"), label, tuple(cameras))


def _natural(path: str) -> list[list[str | int]]:
    """Sort key in which episode2 comes before episode10."""
    return [
        [int(p) if i % 2 else p for i, p in enumerate(re.split(r"([0-9]{1,18})", part))] for part in path.split("/")
    ]
