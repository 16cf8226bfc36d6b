"""Files on the Hugging Face hub, of datasets and of policies. Where a dataset is: a folder here, or on the Hugging Face hub, whose files are fetched when asked for, all of one commit.

"owner/name", "owner/name@revision", and "owner/name/folder[@revision]" for a dataset that is a folder of a repository.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .episode import CorruptEpisode

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")


class Location:
    """One dataset's files. `root` is their folder; files of a hub dataset may be absent there until `locate` asks."""

    def __init__(self, path_or_repo: str, patterns: Sequence[str]) -> None:
        """`patterns`: what to fetch at once from the hub, relative to the dataset, e.g. "meta/**". `UserError` when there
        is no such folder or file, or the hub cannot be reached."""
        self.given = str(path_or_repo)
        self.root = Path(path_or_repo).expanduser()
        found = None if self.root.exists() else _HUB_ID.fullmatch(self.given)
        self._repo = self._commit = None
        self._folder = ""
        if found:
            self._repo, self._folder = found[1], found[2].removeprefix("/")
            if ".." in self._folder.split("/"):
                raise UserError(f"'{self.given}': a folder of a repository cannot be left with '..'")
            snapshot = _snapshot(found[1], found[3], [self._inside(p) for p in patterns])
            self._commit, self.root = snapshot.name, snapshot / self._folder    # the snapshot's folder is named by commit
            if not self.root.is_dir():
                raise UserError(f"'{found[1]}' on the hub has no folder '{self._folder}' with {', '.join(patterns)}")
        elif not self.root.exists():
            raise UserError(f"{self.given} does not exist; give a dataset folder or a hub id like owner/name")
        last = self._folder.rsplit("/", 1)[-1] or (self._repo or "").rsplit("/", 1)[-1] or self.root.resolve().name
        self.name = re.sub(r"[^\w.-]+", "_", last)      # safe as a folder name

    @property
    def hub_id(self) -> str | None:
        """"owner/name" or "owner/name/folder"; None for a local folder."""
        return "/".join(filter(None, (self._repo, self._folder))) or None

    def locate(self, relative: str, where: str) -> Path:
        """Local path of a file of the dataset, downloaded first when it is on the hub. `CorruptEpisode`, beginning with
        `where`, when the dataset does not have it; `UserError` when the hub cannot be reached."""
        path = self.root / relative
        if self._repo and not path.is_file():
            _fetch(self._repo, self._commit or "main", self._inside(relative), where)
        if not path.is_file():
            raise CorruptEpisode(f"{where}: {relative} is missing")
        return path

    def _inside(self, relative: str) -> str:
        return f"{self._folder}/{relative}" if self._folder else relative


def policy_snapshot(repo: str) -> Path | None:
    """Folder of the policy "owner/name" or "owner/name@revision" of the hub, fetched if it is not here yet; None when it is no such id.
    `UserError` when it cannot be fetched."""
    found = _HUB_ID.fullmatch(repo)
    if found is None or found[2] or ".." in repo:
        return None
    return _snapshot(found[1], found[3], None, "model")


def hub_files(path_or_repo: str) -> list[str]:
    """Files of a hub dataset, relative to it; `UserError` when the hub cannot be reached or the id is malformed."""
    from huggingface_hub import HfApi

    found = _HUB_ID.fullmatch(path_or_repo)
    if not found:
        raise UserError(f"{path_or_repo} does not exist; give a dataset folder or a hub id like owner/name")
    folder = found[2].removeprefix("/")
    try:
        names = HfApi().list_repo_files(found[1], repo_type="dataset", revision=found[3])
    except Exception as error:  # the client raises many types (HTTP, offline, validation): "could not be fetched"
        raise _unreachable(found[1], error) from None
    files = [n.removeprefix(folder + "/") for n in names if not folder or n.startswith(folder + "/")]
    return files or [n.rsplit("/", 1)[-1] for n in names if n == folder]    # one file of the repository


def _snapshot(repo: str, revision: str | None, patterns: list[str] | None, kind: str = "dataset") -> Path:
    from huggingface_hub import snapshot_download  # imported late: slow, and not needed for a local dataset

    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=patterns))
    except Exception as error:  # see hub_files
        raise _unreachable(repo, error) from None


def _fetch(repo: str, commit: str, relative: str, where: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(repo, relative, repo_type="dataset", revision=commit)
    except LocalEntryNotFoundError as error:  # offline; a subclass of EntryNotFoundError, hence first
        raise UserError(f"{where}: {relative} could not be fetched from '{repo}': {first_line(error)}") from None
    except EntryNotFoundError:
        raise CorruptEpisode(f"{where}: {relative} is missing from '{repo}'") from None
    except Exception as error:  # see hub_files
        raise UserError(f"{where}: {relative} could not be fetched from '{repo}': {first_line(error)}") from None


def _unreachable(repo: str, error: Exception) -> UserError:
    return UserError(f"'{repo}' is not a folder here and could not be fetched from the hub: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
