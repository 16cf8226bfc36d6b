"""Which dataset config describes a dataset: the nearest one that fits.

In this order: beside the data (`dvla.yaml` in its folder or in meta/, NAME.yaml or dvla.yaml beside a file NAME.hdf5);
in the current folder; registered by `dvla data add` ($XDG_CONFIG_HOME/dvla/datasets, by default ~/.config); shipped.
Beside the data it always counts, elsewhere where `match` fits its robot type, repository or folder name, and where
several do, the one whose columns, widths and `fits` agree with the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...common.config import configs_dir
from ...common.documents import read_yaml
from ...errors import UserError, unknown
from .config import DatasetConfig, Fit, read_config, unmapped_config
from .episode import CorruptEpisode
from .tables import join_columns

if TYPE_CHECKING:
    from .base import Source

BESIDE = "dvla.yaml"
SUFFIXES = (".yaml", ".yml")
LARGEST = 1 << 18  # bytes of a dataset config; larger files are none
SAMPLED = 64  # episodes, evenly spread, whose numbers tell the unit


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


@dataclass(frozen=True)
class Files:
    """What a reader can tell about a dataset before it has a config."""

    names: Sequence[str]  # of the dataset, then of its robot or folder; those that are empty do not count
    root: Path  # its folder or file
    columns: Callable[[], Mapping[str, int]]  # columns of numbers → numbers per row; 0: not known
    dimensions: Callable[[Sequence[str]], Sequence[str] | None] = lambda _: None  # names in columns, side by side
    reopen: Callable[[], Source] | None = None  # the dataset without a map, to look at its numbers

    @functools.cached_property
    def known(self) -> list[str]:
        """The names as `match` sees them."""
        return [n.lower().rsplit("/", 1)[-1] for n in dict.fromkeys(self.names) if n]

    def __str__(self) -> str:
        return " or ".join([n for n in self.known if not re.fullmatch(r"[\d.]+", n)][:2]) or self.root.name


def choose_config(given: DatasetConfig | None, format: str, files: Files) -> DatasetConfig:
    """The config a reader uses: the one `given`, the nearest that fits, or for UNMAPPED one that maps nothing."""
    if given is None:
        return find_config(format, files)
    if given.mapped:
        return given
    return dataclasses.replace(unmapped_config(format, files.columns()), match=tuple(files.known))


def find_config(format: str, files: Files) -> DatasetConfig:
    """The nearest config of a format that fits a dataset. `NoConfig` unless exactly one does; `UserError` for a file
    that fits and cannot be used."""
    if beside := _beside(format, files.root):
        return beside
    shipped = [_shipped(n) for n in config_names() if "/" not in n]
    places = (_own(Path(), files.known), _own(registered_folder(), files.known), shipped)
    tiers = [[c for c in configs if c.format == format and _matches(c.match, files.known)] for configs in places]
    named = [c for near in tiers for c in near]
    if len(named) == 1 and named[0].fits == Fit():
        return named[0]  # the reader says what it does not describe
    for near in tiers:
        fitting = _nearest([c for c in near if not _differs(c, files)], files)
        if not fitting:
            continue
        fitting = _of_unit(fitting, files)
        if len(fitting) == 1:
            return fitting[0]
        several = ", ".join(c.name for c in fitting)
        raise NoConfig(f"{len(fitting)} dataset configs fit {files}: {several}; choose one with --dataset-config")
    why = "".join(f"; '{c.name}' has other {_differs(c, files)}" for c in named[:2])
    raise NoConfig(f"no dataset config fits {files}{why}; run `dvla data add SOURCE`")


def _nearest(configs: Sequence[DatasetConfig], files: Files) -> list[DatasetConfig]:
    """Those that match the first name that any of them matches: the dataset's own rather than its robot's."""
    for name in files.known:
        if found := [c for c in configs if _matches(c.match, [name])]:
            return found
    return list(configs)


def _differs(config: DatasetConfig, files: Files) -> str:
    """What of the files a config does not describe, in a word; "" where it describes them."""
    columns = files.columns()
    sides = [(config.action_columns, config.action_width)]
    sides += [(config.state_columns, sum(s.width for s in config.state))] if config.state else []
    for names, width in sides:
        if missing := [c for c in names if c not in columns]:
            return f"columns ({missing[0]})"
        widths = [columns[c] for c in names]
        if 0 not in widths and sum(widths) != width:
            return f"widths ({'+'.join(names)} {width}, here {sum(widths)})"
    if config.fits.names:
        given = files.dimensions(config.action_columns) or ()
        odd = [n for n, patterns in zip(given, config.fits.names) if not _is_called(n.lower(), patterns.lower())]
        if not given and config.fits.named or odd and (config.fits.named or not all(map(NUMBERED.fullmatch, given))):
            return f"names ({odd[0]})" if odd else "names"
    return ""


def _is_called(name: str, patterns: str) -> bool:
    """Whether a name fits one of the patterns, which "|" parts, and is of a position where they are."""
    other = _NO_POSITION.search(name)
    return any(fnmatch.fnmatchcase(name, p) and (not other or other[0] in p) for p in patterns.split("|"))


# Names that only number dimensions: "motor_3", "action[3]"
NUMBERED = re.compile(r"(motor|joint|action|state|dim|axis|value|[a-z])?[\W_]*\d+\W*", re.IGNORECASE)
_NO_POSITION = re.compile(r"vel|effort|torque|current|acc|delta")


def _of_unit(configs: Sequence[DatasetConfig], files: Files) -> list[DatasetConfig]:
    """Those whose `fits.reach` agrees with the data's numbers; `NoConfig` names all where none does."""
    if files.reopen is None or not any(c.fits.reach for c in configs):
        return list(configs)
    source, fitting, odd = files.reopen(), [], ""
    for config in configs:
        largest = magnitudes(source, config)
        tops = [(float(largest[list(r.dims)].max()), r) for r in config.fits.reach]
        other = [(top, r.dims) for top, r in tops if not r.above < top <= r.upto]
        if not other:
            fitting.append(config)
        elif not odd:
            odd = f"{other[0][1][0]}-{other[0][1][-1]} of {files} reach {other[0][0]:.4g}"
    if not fitting:
        names = " or ".join(c.name for c in configs)
        raise NoConfig(
            f"dimensions {odd}, which does not tell their unit; give --dataset-config {names}, "
            "or run `dvla data add SOURCE`"
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
        found = read_yaml(path).get("match")
    return [path.stem, *(found if isinstance(found, list) else ())]


def _files(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file() and _looks_right(p))
    return []


def _looks_right(path: Path) -> bool:
    """Whether it has the two entries that every dataset config has."""
    try:
        lines = path.read_text(errors="replace").splitlines() if path.stat().st_size <= LARGEST else []
    except OSError:
        return False
    return all(any(line.startswith(f"{entry}:") for line in lines) for entry in ("embodiment", "action"))
