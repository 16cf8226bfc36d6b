"""Where a dataset is: a folder here, or on the Hugging Face hub, whose files are fetched when asked for, all of one
commit.

"owner/name", "owner/name@revision", and "owner/name/folder[@revision]" for a dataset that is a folder of a repository.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...common.hub import HUB_ID, snapshot
from ...common.text import first_line
from ...errors import UserError
from .episode import CorruptEpisode


class Location:
    """One dataset's files. `root` is their folder; files of a hub dataset may be absent there until `locate` asks."""

    def __init__(self, path_or_repo: str, patterns: Sequence[str]) -> None:
        """`patterns`: what to fetch at once from the hub, relative to the dataset, e.g. "meta/**". `UserError` when
        there is no such folder or file, or the hub cannot be reached."""
        self.given = str(path_or_repo)
        self.root = Path(path_or_repo).expanduser()
        found = None if self.root.exists() else HUB_ID.fullmatch(self.given)
        self._repo = self._commit = None
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
            raise CorruptEpisode(f"{where}: {relative} is missing", "missing-file")
        return path

    def _inside(self, relative: str) -> str:
        return f"{self._folder}/{relative}" if self._folder else relative


def _fetch(repo: str, commit: str, relative: str, where: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(repo, relative, repo_type="dataset", revision=commit)
    except LocalEntryNotFoundError as error:  # offline; a subclass of EntryNotFoundError, hence first
        raise UserError(f"{where}: {relative} could not be fetched from '{repo}': {first_line(error)}") from None
    except EntryNotFoundError:
        raise CorruptEpisode(f"{where}: {relative} is missing from '{repo}'", "missing-file") from None
    except Exception as error:  # see hub_files
        raise UserError(f"{where}: {relative} could not be fetched from '{repo}': {first_line(error)}") from None
