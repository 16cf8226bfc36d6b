"""What a dataset is: `dvla data list` and `dvla data show`. Reads metadata and tables; images only of one episode."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.actions.action_map import ActionMap
from ...cache.actions.slots import SLOTS, unit_of
from ...cache.readers import Source, detect_format, open_source
from ...cache.readers.episode import CorruptEpisode, Episode
from ...cache.readers.lerobot.documents import flat_names
from ...cache.readers.location import leads_down
from ...cache.readers.search import SAMPLED, NoConfig
from ...common.progress import Progress
from ...errors import Failed, UserError

if TYPE_CHECKING:
    from ...cache.readers.lerobot.metadata import Metadata


DEPTH = 4  # levels of folders that are searched for datasets
INSTRUCTION_SAMPLE = 2000  # episodes whose instructions are read where each has to be opened for it


@dataclass(frozen=True)
class Summary:
    """One dataset in a few words; None stands for what is unknown."""

    path: str  # as given or found
    name: str
    format: str  # a key of FORMATS
    version: str | None  # of the format, where it has one
    episodes: int  # listed
    frames: int | None  # in all of them; None where one cannot be read
    hz: float  # rows per second, by the files
    cameras: Mapping[str, tuple[int, int] | None]  # short name → (H, W)
    source: Source  # opened with the dataset config that fits, else without one
    meta: Metadata | None = None  # of a LeRobot dataset

    @property
    def family(self) -> str | None:
        """The dataset config; None: none describes it."""
        return self.source.config.name if self.source.config.mapped else None


def find_datasets(folders: Sequence[Path]) -> Iterator[Path]:
    """Every dataset in or below `folders` (at most `DEPTH` levels), broken LeRobot ones too.

    `UserError` for a folder that does not exist or holds no dataset.
    """
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder} does not exist; give folders that hold datasets")
    for folder in folders:
        found = False
        for path in _datasets_below(folder, DEPTH):
            found = True
            yield path
        if not found:
            raise UserError(f"{folder} holds no dataset that can be read, down to {DEPTH} levels below it")


def _datasets_below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        below = folder.iterdir() if folder.is_dir() else ()
        children = sorted(p for p in below if leads_down(p) and not p.name.startswith("."))
    except OSError:
        yield folder  # opening it says what is wrong
        return
    format = _format_of(folder)
    # names down to three levels may look like one dataset, though the folder holds several formats
    if format == "lerobot" or format and not {_format_of(child) for child in children} - {None, format}:
        yield folder
    elif depth:
        for child in children:
            yield from _datasets_below(child, depth - 1)


def _format_of(folder: Path) -> str | None:
    try:
        return detect_format(folder)
    except UserError:
        return "lerobot" if _remains(folder) else None


def _remains(folder: Path) -> bool:
    """Whether this was a LeRobot dataset before it lost its info.json; opening it reports that."""
    return (folder / "meta").is_dir() and (folder / "data").is_dir()


def summarize(path: str | Path, config: str | None = None) -> Summary:
    """What the dataset at `path` (or hub id) is, with `config` or the family that fits.

    `UserError` when it cannot be opened.
    """
    try:
        source = open_source(path, config, unmapped=True)
    except UserError:
        if config is None and _format_of(Path(path)) == "lerobot" and not (Path(path) / "meta" / "info.json").exists():
            raise UserError(f"{path} is not a LeRobot dataset: it has no meta/info.json") from None
        raise
    meta: Metadata | None = getattr(source, "meta", None)
    return Summary(
        str(path),
        source.name,
        source.format,
        meta.version if meta else None,
        len(source.episode_ids),
        sum(e.length or 0 for e in meta.episodes.values()) if meta else _frames(source),
        source.fps,
        _listed_cameras(meta, source) if meta else _loaded_cameras(source),
        source,
        meta,
    )


def _listed_cameras(meta: Metadata, source: Source) -> dict[str, tuple[int, int] | None]:
    cameras = meta.cameras(source.config.views)
    return {name: image_size(meta.features[key]) for name, key in cameras.items()}


def misfit(summary: Summary) -> bool:
    """Whether a dataset config fits by name and does not describe the files."""
    problem = summary.source.problem
    return problem is not None and not isinstance(problem, NoConfig)


def _frames(source: Source) -> int | None:
    lengths = [source.attempt(source.length_of, e) for e in source.episode_ids]
    return None if any(isinstance(n, Failed) for n in lengths) else sum(n for n in lengths if isinstance(n, int))


def _loaded_cameras(source: Source) -> dict[str, tuple[int, int] | None]:
    """Image sizes of the first episode that can be loaded; None for all when the first three cannot."""
    for episode_id in source.episode_ids[:3]:
        try:
            return {v.name: (v.height, v.width) for v in source.load(episode_id).views}
        except CorruptEpisode:
            continue
    return dict.fromkeys(source.view_names)


def image_size(feature: Mapping[str, Any]) -> tuple[int, int] | None:
    """(H, W) of a LeRobot image feature, from its shape and the names of its axes; None where these do not tell."""
    shape, names = list(feature.get("shape") or ()), list(flat_names(feature.get("names")))
    if len(shape) != 3:
        return None
    if "height" in names and "width" in names and len(names) == 3:
        return int(shape[names.index("height")]), int(shape[names.index("width")])
    first = shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)  # channels first
    return (int(shape[1]), int(shape[2])) if first else (int(shape[0]), int(shape[1]))


@dataclass(frozen=True)
class FieldRow:
    """One line of a field map: a named field, a rotation, or dropped dimensions."""

    dims: range  # native dimensions
    slots: tuple[int, ...]  # that they fill; () for dropped ones
    native: tuple[str, ...]  # the files' names of the dimensions; () where they have none
    field: str  # unified name
    unit: str  # of the slots
    conversion: str  # native → unified


def field_rows(mapping: ActionMap, native_names: Sequence[str] | None) -> list[FieldRow]:
    """The field map, line by line; `native_names` one per native dimension, or None."""
    rows: list[FieldRow] = []
    start = 0
    for spec in mapping.specs:
        dims = range(start, start + spec.width)
        native = tuple(native_names[start : dims.stop]) if native_names else ()
        start = dims.stop
        if spec.drop:
            rows.append(FieldRow(dims, (), native, "dropped", "", f"{spec.fill:g} on the way back"))
        elif spec.rotation:
            first = SLOTS[f"{spec.prefix}_0"]
            slots, how = tuple(range(first, first + 6)), f"{spec.rotation} → 6D"
            rows.append(FieldRow(dims, slots, native, f"{spec.prefix}_0…5", "6D", how))
        else:
            parts = (
                [f"× {spec.scale:.6g}"] * (spec.scale != 1)
                + [f"{spec.offset:+.6g}"] * (spec.offset != 0)
                + [f"× {mapping.control_hz:g} Hz"] * spec.delta
            )
            how = " ".join(parts) or "unchanged"
            rows += [
                FieldRow(dims[i : i + 1], (SLOTS[name],), native[i : i + 1], name, unit_of(name), how)
                for i, name in enumerate(spec.names)
            ]
    return rows


def unified_fields(mapping: ActionMap) -> list[tuple[int, str, str]]:
    """(slot, name, unit) of every slot the map fills, in the order of the native dimensions."""
    names = [
        name
        for spec in mapping.specs
        for name in (spec.names or ([f"{spec.prefix}_{i}" for i in range(6)] if spec.rotation else ()))
    ]
    return [(SLOTS[name], name, unit_of(name)) for name in names]


def native_names(source: Source) -> list[list[str] | None]:
    """The names of the native action's and state's dimensions in the files or the config; None without names, or if
    integrated."""
    config, found = source.config, []
    for columns, mapping in ((config.action_columns, source.action_map), (config.state_columns, source.state_map)):
        named = source.dimension_names(columns)
        if not named and any(spec.native for spec in mapping.specs):
            named = list(mapping.native_names)
        found.append(None if not mapping.specs or config.integrate and mapping is source.action_map else named)
    return found


def column_names(source: Source) -> dict[str, list[str]]:
    """ "action" and "state" → a name for each native dimension of a dataset without a map: the files' own, else its
    column and number."""
    config, found = source.config, {}
    for what, columns, specs in (
        ("action", config.action_columns, config.action),
        ("state", config.state_columns, config.state),
    ):
        found[what] = [
            name
            for column, spec in zip(columns, specs)
            for name in source.dimension_names((column,))
            or ([f"{column}[{i}]" for i in range(spec.width)] if spec.width > 1 else [column])
        ]
    return found


def ranges(source: Source, show: Progress) -> tuple[dict[str, np.ndarray], int]:
    """ "action" and "state" → [2, d] smallest and largest value of each native dimension, and in how many episodes they
    were looked for (at most `SAMPLED`, evenly spread)."""
    every, read = source.episode_ids, 0
    found: dict[str, np.ndarray] = {}
    wanted = sorted({round(i) for i in np.linspace(0, len(every) - 1, min(SAMPLED, len(every)))})
    for done, i in enumerate(wanted, start=1):
        with contextlib.suppress(CorruptEpisode):
            table = source.table(every[i])
            for what in ("action", "state"):
                ends = np.stack([getattr(table, what).min(0), getattr(table, what).max(0)])
                before = found.get(what, ends)
                found[what] = np.stack([np.minimum(before[0], ends[0]), np.maximum(before[1], ends[1])])
            read += 1
        show("ranges: episodes", done, len(wanted))
    return found, read


def instructions(summary: Summary, show: Progress) -> Counter[str]:
    """How many episodes have each instruction.

    In a format where each episode has to be opened for it: among the first `INSTRUCTION_SAMPLE`.
    """
    source = summary.source
    if summary.meta and len(source.episode_ids) > INSTRUCTION_SAMPLE:
        return Counter("; ".join(e.tasks) or source.config.instruction for e in summary.meta.episodes.values())
    counts: Counter[str] = Counter()
    wanted = source.episode_ids[:INSTRUCTION_SAMPLE]
    for done, episode_id in enumerate(wanted, start=1):
        text = source.attempt(source.instruction_of, episode_id)
        if isinstance(text, str):  # the counts' total tells how many were read
            counts[text] += 1
        show("instructions: episodes", done, len(wanted))
    return counts


def load_episode(source: Source, episode_id: int) -> Episode:
    """One episode; `UserError` for one that cannot be used, since it was asked for by number."""
    try:
        return source.load(episode_id)
    except CorruptEpisode as error:
        raise UserError(str(error)) from None
