"""Which demonstrations of datasets are used: the grammar of `--include-episodes` and its relatives.

0-9,17,30-            ids and ranges, both ends included; of the only dataset
push=0-9              the same, of one of several datasets
[0, 1, "5-9"]         a JSON list, here or in a file
{"push": [0, "5-9"]}  in a JSON file: by dataset
{"3": [[0, 50]]}      in a JSON file: frames to keep, by episode, as ranges [first, end); the file of openpi's DROID
                      filter, whose keys are "<recording folder>--<file>" in place of ids
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ...common.config import Option
from ...common.documents import json_value, read_file
from ...errors import UserError, unknown

INCLUDE, EXCLUDE = "--include-episodes", "--exclude-episodes"
PIN = "#sha256="  # between a file's name and its content, where a selection is stored
GRAMMAR = "give ids and ranges such as 0-9,17,30-, or a .json file"
Ranges = tuple[tuple[int, int | None], ...]  # (first, last) of episodes, last included; None: to the end
Frames = Mapping[
    str, tuple[tuple[int, int], ...]
]  # episode (its id, or the key of its recording) → frames [first, end)


@dataclass(frozen=True)
class Choice:
    """What is used of one dataset."""

    include: Ranges | None = None  # None: all
    exclude: Ranges = ()
    frames: Frames | None = None  # frames to train on; an episode without any is left out. None: all
    success_only: bool = False
    drop_idle: bool = False

    def __bool__(self) -> bool:
        return self != Choice()

    def document(self) -> dict[str, Any]:
        """What a cache's fingerprint holds of it: what was asked for, and no more."""
        found = {
            "include": None if self.include is None else as_text(self.include),
            "exclude": as_text(self.exclude),
            "frames": None if self.frames is None else {k: [list(r) for r in v] for k, v in self.frames.items()},
            "success_only": self.success_only,
            "drop_idle": self.drop_idle,
        }
        return {name: value for name, value in found.items() if value}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Choice:
        """Inverse of `document`, also after a round trip through JSON."""
        include, frames = document.get("include"), document.get("frames")
        return cls(
            None if include is None else parse(include, INCLUDE),
            parse(document["exclude"], EXCLUDE) if document.get("exclude") else (),
            None if frames is None else {k: tuple((a, b) for a, b in v) for k, v in frames.items()},
            document.get("success_only", False),
            document.get("drop_idle", False),
        )

    def __str__(self) -> str:
        """As its options would be typed."""
        words = []
        if self.include is not None:
            words.append(f"{INCLUDE} {_short(as_text(self.include))}")
        if self.frames is not None:
            words.append(f"{INCLUDE} (frames of {len(self.frames)} episodes)")
        if self.exclude:
            words.append(f"{EXCLUDE} {_short(as_text(self.exclude))}")
        flags = {"--success-only": self.success_only, "--drop-idle": self.drop_idle}
        return " ".join([*words, *(name for name, given in flags.items() if given)])

    def numbered(self, listed: Sequence[int], name: str, key_of: Callable[[int], object] | None) -> Choice:
        """The same with the frames of every episode by its id; `key_of`: the key of an episode's recording, if any."""
        if self.frames is None:
            return self
        if all(re.fullmatch(r"[0-9]{1,18}", key) for key in self.frames):
            return dataclasses.replace(self, frames={str(int(key)): ranges for key, ranges in self.frames.items()})
        if key_of is None:
            raise UserError(
                f"{INCLUDE}: the file names episodes of {name} by their recording; a cache knows ids alone: give it to "
                "`dvla cache build`"
            )
        keys = ((number, key_of(number)) for number in listed)
        frames = {str(number): self.frames[key] for number, key in keys if isinstance(key, str) and key in self.frames}
        if not frames:
            example = next(iter(self.frames))
            raise UserError(f"{INCLUDE}: no episode of {name} is among those of the file (its first is {example[:60]})")
        return dataclasses.replace(self, frames=frames)

    def episodes(self, listed: Sequence[int], name: str) -> list[int]:
        """Those of `listed` (ascending) that are used, whatever became of them. `UserError` for an id that is not
        listed, one that is included and excluded, or where none is left."""
        included = set(listed if self.include is None else _expand(self.include, listed, name, INCLUDE))
        if self.frames is not None:
            _expand([(int(key), int(key)) for key in self.frames], listed, name, INCLUDE)
            included &= {int(key) for key, ranges in self.frames.items() if ranges}
        excluded = set(_expand(self.exclude, listed, name, EXCLUDE))
        both = sorted(included & excluded)
        if both and (self.include is not None or self.frames is not None):
            raise UserError(f"{INCLUDE} and {EXCLUDE} both name episode {both[0]} of {name}; name it in one of them")
        left = sorted(included - excluded)
        if not left:
            raise UserError(f"no episode of {name} is left by {self}; choose some of its {len(listed)}")
        return left

    def require_frames(self, number: int, length: int, name: str) -> None:
        """`UserError` for frames to keep beyond the end of an episode of `length` frames."""
        for first, end in (self.frames or {}).get(str(number), ()):
            if end > length:
                raise UserError(
                    f"{INCLUDE}: frames [{first}, {end}) of episode {number} of {name}, which has {length} frames; is "
                    "the file made for another version of the dataset?"
                )


@dataclass(frozen=True)
class Selection:
    """Which demonstrations are used, as options give it."""

    include: Annotated[
        tuple[str, ...],
        Option(
            INCLUDE,
            help="Episodes to use: ids and ranges such as 0-9,17,30-; NAME=0-9 for one of several datasets; or a JSON "
            "file of them, or of frames to keep. May be given several times. Default: all.",
        ),
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Option(EXCLUDE, help="Episodes to leave out, written like those of --include-episodes.")
    ] = ()
    success_only: Annotated[
        bool, Option("--success-only", help="Leave out demonstrations that the data marks as failed.")
    ] = False
    drop_idle: Annotated[
        bool,
        Option("--drop-idle", help="Do not train on frames of pauses: half a second or more without motion."),
    ] = False

    def __bool__(self) -> bool:
        return self != Selection()

    def pinned(self) -> Selection:
        """The same with the checksum of every file's content beside its name, to store it."""
        return dataclasses.replace(self, include=tuple(map(_pin, self.include)), exclude=tuple(map(_pin, self.exclude)))

    def by_dataset(self, names: Sequence[str]) -> dict[str, Choice]:
        """What is used of each of the datasets. `UserError` for what is not of the grammar, or of another dataset."""
        include, frames = _by_dataset(self.include, names, INCLUDE)
        exclude, no_frames = _by_dataset(self.exclude, names, EXCLUDE)
        if no_frames:
            raise UserError(f"{EXCLUDE}: the file lists frames to keep; give it to {INCLUDE}")
        for name in include.keys() & frames.keys():
            raise UserError(f"{INCLUDE}: both frames and episodes of {name} are given; give one of them")
        return {
            name: Choice(include.get(name), exclude.get(name, ()), frames.get(name), self.success_only, self.drop_idle)
            for name in names
        }


def parse(text: str, option: str) -> Ranges:
    """`"0-9,17,30-"` → ((0, 9), (17, 17), (30, None)). `UserError` for anything else."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(-\s*([0-9]{1,18})?\s*)?", part)
        if not match:
            raise UserError(f"{option} {_short(text)}: '{_short(part.strip())}' is no id and no range; {GRAMMAR}")
        first, last = int(match[1]), int(match[3]) if match[3] else None if match[2] else int(match[1])
        if last is not None and last < first:
            raise UserError(f"{option} {_short(text)}: the range {part.strip()} is reversed; write {last}-{first}")
        found.append((first, last))
    return tuple(found)


def as_text(ranges: Ranges) -> str:
    """Inverse of `parse`, shortest form: sorted, joined where they touch."""
    joined: list[tuple[int, int | None]] = []
    for first, last in sorted(ranges, key=lambda r: r[0]):
        before = joined[-1][1] if joined else -2
        if before is None:
            break
        if joined and first <= before + 1:
            joined[-1] = joined[-1][0], None if last is None else max(before, last)
        else:
            joined.append((first, last))
    return ",".join(f"{a}-" if b is None else str(a) if a == b else f"{a}-{b}" for a, b in joined)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 2]} …"


def _shown(value: Any) -> str:
    """A JSON value in a message."""
    try:
        return _short(json.dumps(value))
    except RecursionError:
        return "[[…"


def _expand(ranges: Iterable[tuple[int, int | None]], listed: Sequence[int], name: str, option: str) -> list[int]:
    """The episodes of `listed` (ascending) in the ranges."""
    found: list[int] = []
    for first, last in ranges:
        begin = bisect.bisect_left(listed, first)
        end = len(listed) if last is None else bisect.bisect_right(listed, last)
        missing = last if last is not None and listed and last > listed[-1] else first if begin >= end else None
        if missing is not None:
            known = f"{len(listed)}, {listed[0]} to {listed[-1]}" if listed else "none"
            raise UserError(f"{option}: {name} has no episode {missing}; it has {known}")
        found += listed[begin:end]
    return found


# --- what an option may be --------------------------------------------------------------------------------------------


def _by_dataset(given: Sequence[str], names: Sequence[str], option: str) -> tuple[dict[str, Ranges], dict[str, Frames]]:
    """(episodes, frames) by dataset."""
    episodes: dict[str, Ranges] = {}
    frames: dict[str, Frames] = {}
    for item in given:
        found, kept = _parsed(item, names, option)
        for name, ranges in found.items():
            episodes[name] = episodes.get(name, ()) + ranges
        for name in kept:
            if name in frames:
                raise UserError(f"{option}: frames of {name} are given twice; give one file")
        frames |= kept
    return episodes, frames


def _parsed(item: str, names: Sequence[str], option: str) -> tuple[dict[str, Ranges], dict[str, Frames]]:
    if item.lstrip().startswith(("[", "{")):
        return _document(_loaded(item, f"{option} {_short(item)}"), names, option, item)
    file, pin, digest = item.partition(PIN)
    name, equals, rest = file.partition("=")
    if equals and not _exists(file):
        if name not in names:
            raise unknown(f"dataset in {option}", name, names)
        return _parsed(rest + pin + digest, [name], option)
    if _is_file(file):
        return _document(_content(file, digest, option), names, option, file)
    return {_only(names, option, item): parse(item, option)}, {}


def _document(
    document: Any, names: Sequence[str], option: str, item: str
) -> tuple[dict[str, Ranges], dict[str, Frames]]:
    """What a JSON document says."""
    where = f"{option} {_short(item)}"
    if isinstance(document, list):
        return {_only(names, option, item): _listed(document, where, option)}, {}
    if not isinstance(document, dict) or not document:
        raise UserError(f"{where}: expected a list of ids and ranges, or an object of them by dataset")
    episodes: dict[str, Ranges] = {}
    frames: dict[str, Frames] = {}
    if all(isinstance(value, list) and all(map(_is_pair, value)) for value in document.values()) and not (
        document.keys() <= set(names)
    ):
        return {}, {_only(names, option, item): {k: _frames(v, k, where) for k, v in document.items()}}
    for name, value in document.items():
        if name not in names:
            raise UserError(f"{where}: {unknown('dataset', name, names)}")
        if isinstance(value, dict):
            frames[name] = {key: _frames(ranges, key, where) for key, ranges in value.items()}
        else:
            episodes[name] = _listed(value, where, option)
    return episodes, frames


def _listed(values: Any, where: str, option: str) -> Ranges:
    """The episodes of a JSON list of ids and ranges."""
    if not isinstance(values, list):
        raise UserError(f"{where}: expected a list of ids and ranges, got {_short(json.dumps(values))}")
    found: list[tuple[int, int | None]] = []
    for value in values:
        if isinstance(value, str):
            found += parse(value, option)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            found.append((value, value))
        else:
            raise UserError(f'{where}: {_shown(value)} is no id and no range; write 5, or "5-9"')
    if not found:
        raise UserError(f"{where}: an empty list leaves nothing; name at least one episode")
    return tuple(found)


def _frames(values: Any, key: str, where: str) -> tuple[tuple[int, int], ...]:
    """The frames of one episode that are kept."""
    found = []
    for pair in values if isinstance(values, list) else [values]:
        if not _is_pair(pair) or not 0 <= pair[0] < pair[1]:
            raise UserError(
                f"{where}: frames {_shown(pair)} of episode '{_short(key)}' are no range; write "
                "[first, end] with 0 <= first < end"
            )
        found.append((pair[0], pair[1]))
    return tuple(found)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    )


def _only(names: Sequence[str], option: str, item: str) -> str:
    """The dataset that episodes without a name belong to."""
    if len(names) != 1:
        raise UserError(
            f"{option} {_short(item)}: there are {len(names)} datasets; say of which, e.g. {names[0]}={_short(item)}"
        )
    return names[0]


# --- files ------------------------------------------------------------------------------------------------------------


def _is_file(item: str) -> bool:
    return item.endswith(".json")


def _exists(item: str) -> bool:
    """Whether it is the name of a file that is there; one may hold "="."""
    return _is_file(item) and Path(item).expanduser().is_file()


def _pin(item: str) -> str:
    file = item if _exists(item) else item.rpartition("=")[2]
    if PIN in item or not _is_file(file):
        return item
    return f"{item}{PIN}{hashlib.sha256(_bytes(file, INCLUDE)).hexdigest()}"


def _bytes(file: str, option: str) -> bytes:
    try:
        return read_file(Path(file).expanduser())
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _content(file: str, digest: str, option: str) -> Any:
    """The JSON document in a file; `UserError` where it is none, or has changed since its checksum was stored."""
    data = _bytes(file, option)
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"{option} {file}: it has changed since the run began; restore it, or choose another --out")
    try:
        return _loaded(data.decode("utf-8-sig"), f"{option} {file}")
    except UnicodeDecodeError:
        raise UserError(f"{option} {file}: this is not JSON; {GRAMMAR}") from None


def _loaded(text: str, where: str) -> Any:
    try:
        return json_value(text)
    except ValueError as error:
        raise UserError(f"{where}: this is not JSON ({error}); {GRAMMAR}") from None
