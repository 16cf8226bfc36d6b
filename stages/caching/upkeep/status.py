"""`dvla cache status`: unfinished, finished, next and earlier generations, as they lie on the disk."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....cache.store.manifest import (
    FINGERPRINT,
    find_manifest,
    has_size,
    is_begun,
    plan_of,
    read_commit,
    read_fingerprint,
    shard_commit,
    tables_commit,
)
from ....cache.store.writer import CacheWriter
from ....cache.store.zarr_format import features_folder, scales_folder
from ....common import fingerprint as fp
from ....common.documents import open_regular
from ..generations import generations, next_generation
from ..sizes import plan_nbytes

TEMPORARY = ".*.tmp-*"  # of a shard or table that is being written, or was when its builder was killed


@dataclass(frozen=True)
class ArrayStatus:
    """Features of one view, or of an augmented variant of it. `bytes` of the shards that are done."""

    dataset: str
    array: str
    done: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class CacheStatus:
    """One folder that holds a cache, finished or not."""

    path: str
    finished: bool  # it has a manifest, and nothing is missing
    building: bool  # a builder holds the lock
    frames: int
    episodes: int
    arrays: tuple[ArrayStatus, ...]
    tables_missing: tuple[str, ...]  # datasets without tables
    bytes: int  # done
    planned_bytes: int  # of all of it, before compression
    quarantined: int  # episodes, as far as known
    leftovers: int  # temporary files, of a running builder or of one that was killed
    fingerprint: dict[str, Any]  # what it was built from, in short

    @property
    def shards(self) -> tuple[int, int]:
        """(done, all)."""
        return sum(a.done for a in self.arrays), sum(a.shards for a in self.arrays)


def status(path: Path) -> list[CacheStatus]:
    """The cache at `path`, its next generation if one is being built, and its earlier ones, oldest last.

    `UserError` if there is none.
    """
    following = next_generation(path)
    found = [p for p in (path, following) if is_begun(p)]
    if not found:
        read_fingerprint(path)  # raises what is wrong
    return [one_status(p) for p in [*found, *reversed(generations(path))]]


def one_status(path: Path) -> CacheStatus:
    """The status of one folder, from its commit records and the sizes of its files."""
    document = read_fingerprint(path)
    plan = plan_of(document, path / FINGERPRINT)
    manifest = find_manifest(path)
    written: dict[str, dict[str, int]] = manifest["files"] if manifest else {}
    missing = set() if manifest else set(CacheWriter(path, plan, None).missing())
    counts: dict[tuple[str, str], list[int]] = {}
    lines = {(d.name, episode) for d in plan.datasets for episode, _ in d.quarantined}
    total = sum(entry["bytes"] for name, entry in written.items() if has_size(path / name, entry))
    for task in plan.tasks():
        row = counts.setdefault((task.dataset, task.array), [0, 0, 0])
        row[1] += 1
        if manifest:
            names = [f"{features_folder(Path(), task.dataset, task.array).as_posix()}/c/{task.index}/0/0"]
            if plan.format.quantized:
                names.append(f"{scales_folder(Path(), task.dataset, task.array).as_posix()}/c/{task.index}/0")
            done = all(name in written and has_size(path / name, written[name]) for name in names)
            nbytes = sum(written[name]["bytes"] for name in names) if done else 0
        else:
            done = task not in missing
            record = read_commit(shard_commit(path, task)) if done else {"files": {}, "quarantined": []}
            lines |= {(task.dataset, episode) for episode, _ in record.get("quarantined", [])}
            nbytes = sum(entry["bytes"] for entry in record["files"].values())
            total += nbytes
        row[0] += done
        row[2] += nbytes
    arrays = tuple(ArrayStatus(dataset, array, *row) for (dataset, array), row in counts.items())
    tables = tuple(CacheWriter(path, plan, None).tables_missing()) if not manifest else ()
    for d in plan.datasets if not manifest else ():
        if d.name not in tables:
            total += sum(e["bytes"] for e in read_commit(tables_commit(path, d.name))["files"].values())
    finished = manifest is not None and all(has_size(path / name, entry) for name, entry in written.items())
    return CacheStatus(
        str(path),
        finished,
        locked(path),
        sum(d.frames for d in plan.datasets),
        sum(len(d.episodes) for d in plan.datasets),
        arrays,
        tables,
        total,
        plan_nbytes(plan),
        manifest["quarantine_count"] if manifest else len(lines),
        sum(1 for _ in path.rglob(TEMPORARY)),
        summary(document),
    )


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint in a few fields; the weights by the first digits of their hash."""
    encoder, store = document.get("encoder", {}), document["store"]
    names = ("vlm", "features", "depth", "layers", "layers_as", "keep", "queries", "boundary", "resolution")
    short = {name: encoder[name] for name in names if name in encoder}
    weights = encoder.get("weights_sha256", encoder.get("weights"))
    return {
        **short,
        **({"weights": str(weights)[:12]} if weights else {}),
        "tokens": store["tokens"],
        "width": store["width"],
        "dtype": store["dtype"],
        "compression": store["compression"],
        "frame_stride": store["frame_stride"],
        "variants": store["variants"],
        "digest": fp.digest(document)[:12],
    }


def locked(path: Path) -> bool:
    """Whether a builder holds the cache's lock. Looking takes a shared lock for a moment."""
    try:
        with open(open_regular(path / ".lock"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none, or no lock
        return False
    return False
