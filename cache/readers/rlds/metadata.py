"""What a tfds folder with RLDS episodes says about itself: dataset_info.json (name, splits, shards) and features.json
(the features of a step, with shapes and types). No record is read here.

The layout is <name>/<version>/ (or <name>/<config>/<version>/) with the two JSON files and the shards side by side.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....common.documents import read_file, read_json
from ....errors import Note, UserError
from ..episode import CorruptEpisode
from ..location import Location, absence

DESCRIPTION = ("dataset_info.json", "features.json")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # tfds' own, where a split names none
_MAX_EPISODES = 2_000_000  # a list of ids is kept in memory; the largest corpora have a quarter of that
_MAX_SHARDS = 100_000
_MANY, _SMALLEST = 10_000, 16  # records of a shard that its size must allow for, and bytes of the smallest one
_MAX_NAME = 100  # characters
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Feature:
    """One feature of a step."""

    kind: str  # "tensor", "text", "image", or the class of a feature that is not read
    shape: tuple[int | None, ...]  # of one step; None = not fixed
    dtype: str  # as tfds names it: float32, int64, bool, string …
    encoding: str  # of a tensor: none, bytes or zlib; of an image: jpeg, png or "" (its bytes tell)

    @property
    def width(self) -> int | None:
        """Numbers of one step; None where the shape is not fixed."""
        return None if None in self.shape else math.prod(self.shape)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shard:
    """One TFRecord file as listed; whether it exists shows when it is read."""

    path: str  # relative to the folder
    first: int  # episode id of its first record
    length: int  # number of records, one episode each


class Metadata:
    """One dataset's description. `UserError` when the path holds none, or several, or it cannot be used."""

    def __init__(self, path_or_repo: str) -> None:
        """The folder of a version, one above it (the highest version is taken), or a hub id of either."""
        self._files = Location(path_or_repo, [f"*{name}" for name in DESCRIPTION])
        self._base = _choose(self._files.root, path_or_repo)
        self.root = self._files.root / self._base
        info, features = (_load(self.root / name) for name in DESCRIPTION)
        given = self.root.absolute()
        label = info.get("name") or (given.parent if _VERSION.fullmatch(given.name) else given).name
        self.name = re.sub(r"[^\w-]+", "_", str(label))[:_MAX_NAME]  # safe as a folder name
        # To find a config by.
        self.names = tuple(dict.fromkeys((self.name, given.name, given.parent.name, self._files.name)))
        self.features = dict(_flatten(_steps(features, self.root), ""))  # path below `steps` → feature
        self.every = {f"steps/{k}": f for k, f in self.features.items()}  # path in a record → feature
        with contextlib.suppress(UserError):  # what is beside the steps is not needed
            self.every |= dict(_flatten(_around(features), ""))
        self.shards = tuple(_shards(info, str(label), self.root / DESCRIPTION[0]))
        self._firsts = [s.first for s in self.shards]
        self._require_possible()

    def _require_possible(self) -> None:
        """`UserError` for a shard that is too small to hold what is listed: its episodes would be looked for one by
        one."""
        for shard in (s for s in self.shards if s.length > _MANY):
            with contextlib.suppress(OSError):
                size = (self.root / shard.path).stat().st_size
                if size < _SMALLEST * shard.length:
                    listed = f"lists {shard.length:,} records in {size:,} bytes of {shard.path}"
                    raise UserError(f"{self.root / DESCRIPTION[0]} {listed}; copy the dataset again")

    @property
    def revision_hash(self) -> str:
        """sha256 hex over the two files that describe the dataset."""
        digest = hashlib.sha256()
        for name in DESCRIPTION:
            data = read_file(self.root / name)
            digest.update(f"{name}:{len(data)};".encode() + data)
        return digest.hexdigest()

    @property
    def episodes(self) -> range:
        """Episode ids: a running number over splits and their shards as listed, by the listed number of records."""
        return range(self.shards[-1].first + self.shards[-1].length if self.shards else 0)

    def find(self, episode_id: int) -> tuple[Shard, int]:
        """The shard of a listed episode and the number of its record there."""
        shard = self.shards[bisect.bisect_right(self._firsts, episode_id) - 1]
        return shard, episode_id - shard.first

    def locate(self, shard: Shard, where: str) -> Path:
        """The shard's file, fetched when it is on the hub; `CorruptEpisode` when it is missing."""
        listed = (Path(self._base) / shard.path).as_posix()
        packed = f"{listed}.gz"
        try:
            found = packed if not self._files.hub_id and (self._files.root / packed).is_file() else listed
            return self._files.locate(listed if (self._files.root / listed).is_file() else found, where)
        except CorruptEpisode:
            share = "" if self._files.hub_id else f"; {self._here} of {len(self.shards)} shards are present"
            raise CorruptEpisode(f"{where}: shard {shard.path} is missing{share}", "missing-file") from None

    def present(self) -> list[Shard]:
        """The listed shards that are in the folder; all of them where it is on the hub."""
        if self._files.hub_id:
            return list(self.shards)
        sizes = {p.relative_to(self.root).as_posix(): p.stat().st_size for p in self.root.rglob("*") if p.is_file()}
        found = ((s, next((n for n in (s.path, f"{s.path}.gz") if n in sizes), "")) for s in self.shards)
        small = 1024  # bytes of a pointer to a file that was not fetched
        return [s for s, name in found if name and (sizes[name] > small or not absence(self.root / name))]

    @functools.cached_property
    def _here(self) -> int:
        return len(self.present())  # once: each episode that is not there says it

    def notes(self) -> tuple[Note, ...]:
        """How much of the dataset is here, where that is not all of it."""
        here = self.present()
        if len(here) == len(self.shards):
            return ()
        text = f"{sum(s.length for s in here)} of {len(self.episodes)} episodes present: {len(here)} of "
        return (Note("partly-present", f"{text}{len(self.shards)} shards; fetch the others from where these are from"),)


def is_rlds(names: Sequence[str]) -> bool:
    """Whether files of these names (relative) hold, in one folder, what describes a tfds dataset, or a part of that
    beside its shards: opening it says what is missing."""
    info, features, shards = (
        {n.rpartition("/")[0] for n in names if re.search(name, n.rpartition("/")[2])}
        for name in (rf"^{DESCRIPTION[0]}$", rf"^{DESCRIPTION[1]}$", r"\.tfrecord")
    )
    return bool(info & features or (info | features) & shards)


def _choose(root: Path, given: str) -> str:
    """Folder of the version to read, relative to `root`: itself, or the highest version of the one dataset in it."""
    found = {
        p.parent
        for depth in ("", "*/", "*/*/", "*/*/*/")
        for p in root.glob(depth + DESCRIPTION[0])
        if (p.parent / DESCRIPTION[1]).is_file()
    }
    if root in found:
        return "."
    versions = {p for p in found if _VERSION.fullmatch(p.name)}  # beside them: leftovers of interrupted conversions
    folders = versions or found
    if not folders:
        half = next((p for name in DESCRIPTION for p in sorted(root.rglob(name))), None)
        missing = next((name for name in DESCRIPTION if half and not (half.parent / name).is_file()), None)
        if half and missing:
            raise UserError(
                f"{given} holds no RLDS dataset that can be read: {missing} is missing beside {half.relative_to(root)} "
                "(tfds 4.5 or newer writes both); copy it from where the shards are from"
            )
        raise UserError(
            f"{given} holds no RLDS dataset: no folder in it has {' and '.join(DESCRIPTION)}; give the folder of a "
            "version, e.g. bridge_dataset/1.0.0"
        )
    if len({p.parent for p in folders}) > 1 or (len(folders) > 1 and not versions):
        listed = ", ".join(sorted(p.relative_to(root).as_posix() for p in folders)[:8])
        raise UserError(f"{given} holds {len(folders)} RLDS datasets; give one of them: {listed}")
    return max(folders, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)]).relative_to(root).as_posix()


def _load(path: Path) -> dict[str, Any]:
    return read_json(path, remedy="copy the dataset again")


def _shards(info: dict[str, Any], name: str, path: Path) -> Iterator[Shard]:
    """Every listed shard, splits and shards in the order of the file."""
    kind = info.get("fileFormat") or "tfrecord"
    if kind != "tfrecord":
        raise UserError(f"{path}: the shards are '{kind}' files, only tfrecord can be read; convert them with tfds")
    first = 0
    try:
        for split in info.get("splits") or ():
            lengths = [int(n) for n in split["shardLengths"]]
            if len(lengths) > _MAX_SHARDS:
                raise ValueError(f"{len(lengths):,} shards")
            digits = max(5, len(str(len(lengths))))
            for number, length in enumerate(lengths):
                index, count = f"{number:0{digits}}", f"{len(lengths):0{digits}}"
                known = {
                    "DATASET": name,
                    "SPLIT": split["name"],
                    "FILEFORMAT": kind,
                    "SHARD_INDEX": index,
                    "NUM_SHARDS": count,
                    "SHARD_X_OF_Y": f"{index}-of-{count}",
                }
                shard = re.sub(r"\{(\w*)\}", lambda found: known[found[1]], split.get("filepathTemplate") or _TEMPLATE)
                if Path(shard).is_absolute() or ".." in Path(shard).parts:
                    raise ValueError(f"'{shard[:80]}' leaves the folder")
                if max(map(len, Path(shard).parts), default=0) > 255:
                    raise ValueError(f"'{shard[:80]}…' is no name of a file")
                if not 0 <= length <= _MAX_EPISODES - first:
                    raise ValueError(f"'{shard}' with {length} records")
                yield Shard(shard, first, length)
                first += length
    except (KeyError, OverflowError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is not known" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path}: its splits cannot be read ({reason}); each has a name, shardLengths and a filepathTemplate of "
            "{DATASET}, {SPLIT}, {FILEFORMAT}, {SHARD_X_OF_Y}, {SHARD_INDEX}, {NUM_SHARDS}"
        ) from None


def _steps(features: dict[str, Any], root: Path) -> dict[str, Any]:
    """The features of a step in features.json."""
    try:
        steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]
        return {"featuresDict": {"features": dict(steps["featuresDict"]["features"])}}
    except (KeyError, OverflowError, TypeError, ValueError):
        raise UserError(
            f"{root / DESCRIPTION[1]} describes no episodes: RLDS has a dataset of features called 'steps', as "
            "tfds 4.5 or newer writes it"
        ) from None


def _around(features: dict[str, Any]) -> dict[str, Any]:
    """The features of a record beside its steps, such as episode_metadata."""
    beside = {k: v for k, v in features["featuresDict"]["features"].items() if k != "steps"}
    return {"featuresDict": {"features": beside}}


def _flatten(node: Any, path: str) -> Iterator[tuple[str, Feature]]:
    """(path, feature) of every leaf."""
    try:
        if "featuresDict" in node:
            for name, child in node["featuresDict"].get("features", {}).items():
                yield from _flatten(child, f"{path}/{name}" if path else name)
            return
        yield path, _leaf(node)
    except (KeyError, OverflowError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"features.json has a description of '{path}' that cannot be read") from None


def _leaf(node: dict[str, Any]) -> Feature:
    if "text" in node:
        return Feature("text", (), "string", "none")
    if "classLabel" in node:
        return Feature("tensor", (), "int64", "none")
    kind = next((k for k in ("tensor", "image", "boundingBox") if k in node), None)
    if kind is None:
        return Feature(str(node.get("pythonClassName", "unknown")).rpartition(".")[2], (), "", "")
    content = node[kind]
    sizes = [int(n) for n in (content.get("shape") or {}).get("dimensions", ())]
    shape = tuple(None if n < 0 else n for n in sizes)
    dtype = str(content.get("dtype") or ("uint8" if kind == "image" else "float32"))
    if kind == "image":
        return Feature("image", shape, dtype, str(content.get("encodingFormat") or ""))
    if dtype in ("string", "object"):
        return Feature("text" if shape == () else "string tensor", shape, "string", "none")
    return Feature("tensor", shape, dtype, str(content.get("encoding") or "none").lower())
