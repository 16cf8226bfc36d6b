"""Which dataset config describes a dataset: the nearest one that fits.

In this order: beside the data (`dvla.yaml` in its folder or in meta/, NAME.yaml or dvla.yaml beside a file NAME.hdf5);
in the current folder; registered by `dvla data add` ($XDG_CONFIG_HOME/dvla/datasets, by default ~/.config); shipped.
Beside the data it always counts, elsewhere where `match` fits its robot type, repository or folder name, and where
several do, the one whose columns, widths and `fits` agree with the files.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...common.config import configs_dir, load_yaml
from ...errors import UserError, unknown
from .config import DatasetConfig, read_config, unmapped_config
from .episode import CorruptEpisode
from .tables import join_columns

if TYPE_CHECKING:
    from .base import Source

BESIDE = "dvla.yaml"
SUFFIXES = (".yaml", ".yml")
LARGEST = 1 << 18  # bytes of a dataset config; larger files are none
SAMPLED = 64  # episodes, evenly spread, whose numbers tell the unit
Columns = Callable[[], Mapping[str, int]]  # numeric columns of the files → numbers per row


class NoConfig(UserError):
    """No dataset config fits a dataset, or several do."""


def registered_folder() -> Path:
    """Where `dvla data add` puts dataset configs."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".config") / "dvla" / "datasets"


def config_names() -> tuple[str, ...]:
    """Names of the shipped dataset configs, sorted. Those in a folder, like "legacy/droid", are loaded by name only."""
    root = configs_dir() / "datasets"
    return tuple(sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml")))


def registered() -> dict[str, Path]:
    """Name → file of the registered dataset configs."""
    return {path.stem: path for path in _files(registered_folder())}


def load_config(path_or_name: Path | str) -> DatasetConfig:
    """Read a dataset config from a YAML file, or a registered or shipped one by name; `UserError` names file and entry.

    Of two with one name, the registered one."""
    path, name = Path(path_or_name), str(path_or_name)
    if path.suffix in SUFFIXES:
        return read_config(path.expanduser(), path.stem)
    own = registered()
    if name in own:
        return read_config(own[name], name)
    if name not in config_names():
        raise unknown("dataset config", name, {*own, *config_names()})
    return _shipped(name)


def place_of(config: DatasetConfig) -> str:
    """Where it is, in a word for the shipped ones."""
    return "shipped" if Path(config.origin).is_relative_to(configs_dir()) else config.origin


@functools.cache
def _shipped(name: str) -> DatasetConfig:
    return read_config(configs_dir() / "datasets" / f"{name}.yaml", name)


def choose_config(
    given: DatasetConfig | None,
    format: str,
    names: Iterable[str],
    root: Path,
    columns: Columns | None = None,
    reopen: Callable[[], Source] | None = None,
) -> DatasetConfig:
    """The config a reader uses: the one `given`, the nearest that fits, or for UNMAPPED one that maps nothing.

    Args:
        columns: None where only reading an episode would tell.
        reopen: the same dataset without a map, to look at its numbers.
    """
    if given is None:
        return find_config(format, names, root, columns, reopen)
    return given if given.mapped else unmapped_config(format, columns() if columns else {})


def find_config(
    format: str,
    names: Iterable[str],
    root: Path | None = None,
    columns: Columns | None = None,
    reopen: Callable[[], Source] | None = None,
) -> DatasetConfig:
    """The nearest config of a format that fits a dataset in `root` with one of `names`: robot type, repository, folder.

    `NoConfig` unless exactly one fits; `UserError` for a file that fits and cannot be used."""
    if root is not None and (beside := _beside(format, root)):
        return beside
    known = [n.lower().rsplit("/", 1)[-1] for n in dict.fromkeys(names) if n]
    called = " or ".join([n for n in known if not re.fullmatch(r"[\d.]+", n)][:2]) or f"this {format} dataset"
    shipped = [_shipped(n) for n in config_names() if "/" not in n]
    tiers = [
        [c for c in configs if c.format == format and _matches(c.match, known)]
        for configs in (_own(Path(), known), _own(registered_folder(), known), shipped)
    ]
    named = [c for near in tiers for c in near]
    if len(named) == 1 and not named[0].fits:
        return named[0]  # the reader says what it does not describe
    for near in tiers:
        fitting = [c for c in near if columns is None or describes(c, columns())]
        if len(fitting) > 1 or fitting and fitting[0].fits:
            fitting = _of_unit(fitting, called, reopen)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            several = ", ".join(c.name for c in fitting)
            raise NoConfig(f"{len(fitting)} dataset configs fit {called}: {several}; choose one with --dataset-config")
    if len(named) == 1:
        return named[0]
    if named:
        several = ", ".join(c.name for c in named)
        raise NoConfig(f"the columns of {called} are of other widths than in {several}; run `dvla data add SOURCE`")
    raise NoConfig(f"no dataset config fits {called}; run `dvla data add SOURCE`")


def describes(config: DatasetConfig, columns: Mapping[str, int]) -> bool:
    """Whether the columns it asks for are there, with its widths; 0: a width the files do not tell."""
    sides = [(config.action_columns, config.action_width)]
    sides += [(config.state_columns, sum(s.width for s in config.state))] if config.state else []
    widths = [[columns.get(c, -1) for c in names] for names, _ in sides]
    return all(min(w) >= 0 and (0 in w or sum(w) == width) for w, (_, width) in zip(widths, sides))


def _of_unit(configs: Sequence[DatasetConfig], called: str, reopen: Callable[[], Source] | None) -> list[DatasetConfig]:
    """Those whose `fits` agrees with the data's numbers; `NoConfig` names all where none does."""
    guarded = [c for c in configs if c.fits]
    if not guarded or reopen is None:
        return list(configs)
    largest = magnitudes(reopen(), guarded[0])
    reached = {c.name: float(largest[list(c.fits.dims)].max()) for c in guarded if c.fits}
    fitting = [c for c in configs if not c.fits or c.fits.above < reached[c.name] <= c.fits.upto]
    if not fitting:
        names = " or ".join(c.name for c in guarded)
        reach = max(reached.values())
        raise NoConfig(
            f"{called}: its joints reach {reach:.4g}, which does not tell the unit; give --dataset-config {names}"
        )
    return fitting


def magnitudes(source: Source, config: DatasetConfig) -> np.ndarray:
    """[d] largest |value| of each dimension of the columns `config` calls action, and of its state where that has the
    same width, in up to `SAMPLED` episodes; 0 where none can be read."""
    width = config.action_width
    sides = [config.action_columns]
    sides += [config.state_columns] if sum(s.width for s in config.state) == width else []
    found, every = np.zeros(width), source.episode_ids
    for i in np.unique(np.linspace(0, len(every) - 1, min(SAMPLED, len(every))).round().astype(int)):
        with contextlib.suppress(CorruptEpisode):
            columns = source.columns_of(every[i])
            for side in sides:
                found = np.maximum(found, np.abs(join_columns(columns, side, source.name)).max(0, initial=0.0))
    return found


def _beside(format: str, root: Path) -> DatasetConfig | None:
    if root.is_dir():
        places = [root / BESIDE, root / "meta" / BESIDE]
    else:
        places = [root.with_suffix(".yaml"), root.with_name(BESIDE)]
    for path in places:
        if path.is_file():
            config = read_config(path, root.stem if root.is_file() else root.resolve().name)
            if config.format != format:
                raise UserError(f"{path} is for {config.format} files, these are {format}; correct its format")
            return config
    return None


def _matches(match: Iterable[object], known: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(n, str(pattern).lower()) for pattern in match for n in known)


def _own(folder: Path, known: Sequence[str]) -> Iterator[DatasetConfig]:
    """The dataset configs in a folder of one's own; of those that cannot be used, one that matches is refused."""
    for path in _files(folder):
        try:
            yield read_config(path, path.stem)
        except UserError as error:
            if _matches(_match_of(path), known):
                raise UserError(f"{path.parent}: {error}") from None


def _match_of(path: Path) -> list[object]:
    """`match` of a dataset config that cannot be used, and its name."""
    found: object = ()
    with contextlib.suppress(UserError):
        found = load_yaml(path).get("match")
    return [path.stem, *(found if isinstance(found, list) else ())]


def _files(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file() and _looks_right(p))
    return []


def _looks_right(path: Path) -> bool:
    """Whether it has the two entries that every dataset config has."""
    if path.stat().st_size > LARGEST:
        return False
    lines = path.read_text(errors="replace").splitlines()
    return all(any(line.startswith(f"{entry}:") for line in lines) for entry in ("embodiment", "action"))
