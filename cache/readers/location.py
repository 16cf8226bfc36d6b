"""Where a dataset is: a folder here, or on the Hugging Face hub, whose files are fetched when asked for, all of one
commit.

"owner/name", "owner/name@revision", and "owner/name/folder[@revision]" for a dataset that is a folder of a repository.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from ...common.documents import kind_of, open_regular
from ...common.hub import HUB_ID, hub_files, snapshot, why
from ...common.text import first_line
from ...errors import UserError
from .episode import CorruptEpisode

POINTER = b"version https://git-lfs.github.com/spec/"


def regular(path: Path) -> Path:
    """The path of a regular file, for a library that opens it by name and would wait for a pipe; else `OSError`."""
    if not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, expected a file", str(path))
    return path


def leads_down(path: Path) -> bool:
    """Whether it is a folder, and no link to one around it, in which everything would be found again."""
    return path.is_dir() and not (path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()))


def unreadable(path: Path, kind: str, error: Exception | str) -> str:
    """Why a file could not be read as `kind` (e.g. "parquet"): one line that begins with its name.

    Every reader calls it: what was never fetched looks to each format like another kind of damage.
    """
    reason = error if isinstance(error, str) else first_line(error)
    return f"{path.name} {absence(path) or f'cannot be read as {kind} ({reason})'}"


def absence(path: Path) -> str:
    """Why the content of a file was never fetched to here, with the remedy, or what stands in its place; "" where that
    is not so."""
    try:
        if not path.exists():
            if path.is_symlink():
                return "is a link to a file that is not there; fetch the dataset again (hf download …)"
            if any(any(folder.glob("*.incomplete")) for folder in _download_folders(path)):
                return "was not downloaded to its end; rerun hf download"
            return "is missing"
        if not stat.S_ISREG(mode := path.stat().st_mode):
            return f"is {kind_of(mode)}, expected a file"
        with open(open_regular(path), "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                return "is a Git LFS pointer, not the file itself; run git lfs pull in the dataset (or hf download)"
    except OSError:
        pass
    return ""


_MARKS = ("meta/info.json", "features.json", "meta/episode_ends")  # of LeRobot, RLDS and a Zarr buffer
_PACKED = re.compile(r"\.(zip|tar|tar\.\w+|tgz|tbz2?|txz|7z|rar)$", re.IGNORECASE)


def misplaced(root: Path) -> str:
    """What a local path without a dataset is instead, and what to give; "" where that is not known."""
    if root.is_file() and (reason := absence(root)):
        return reason
    if root.is_file() and _PACKED.search(root.name):
        return "is an archive without RLBench episodes or a Zarr buffer; extract it and give the folder"
    above = next((p for p in list(root.resolve().parents)[:4] if any((p / mark).exists() for mark in _MARKS)), None)
    if above is not None:
        return f"is inside a dataset; give {above}"
    below = [p.parent.parent for depth in ("*/", "*/*/") for p in sorted(root.glob(f"{depth}meta/info.json"))]
    if below:
        count = f"{len(below)} datasets" if len(below) > 1 else "a dataset"
        return f"is not itself a dataset but holds {count}; give {'one of them, e.g. ' * (len(below) > 1)}{below[0]}"
    if (root / "meta_data" / "info.json").exists():
        return "is a LeRobot dataset of version 1, which is not readable; convert it with lerobot"
    if (root / "meta").is_dir() and (root / "data").is_dir():
        return "is a LeRobot dataset without its meta/info.json; fetch meta/ again"
    packed = [p.name for p in sorted(root.glob("*")) if p.is_file() and _PACKED.search(p.name)]
    if packed:
        return f"holds an archive, {packed[0]}, and no dataset; extract it and give the folder"
    pointers = [p for p in sorted(root.glob("*")) if p.is_file() and "LFS" in absence(p)] if root.is_dir() else []
    return f"holds {pointers[0].name}, which {absence(pointers[0])}" if pointers else ""


def _download_folders(path: Path) -> Iterator[Path]:
    """Where the hub's client keeps unfinished downloads of a file: beside it, in the dataset, or in its cache."""
    yield path.parent
    for root in path.parents:
        yield (root / ".cache/huggingface/download" / path.relative_to(root)).parent
        if root.parent.name == "snapshots":
            yield root.parent.parent / "blobs"


def require_dataset(given: str) -> None:
    """`UserError` for a path that is here and neither a folder nor a file, or that cannot be looked at."""
    try:
        mode = Path(given).expanduser().stat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # it may be a hub id
        return
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user's home
        raise UserError(f"{given[:100]} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{given} is {kind_of(mode)}; give a dataset folder or file, or a hub id like owner/name")


class Location:
    """One dataset's files. `root` is their folder; files of a hub dataset may be absent there until `locate` asks."""

    def __init__(self, path_or_repo: str, patterns: Sequence[str]) -> None:
        """`patterns`: what to fetch at once from the hub, relative to the dataset, e.g. "meta/**". `UserError` when
        there is no such folder or file, or the hub cannot be reached."""
        self.given = str(path_or_repo)
        self.root = Path(path_or_repo).expanduser()
        found = None if self.root.exists() else HUB_ID.fullmatch(self.given)
        self._repo = self._commit = None
        self._listed: list[str] | None = None  # files of a hub dataset
        self._folder = ""
        if found:
            self._repo, self._folder = found[1], found[2].removeprefix("/")
            if ".." in self._folder.split("/"):
                raise UserError(f"'{self.given}': a folder of a repository cannot be left with '..'")
            fetched = snapshot(found[1], found[3], [self._inside(p) for p in patterns])
            self._commit, self.root = fetched.name, fetched / self._folder  # the snapshot's folder is named by commit
            if not self.root.is_dir():
                raise UserError(f"'{found[1]}' on the hub has no folder '{self._folder}' with {', '.join(patterns)}")
        elif not self.root.exists():
            raise UserError(f"{self.given} does not exist; give a dataset folder or a hub id like owner/name")
        last = self._folder.rsplit("/", 1)[-1] or (self._repo or "").rsplit("/", 1)[-1] or self.root.resolve().name
        self.name = re.sub(r"[^\w.-]+", "_", last)  # safe as a folder name

    @property
    def hub_id(self) -> str | None:
        """ "owner/name" or "owner/name/folder"; None for a local folder."""
        return "/".join(filter(None, (self._repo, self._folder))) or None

    def locate(self, relative: str, where: str) -> Path:
        """Local path of a file of the dataset, downloaded first when it is on the hub. `CorruptEpisode`, beginning with
        `where`, when the dataset does not have it; `UserError` when the hub cannot be reached."""
        path = self.root / relative
        if self._repo and not path.is_file():
            _fetch(self._repo, self._commit or "main", self._inside(relative), where)
        if not path.is_file():
            raise CorruptEpisode(f"{where}: {relative} {absence(path) or 'is no file'}", "missing-file")
        return path

    def has(self, pattern: str) -> bool:
        """Whether a file of the dataset fits; as `names`."""
        return bool(self.names(pattern)) if self._repo else any(True for _ in self.root.glob(pattern))

    def names(self, pattern: str) -> list[str]:
        """Files of the dataset that fit a pattern of `Path.glob`, relative, sorted; of a hub dataset those the hub
        lists, and [] where it cannot be asked."""
        if not self._repo:
            found = (p for p in self.root.glob(pattern) if not p.name.startswith("."))  # as macOS leaves beside a file
            return sorted(p.relative_to(self.root).as_posix() for p in found)
        if self._listed is None:
            try:
                self._listed = hub_files(f"{self.hub_id}@{self._commit}")
            except UserError:
                self._listed = []
        return sorted(n for n in self._listed if PurePosixPath(n).match(pattern))

    def _inside(self, relative: str) -> str:
        return f"{self._folder}/{relative}" if self._folder else relative


def _fetch(repo: str, commit: str, relative: str, where: str) -> None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(repo, relative, repo_type="dataset", revision=commit)
    except LocalEntryNotFoundError as error:  # offline; a subclass of EntryNotFoundError, hence first
        if constants.HF_HUB_OFFLINE:
            reason = f"{where}: {relative} is not in the hub's cache, and HF_HUB_OFFLINE is set"
            raise CorruptEpisode(reason, "missing-file") from None
        raise UserError(f"{where}: {relative} could not be fetched from '{repo}': {why(error)}") from None
    except EntryNotFoundError:
        raise CorruptEpisode(f"{where}: {relative} is missing from '{repo}'", "missing-file") from None
    except Exception as error:  # see hub_files
        raise UserError(f"{where}: {relative} could not be fetched from '{repo}': {why(error)}") from None
