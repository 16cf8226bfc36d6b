"""`dvla cache export` and `dvla cache import`: a finished cache as WebDataset tars and back, byte for byte.

cache/store/webdataset/samples.py describes the tars. An import writes through `CacheWriter`: it resumes like a build,
and its files are those of the exported cache, manifest included. There are two exceptions: compressed records are
compressed again, and another version of zstd or lz4 may give other bytes; and the metadata of arrays is written as this
version of dvla writes it. The content is equal all the same, and the report counts such files. Any other difference is
refused.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....cache.store.cache import Cache
from ....cache.store.dataset import CacheDataset
from ....cache.store.locations import Place, creating, errors, fetch
from ....cache.store.manifest import commit_records, json_bytes, plan_of
from ....cache.store.plan import BuildPlan, Pair, ShardTask
from ....cache.store.webdataset.cache import WebDatasetCache, WebDatasetDataset, read_index
from ....cache.store.webdataset.samples import (
    BLOCK_NBYTES,
    Files,
    meta_samples,
    observation_samples,
    sample_nbytes,
    tables_of,
)
from ....cache.store.webdataset.tars import (
    EXPORT_FORMAT,
    INDEX,
    META,
    Claim,
    Entry,
    TarEntry,
    labels,
    open_place,
    write_tar,
)
from ....cache.store.writer import CacheWriter, Features
from ....common import fingerprint as fp
from ....common.documents import MOST_BYTES, parse_json
from ....common.progress import Progress
from ....errors import UserError, unknown

FORMATS = ("webdataset",)
CLAIM = ".export.json"  # whose unfinished export a folder holds


@dataclass
class ExchangeReport:
    """What an export or import did."""

    where: str
    samples: int = 0  # observations
    parts: int = 0  # tars of an export, shards of an import
    found: int = 0  # of them, there already
    bytes: int = 0
    rewritten: int = 0  # files of an import with the content, but not the bytes, of the exported cache's (see above)
    seconds: float = 0.0


def export(
    path: Path, out: str, format: str = "webdataset", shard_nbytes: int = 1 << 30, progress: Progress = lambda *_: None
) -> ExchangeReport:
    """Write the finished cache at `path` as tars of about `shard_nbytes` to a folder, fsspec URL or pipe; resumable.

    `UserError` when a file of the cache is damaged, or `out` holds something else.
    """
    if format not in FORMATS:
        raise unknown("--format", format, FORMATS)
    began, cache, place = time.perf_counter(), Cache.open(path), open_place(out)
    claim = {"export": EXPORT_FORMAT, "cache": fp.digest(cache.manifest), "shard_nbytes": shard_nbytes}
    views = {d.name: labels(d.views) for d in cache.datasets}
    report, files = ExchangeReport(place.where, sum(d.observations for d in cache.datasets)), Files(cache)
    with place.locked():
        tars = _Tars(place, _finished(place, claim), report)
        meta = tars.write(META, lambda: meta_samples(cache, files))
        shards: list[Entry] = []
        quarantine: list[Entry] = []
        for dataset in cache.datasets:
            keys = views[dataset.name]
            per_tar = max(1, shard_nbytes // sample_nbytes(dataset, keys))
            bad = np.repeat(dataset.quarantined, dataset.episode_observations)  # [observations]
            for entries, chosen, prefix in ((shards, ~bad, ""), (quarantine, bad, "_quarantine-")):
                for name, rows in _parts(prefix + dataset.name, np.flatnonzero(chosen), per_tar):
                    entry = tars.write(name, lambda: observation_samples(dataset, keys, rows, files))
                    entries.append({**entry, "dataset": dataset.name})
                    tars.done += len(rows)
                    progress("export: observations", tars.done, report.samples)
        own = {**claim, "meta": meta, "quarantine": quarantine, "views": views}
        index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards, "dvla": own}
        _write_json(place, INDEX, index)
        _remove_records(place, [meta, *shards, *quarantine])
    report.seconds = time.perf_counter() - began
    return report


class _Tars:
    """The tars of one export: those that an earlier run has finished are kept."""

    def __init__(self, place: Place, finished: dict[str, Entry], report: ExchangeReport) -> None:
        self._place, self._finished, self._report = place, finished, report
        self.done = 0  # observations

    def write(self, name: str, samples: Callable[[], Iterator[dict[str, Any]]]) -> Entry:
        """Write the tar, or find it written; returns its entry in the index."""
        entry = self._finished.get(name)
        if entry is not None and _size(self._place, name) == entry["filesize"]:
            self._report.found += 1
        else:
            entry = write_tar(self._place, name, samples())
            if self._place.resumable:
                _write_json(self._place, _record(name), entry)
        self._report.parts += 1
        self._report.bytes += entry["filesize"]
        return entry


def _parts(stem: str, rows: np.ndarray, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name of the tar, its rows), at most `size` of them each."""
    for i, begin in enumerate(range(0, len(rows), size)):
        yield f"{stem}-{i:06d}.tar", rows[begin : begin + size]


def _remove_records(place: Place, entries: Sequence[Entry]) -> None:
    """Remove what only an unfinished export needs."""
    for name in [*(_record(e["url"]) for e in entries), CLAIM] if place.resumable else ():
        if _size(place, name) is not None:
            with errors("remove", place.url(name)):
                place.remove(name)


def _record(tar: str) -> str:
    """The file that marks a tar as finished, until the index does."""
    return f".{tar}.json"


def _size(place: Place, name: str) -> int | None:
    with errors("look for", place.url(name)):
        return place.size(name)


def _write_json(place: Place, name: str, document: dict[str, Any]) -> None:
    with creating(place, name) as sink:
        sink.write(json_bytes(document))


def _read(place: Place, name: str, form: Any) -> dict[str, Any]:
    file, _, _ = fetch(place, name, Path("."))
    with file:
        return parse_json(file.read(MOST_BYTES + 1), place.url(name), form, "remove it and rerun")


def _finished(place: Place, claim: dict[str, Any]) -> dict[str, Entry]:
    """The tars an earlier run of the same export has finished; `UserError` when `place` holds anything else."""
    if not place.resumable:
        return {}
    with errors("list", place.where):
        names = [n for n in place.names() if ".tmp-" not in n]
    if INDEX in names:
        index = read_index(place, Path("."))
        mine = index["dvla"]
        entries = [mine.get("meta"), *index.get("shardlist", []), *mine.get("quarantine", [])]
    elif CLAIM in names:
        mine = _read(place, CLAIM, Claim)
        entries = [_read(place, n, TarEntry) for n in names if n.startswith(".") and n.endswith(".tar.json")]
    elif names:
        raise UserError(f"{place.where} holds other files ({', '.join(sorted(names)[:3])}); choose another --out")
    else:
        mine, entries = claim, []
    if different := [key for key in claim if mine.get(key) != claim[key]]:
        what = {"shard_nbytes": "with another --shard-size", "cache": "of another cache"}.get(
            different[0], "of another version"
        )
        raise UserError(f"{place.where} holds an export {what}; choose another --out, or remove it")
    if INDEX not in names and CLAIM not in names:
        _write_json(place, CLAIM, claim)
    return {e["url"]: {key: e[key] for key in ("url", "nsamples", "filesize", "crc32c")} for e in entries}


def import_cache(source: str, out: Path, progress: Progress = lambda *_: None) -> ExchangeReport:
    """Build the exported cache at `out`; resumable.

    `UserError` naming a tar that is missing, truncated or altered, and for an `out` that holds something else.
    """
    began = time.perf_counter()
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write a cache at {out}: {error.strerror}; choose another --out") from None
    exported = WebDatasetCache.open(source, out.absolute().parent, check=True)
    report = ExchangeReport(str(out))
    plan = plan_of(exported.fingerprint, source)
    settings = {key: value for key, value in exported.fingerprint.items() if key != "store"}
    ledger = exported.tars.json(META, "cache/store.quarantine.json", dict[str, list[Pair]])
    with _sense(source), CacheWriter.create_or_resume(out, settings, plan) as writer:
        order = [d.name for d in plan.datasets]
        missing = sorted(writer.missing(), key=lambda t: (order.index(t.dataset), t.index))  # each tar is fetched once
        report.parts = len(plan.tasks())
        report.found, total, done = report.parts - len(missing), sum(t.stop - t.start for t in missing), 0
        writer.channel_scale(lambda: exported.datasets[0].channel_scale)  # type: ignore[arg-type, return-value]
        for name in writer.tables_missing():
            writer.write_tables(name, tables_of(exported.named(name)))
        for task in missing:
            bad = [(episode, reason) for episode, reason in ledger.get(f"{task.dataset}/{task.array}/{task.index}", [])]
            writer.write_shard(task, _chunks(exported, exported.named(task.dataset), task), bad)
            done += task.stop - task.start
            progress("import: images", done, total)
        if not writer.complete:
            report.rewritten = _compare(out, exported.manifest, plan, source)
        manifest = writer.finish()
    report.samples, report.bytes = sum(d.observations for d in exported.datasets), manifest["bytes"]
    report.seconds = time.perf_counter() - began
    return report


def _chunks(exported: WebDatasetCache, d: CacheDataset, task: ShardTask) -> Iterator[Features]:
    """A shard's records, in blocks."""
    assert isinstance(d, WebDatasetDataset)  # as all of an export
    size = max(1, BLOCK_NBYTES // d.format.record_nbytes(d.tokens, d.width))
    needed = {tar for tar, _ in d.places(d.frame_of(np.arange(task.start, task.stop)))}
    exported.tars.limit = 1 + len(needed)  # copies on disk
    for begin in range(task.start, task.stop, size):
        codes, scale = d.records(task.view, d.frame_of(np.arange(begin, min(begin + size, task.stop))), task.variant)
        yield codes if scale is None else (codes, scale)


def _compare(out: Path, manifest: dict[str, Any], plan: BuildPlan, source: str) -> int:
    """How many files have other bytes than the exported cache's but its content; `UserError` for other content."""
    files = {
        name: entry for record in commit_records(out).values() if record for name, entry in record["files"].items()
    }
    different = sorted(name for name, entry in files.items() if manifest["files"].get(name) != entry)
    compressed = plan.format.compression != "none"
    wrong = [
        n for n in different if not n.endswith("/zarr.json") and not (compressed and n.split("/")[1] == "features")
    ]
    if wrong:
        raise UserError(
            f"export the cache again, and remove {out}: {source} does not give back the exported cache ({wrong[0]} and "
            f"{len(wrong) - 1} other files differ; its tars and index were changed together)"
        )
    return len(different)


@contextlib.contextmanager
def _sense(source: str) -> Iterator[None]:
    """`UserError` for an export whose description makes no sense."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"export {source} again: it describes no cache that this version builds ({type(error).__name__}: {error})"
        ) from error
