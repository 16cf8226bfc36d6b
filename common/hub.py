"""The Hugging Face hub: snapshots of repositories, the list of their files, errors as one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .text import first_line

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")
DATASETS = "hf://datasets/"  # before the id, in the address of a dataset repository


def policy_snapshot(repo: str) -> Path | None:
    """Folder of the hub's policy "owner/name" or "owner/name@revision", downloaded unless cached; None for another id.

    `UserError` when it cannot be downloaded.
    """
    found = HUB_ID.fullmatch(repo)
    if found is None or found[2] or ".." in repo:
        return None
    return snapshot(found[1], found[3], None, "model")


def dataset_url(name: str) -> str | None:
    """The address of "owner/name[@revision]" as a dataset of the hub; None for any other text, and for what exists."""
    found = HUB_ID.fullmatch(name)
    return None if found is None or found[2] or ".." in name or Path(name).exists() else DATASETS + name


def hub_files(path_or_repo: str) -> list[str]:
    """Files of a hub dataset, relative to it; `UserError` when the hub cannot be reached or the id is malformed."""
    from huggingface_hub import HfApi

    found = HUB_ID.fullmatch(path_or_repo)
    if not found:
        raise UserError(f"{path_or_repo} does not exist; give a dataset folder or a hub id like owner/name")
    folder = found[2].removeprefix("/")
    try:
        names = HfApi().list_repo_files(found[1], repo_type="dataset", revision=found[3])
    except Exception as error:  # the client raises many types: HTTP, offline, validation
        raise unreachable(found[1], error) from None
    files = [n.removeprefix(folder + "/") for n in names if not folder or n.startswith(folder + "/")]
    return files or [n.rsplit("/", 1)[-1] for n in names if n == folder]  # one file of the repository


def snapshot(repo: str, revision: str | None, patterns: list[str] | None, kind: str = "dataset") -> Path:
    """Folder of a repository's files that match `patterns` (None: all), downloaded unless cached."""
    from huggingface_hub import snapshot_download  # imported late: slow, and not needed for a local dataset

    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=patterns))
    except Exception as error:  # see hub_files
        raise unreachable(repo, error) from None


def unreachable(repo: str, error: Exception) -> UserError:
    """The error for a repository that is neither a local folder nor on the hub."""
    return UserError(f"'{repo}' is not a local folder and could not be downloaded from the hub: {why(error)}")


def why(error: Exception) -> str:
    """What an error of the hub's client means, and what to do; its first line often is only a number."""
    said = first_line(error)
    return f"{found} ({said})" if (found := meaning(error)) else said


def meaning(error: BaseException) -> str:
    """What an error that only the hub's client raises means, and what to do; empty for others."""
    from huggingface_hub import errors

    known: tuple[tuple[type[Exception], str], ...] = (  # a subclass before the one it is made of
        (errors.GatedRepoError, "its owner grants access on request; ask on its page, then `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is none of that name, or it is private; check it, or `hf auth login`"),
        (errors.RevisionNotFoundError, "it has no such revision; check what follows the @"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and it is not in the cache"),
        (errors.LocalEntryNotFoundError, "it is not in the cache, and the hub cannot be reached"),
    )
    offline = (
        "the hub cannot be reached; check the network" if re.search("Connect|Timeout", type(error).__name__) else ""
    )
    return next((text for kind, text in known if isinstance(error, kind)), offline)


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client raises many types: HTTP, offline, validation, no token
        raise UserError(
            f"the hub rejected {repo}: {first_line(error)}; log in with `hf auth login`, "
            "and check the name and your permissions"
        ) from None
