"""The JSON documents of a cache folder: fingerprint, manifest, commit records. Nothing else opens them by name.

The fingerprint is written first, a commit record after each finished shard or table, the manifest last.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ...common import documents
from ...common import fingerprint as fp
from ...common.documents import (
    Count,
    Crc32c,
    Field,
    Form,
    OpenForm,
    Positive,
    parse_json,
    read_file,
    read_json,
    require_form,
    shown,
)
from ...common.files import crc32c
from ...errors import UserError
from .plan import FORMAT, KEPT_FORMAT, BuildPlan, Pair, Range, ShardTask, Store

FINGERPRINT, MANIFEST, QUARANTINE = "fingerprint.json", "manifest.json", "quarantine.jsonl"
_COMMITS = ".commits"
_REPAIR = "run `dvla cache repair` on the cache"
_NO_REPAIR = "restore a copy of it, or rebuild the cache"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_FILES = re.compile(rf"{_FILE.pattern}(\0{_FILE.pattern})*+")
Files = dict[str, dict[str, int]]  # name → {"bytes", "crc32c"} as written


class Entry(Form):
    """A file as it was written."""

    bytes: Count
    crc32c: Crc32c


class _Dataset(Form):
    name: str
    frames: Positive
    episodes: Positive
    views: Annotated[list[str], Field(min_length=1)]
    quarantined: Count


class Manifest(Form):
    """What `manifest_document` makes."""

    complete: Literal[True]
    format: int
    datasets: Annotated[list[_Dataset], Field(min_length=1)]
    files: dict[str, Entry]
    bytes: Count
    frames: Positive
    fingerprint: str
    quarantine_count: Count
    tokens: Positive
    width: Positive
    shard_frames: Positive
    dtype: str
    frame_stride: Positive
    variants: Count


class _Encoder(OpenForm):
    boundary: Positive | None = None


class _Selection(Form):
    include: str = ""
    exclude: str = ""
    frames: dict[str, list[Range]] = {}
    success_only: bool = False
    drop_idle: bool = False


class _Source(OpenForm):
    selection: _Selection | None = None


class Fingerprint(OpenForm):
    """The plan, and what a build adds (stages/caching/build_plan.py): most of that is only compared, as a whole."""

    store: Store
    encoder: _Encoder | None = None
    sources: dict[str, _Source] = {}
    batch_size: Positive = 1


class Commit(Form):
    """A commit record: "quarantined" of a shard, "attributes" of a dataset's tables."""

    files: dict[str, Entry]
    quarantined: list[Pair] = []
    attributes: dict[str, Any] = {}
    crc32c: Crc32c | None = None  # of the rest; earlier releases wrote none


class Keys(dict[str, Any]):
    """A mapping of a document whose missing keys are a `UserError`."""

    def __init__(self, values: Mapping[str, Any], where: Path | str) -> None:
        super().__init__(values)
        self._where = where

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._where} has no '{key}', which this needs; build the cache again")


def json_bytes(document: dict[str, Any]) -> bytes:
    """Readable JSON with a fixed byte form. `ValueError` for NaN or infinity."""
    return documents.json_bytes(document, allow_nan=False)


# --- fingerprint and plan --------------------------------------------------------------------------------------------


def is_begun(path: Path) -> bool:
    """Whether a build was started at `path`."""
    return (path / FINGERPRINT).exists()


def read_fingerprint(path: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the cache at `path`, finished or not, is built from. `UserError` where there is no readable cache.

    `manifest`: its own; what is not as it says was not written by the build.
    """
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder of a cache")
    if not path.is_dir():
        raise UserError(f"no cache at {path}; build one with `dvla cache build … --out {path}`")
    file = path / FINGERPRINT
    if not file.exists() and (path / "_meta.tar").exists():
        raise UserError(f"{path} is a WebDataset export; make a cache of it: `dvla cache import {path} --out CACHE`")
    if not file.exists():
        raise UserError(f"{path} is not a dvla cache (it has no {FINGERPRINT}); give a folder of `dvla cache build`")
    return parse_fingerprint(read_document(path, FINGERPRINT, manifest), file)


def parse_fingerprint(data: bytes, where: Path | str) -> dict[str, Any]:
    """The fingerprint in `data`. `UserError` naming `where` when it is damaged or of another format."""
    document = parse_json(data, where, remedy=_NO_REPAIR)
    if isinstance(store := document.get("store"), dict):
        require_format(store.get("format"), where)
    return Keys(require_form(document, where, Fingerprint, _NO_REPAIR), where)


def plan_of(fingerprint: Mapping[str, Any], where: Path | str) -> BuildPlan:
    """The plan in a fingerprint. `UserError` naming the document where it makes no sense."""
    try:
        plan = BuildPlan.from_document(fingerprint["store"])
        plan.check()
    except (ValueError, UserError) as error:
        raise UserError(f"{where} is damaged: {error}; {_NO_REPAIR}") from None
    return plan


# --- manifest --------------------------------------------------------------------------------------------------------


def is_finished(path: Path) -> bool:
    """Whether the cache at `path` has its manifest, which is written last."""
    return (path / MANIFEST).exists()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the finished cache at `path`. `UserError` where there is none this version reads."""
    return parse_manifest(manifest_bytes(path), path)


def manifest_bytes(path: Path) -> bytes:
    """The text of the manifest of the finished cache at `path`. `UserError` where there is none."""
    if not (is_begun(path) and is_finished(path)):
        read_fingerprint(path)  # raises unless a build was started here
        shards = sum(1 for _ in (path / _COMMITS).glob("*/*/*.json"))
        raise UserError(
            f"cache {path} is incomplete ({shards} shards are finished); "
            "rerun the same `dvla cache build` command to resume it"
        )
    return read_file(path / MANIFEST)


def parse_manifest(data: bytes, where: Path | str) -> dict[str, Any]:
    """The manifest in `data`, of the cache at `where`. `UserError` when it is damaged or of another format."""
    manifest: dict[str, Any] = parse_json(data, file := f"{where}/{MANIFEST}", remedy=_REPAIR)
    require_format(manifest.get("format"), where)
    require_form(manifest, file, Manifest, _REPAIR)
    require_inside(manifest["files"], file)
    for key, parts in (("bytes", manifest["files"].values()), ("frames", manifest["datasets"])):
        if (found := sum(part[key] for part in parts)) != manifest[key]:
            raise UserError(f"{file} is damaged: '{key}' is {manifest[key]}, its parts have {found}; {_REPAIR}")
    return manifest


def require_inside(names: Iterable[str], where: Path | str) -> None:
    """`UserError` for the name of a file that is outside the cache's folder, or of its manifest."""
    if (listed := list(names)) and MANIFEST not in listed and _FILES.fullmatch("\0".join(listed)):
        return  # a hundred thousand at once
    for name in listed:
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise UserError(f"{where} names {shown(name)}, which is outside the cache; it is damaged or malicious")


def read_document(path: Path, name: str, manifest: Mapping[str, Any] | None) -> bytes:
    """The bytes of a document of the cache at `path`. `UserError` unless they are as its `manifest` says."""
    data = read_file(path / name)
    if manifest is not None and {"bytes": len(data), "crc32c": crc32c(data)} != manifest["files"].get(name):
        raise UserError(f"{path / name} is damaged: it is not what the build wrote; {_REPAIR}")
    return data


def find_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of the cache at `path`; None where it is missing or damaged."""
    try:
        return parse_manifest(read_file(path / MANIFEST), path)
    except UserError:
        return None


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


def describes(manifest: Mapping[str, Any], plan: BuildPlan, fingerprint: dict[str, Any]) -> bool:
    """Whether what a manifest says of the cache, its files apart, is so."""
    quarantined = {d["name"]: d["quarantined"] for d in manifest["datasets"]}
    if quarantined.keys() != {d.name for d in plan.datasets}:
        return False
    expected = manifest_document(plan, fingerprint, manifest["files"], quarantined)
    return all(manifest[key] == value for key, value in expected.items())


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
    """A commit record, see `Commit`. `UserError` when damaged."""
    found: dict[str, Any] = read_json(record, Commit, _REPAIR)
    require_inside(found["files"], record)
    rest = {key: value for key, value in found.items() if key != "crc32c"}
    if found.get("crc32c") not in (None, _crc(rest)):
        raise UserError(f"{record} is damaged: it is not what the build wrote; {_REPAIR}")
    return found


def commit_document(files: Files, **more: Any) -> dict[str, Any]:
    """The commit record of the files written; see `Commit`."""
    return {"files": files, **more, "crc32c": _crc({"files": files, **more})}


def _crc(document: dict[str, Any]) -> int:
    return crc32c(fp.canonical(document).encode())


def commit_records(path: Path) -> dict[Path, dict[str, Any] | None]:
    """Every commit record of the cache at `path`, by its file; None for a damaged one."""
    return {file: _find(file) for file in sorted((path / _COMMITS).rglob("*.json"))}


def is_committed(path: Path, record: Path, names: Iterable[str]) -> bool:
    """Whether the record is there, lists the files `names`, and each has the size that was written."""
    found = _find(record)
    return (
        found is not None
        and found["files"].keys() == set(names)
        and all(has_size(path / name, entry) for name, entry in found["files"].items())
    )


def has_size(file: Path, entry: Mapping[str, int]) -> bool:
    """Whether the file is there with the size that was written."""
    try:
        found = os.stat(file)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == entry["bytes"]


def _find(record: Path) -> dict[str, Any] | None:
    """A commit record, or None where it is missing or damaged."""
    try:
        return read_commit(record)
    except UserError:
        return None


def require_format(version: Any, where: Path | str) -> None:
    """`UserError` for a version of the layout that is not read; what is no version, the form refuses."""
    if type(version) is int and version not in (FORMAT, KEPT_FORMAT):
        raise UserError(
            f"cache {where} has format {version}, this version reads {FORMAT} and {KEPT_FORMAT}; rebuild it"
        )
