"""The JSON documents of a cache folder: fingerprint, manifest, commit records. Nothing else opens them by name.

The fingerprint is written first, a commit record after each finished shard or table, the manifest last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common import documents
from ...common import fingerprint as fp
from ...errors import UserError
from .plan import FORMAT, KEPT_FORMAT, BuildPlan, ShardTask

FINGERPRINT, MANIFEST, QUARANTINE = "fingerprint.json", "manifest.json", "quarantine.jsonl"
_COMMITS = ".commits"
Files = dict[str, dict[str, int]]  # name → {"bytes", "crc32c"} as written


def json_bytes(document: dict[str, Any]) -> bytes:
    """Readable JSON with a fixed byte form. `ValueError` for NaN or infinity."""
    return documents.json_bytes(document, allow_nan=False)


# --- fingerprint and plan --------------------------------------------------------------------------------------------


def is_begun(path: Path) -> bool:
    """Whether a build was started at `path`."""
    return (path / FINGERPRINT).exists()


def read_fingerprint(path: Path) -> dict[str, Any]:
    """What the cache at `path`, finished or not, is built from. `UserError` where there is no readable cache."""
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder of a cache")
    if not path.is_dir():
        raise UserError(f"no cache at {path}; build one with `dvla cache build … --out {path}`")
    file = path / FINGERPRINT
    if not file.exists() and (path / "_meta.tar").exists():
        raise UserError(f"{path} is a WebDataset export; make a cache of it: `dvla cache import {path} --out CACHE`")
    if not file.exists():
        raise UserError(f"{path} is not a dvla cache (it has no {FINGERPRINT}); give a folder of `dvla cache build`")
    try:
        document = json.loads(file.read_bytes())
        require_format(document["store"]["format"], path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error, "restore a copy of it, or rebuild the cache") from None
    return document


def read_plan(path: Path) -> BuildPlan:
    """The plan of the cache at `path`, finished or not. `UserError` as `read_fingerprint`."""
    document = read_fingerprint(path)
    try:
        return BuildPlan.from_document(document["store"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path / FINGERPRINT, error, "restore a copy of it, or rebuild the cache") from None


# --- manifest --------------------------------------------------------------------------------------------------------


def is_finished(path: Path) -> bool:
    """Whether the cache at `path` has its manifest, which is written last."""
    return (path / MANIFEST).exists()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the finished cache at `path`. `UserError` where there is none this version reads."""
    if not (is_begun(path) and is_finished(path)):
        read_fingerprint(path)  # raises unless a build was started here
        shards = sum(1 for _ in (path / _COMMITS).glob("*/*/*.json"))
        raise UserError(
            f"cache {path} is incomplete ({shards} shards are finished); "
            "rerun the same `dvla cache build` command to resume it"
        )
    try:
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise _damaged(path / MANIFEST, error) from None
    return parse_manifest(data, path)


def parse_manifest(data: bytes, where: Path | str) -> dict[str, Any]:
    """The manifest in `data`, of the cache at `where`. `UserError` when it is damaged or of another format."""
    try:
        manifest = json.loads(data)
        require_format(manifest["format"], where)
        if manifest["complete"] is not True or not isinstance(manifest["files"], dict):
            raise ValueError("it is not that of a finished cache")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(f"{where}/{MANIFEST}", error) from None
    return manifest


def find_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of the cache at `path`; None where it is missing or damaged."""
    found = _find(path / MANIFEST)
    return found if found is not None and found.get("complete") is True else None


def manifest_document(
    plan: BuildPlan, fingerprint: dict[str, Any], written: Files, quarantined: Mapping[str, int]
) -> dict[str, Any]:
    """The manifest of a finished cache of the files `written`. `quarantined`: episodes, by dataset."""
    return {
        "complete": True,
        "format": plan.version,
        "datasets": [
            {
                "name": d.name,
                "frames": d.frames,
                "episodes": len(d.episodes),
                "views": list(d.views),
                "quarantined": quarantined[d.name],
            }
            for d in plan.datasets
        ],
        "files": written,
        "bytes": sum(entry["bytes"] for entry in written.values()),
        "frames": sum(d.frames for d in plan.datasets),
        "fingerprint": fp.digest(fingerprint),
        "quarantine_count": sum(quarantined.values()),
        "tokens": plan.tokens,
        "width": plan.width,
        "shard_frames": plan.shard_frames,
        "dtype": plan.format.dtype,
        "frame_stride": plan.frame_stride,
        "variants": plan.variants,
    }


# --- commit records --------------------------------------------------------------------------------------------------


def shard_commit(root: Path, task: ShardTask) -> Path:
    """The commit record of a shard."""
    return root / _COMMITS / task.dataset / task.array / f"{task.index}.json"


def tables_commit(root: Path, dataset: str) -> Path:
    """The commit record of a dataset's tables."""
    return root / _COMMITS / dataset / "tables.json"


def scale_commit(root: Path) -> Path:
    """The commit record of the channel scales of 8-bit features."""
    return root / _COMMITS / "channel_scale.json"


def read_commit(record: Path) -> dict[str, Any]:
    """A commit record: "files", and "quarantined" of a shard or "attributes" of tables. `UserError` when damaged."""
    if (found := _find(record)) is None:
        raise UserError(f"commit record {record} is missing or damaged; run `dvla cache repair` on the cache")
    return found


def commit_records(path: Path) -> dict[Path, dict[str, Any] | None]:
    """Every commit record of the cache at `path`, by its file; None for a damaged one."""
    return {file: _find(file) for file in sorted((path / _COMMITS).rglob("*.json"))}


def is_committed(path: Path, record: Path) -> bool:
    """Whether the record is there and every file it lists has the size that was written."""
    found = _find(record)
    return found is not None and all(has_size(path / name, entry) for name, entry in found["files"].items())


def has_size(file: Path, entry: Mapping[str, int]) -> bool:
    """Whether the file is there with the size that was written."""
    try:
        return file.stat().st_size == entry["bytes"]
    except OSError:
        return False


# --- attributes of a dataset -----------------------------------------------------------------------------------------


def read_attributes(path: Path, dataset: str) -> dict[str, Any]:
    """What a finished cache records of a dataset besides its arrays."""
    file = path / dataset / "zarr.json"
    try:
        return json.loads(file.read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from None


def _find(file: Path) -> dict[str, Any] | None:
    """A document that lists files, or None where it is missing or damaged."""
    try:
        found = json.loads(file.read_bytes())
        return found if all({"bytes", "crc32c"} <= entry.keys() for entry in found["files"].values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def require_format(version: Any, where: Path | str) -> None:
    """`UserError` for a version of the layout that is not read."""
    if version not in (FORMAT, KEPT_FORMAT):
        raise UserError(
            f"cache {where} has format {version}, this version reads {FORMAT} and {KEPT_FORMAT}; rebuild it"
        )


def _damaged(file: Path | str, error: Exception, remedy: str = "run `dvla cache repair` on the cache") -> UserError:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return UserError(f"{file} is damaged ({reason}); {remedy}")
