"""Corpus readers: `open_source(path)` finds the format of a dataset and gives its `Source`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...common.hub import hub_files
from ...errors import UserError
from .base import Source
from .config import FORMATS, UNMAPPED, DatasetConfig
from .faults import whole_dataset
from .location import misplaced, require_dataset
from .search import NoConfig, load_config
from .tables import EpisodeTable

__all__ = ["EpisodeTable", "Source", "detect_format", "open_source"]


def open_source(
    path_or_repo: str | Path, config: DatasetConfig | str | None = None, *, unmapped: bool = False
) -> Source:
    """Open a dataset: a local folder or file, or a hub id "owner/name[/folder][@revision]".

    `config` (or a YAML file, or the name of one) says what its numbers mean and which format it has; None finds the
    format by the files and the config as `search` describes. `unmapped`: where no config describes the dataset, it is
    opened without one (`source.config.mapped` is False, `source.problem` says why). `UserError` when the path is
    missing, has no format that can be read, or the config does not describe it.
    """
    given = str(path_or_repo)
    require_dataset(given)
    if isinstance(config, str):
        config = load_config(config)
    format = config.format if config and config.mapped else detect_format(given)
    try:
        with whole_dataset(given):
            source = _reader(format)(given, config)
    except UserError as error:
        source = _without_config(_reader(format), given, config, unmapped, error)
    folder = Path(given).expanduser()
    source.location = str(folder.resolve()) if folder.exists() else given
    return source


def _without_config(
    reader: _Reader, given: str, config: DatasetConfig | None, unmapped: bool, error: UserError
) -> Source:
    """The dataset without a map, where its config was to be found and only that failed; raises `error` otherwise."""
    if isinstance(error, NoConfig):
        error = NoConfig(str(error).replace("SOURCE", given))
    if config is not None or not unmapped:
        raise error
    try:
        with whole_dataset(given):
            source = reader(given, UNMAPPED)
    except UserError as without:
        raise (without if isinstance(error, NoConfig) else error) from None
    source.problem = error
    return source


class _Reader(Protocol):
    """A subclass of `Source` that is made of a path or hub id and a config, None for the one that fits."""

    def __call__(self, path_or_repo: str, config: DatasetConfig | None) -> Source: ...

    def matches(self, names: Sequence[str], root: Path | None) -> bool: ...


def _reader(format: str) -> _Reader:
    """The reader class; its module is imported only now, since each needs libraries of its own."""
    module = importlib.import_module(f".{format}", __package__)
    return module.READER


def detect_format(path_or_repo: str | Path) -> str:
    """The format of a dataset (a key of FORMATS), by its file names alone; `UserError` when it has none of them."""
    given = str(path_or_repo)
    require_dataset(given)
    root = Path(given).expanduser()
    if root.is_file():
        names, look = [root.name], root.parent
    elif root.is_dir():
        with whole_dataset(given):
            names, look = _names(root), root
    else:
        names, look = hub_files(given), None
    for format in FORMATS:
        with whole_dataset(given):
            if _reader(format).matches(names, look):
                return format
    if look is not None and (reason := misplaced(root)):
        raise UserError(f"{given} {reason}")
    folders = sorted({n.rpartition("/meta/info.json")[0] for n in names if n.endswith("/meta/info.json")})
    if folders:
        raise UserError(
            f"{given} is not itself a dataset but holds {len(folders)}; give one, e.g. {given}/{folders[0]}"
        )
    if files := [n for n in names if n.endswith((".hdf5", ".h5")) and "/" not in n]:
        raise UserError(
            f"{given}: {files[0]} has another layout than the HDF5 files that are read (robomimic's data/demo_0, "
            "DexWild's ep_0000, those of `dvla data export`); convert others, such as ALOHA's, to LeRobot"
        )
    kinds = ", ".join(FORMATS)
    raise UserError(f"{given} holds none of the formats that can be read ({kinds}); give the dataset's own folder")


def _names(root: Path, depth: int = 3) -> list[str]:
    """Paths under `root`, relative, at most `depth` parts deep."""
    found, folders = [], [root]
    for _ in range(depth):
        entries = [e for folder in folders for e in sorted(folder.iterdir())]
        found += [e.relative_to(root).as_posix() for e in entries]
        folders = [e for e in entries if e.is_dir()]
    return found
