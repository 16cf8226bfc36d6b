"""`dvla cache repair`: damage is found by checksums, and the damaged parts alone are rebuilt with the cache's settings.

Every file that a builder wrote is in a commit record, so dropping the record of a damaged file makes the finished cache
unfinished in just that place. An interrupted repair is harmless: records are dropped first, then the manifest.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ....cache.actions.selection import Selection
from ....cache.loader.provenance import sources_of
from ....cache.store.checksums import damaged_files, incomplete
from ....cache.store.codec import channel_scale
from ....cache.store.manifest import (
    FINGERPRINT,
    MANIFEST,
    Files,
    commit_records,
    find_manifest,
    is_finished,
    plan_of,
    read_commit,
    read_fingerprint,
    scale_commit,
    shard_commit,
    tables_commit,
)
from ....cache.store.plan import BuildPlan, units
from ....cache.store.writer import CacheWriter
from ....cache.store.zarr_format import CHANNELS, open_table, read_attributes, write_table
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....common import fingerprint as fp
from ....common.files import file_crc32c
from ....common.progress import Progress
from ....common.text import in_megabytes
from ....errors import UserError
from ..build import CameraProgress, run_here
from ..build_plan import make_fingerprint, make_plan
from ..calibration import pilot_features
from ..config import BuildConfig
from ..generations import Earlier, generations
from ..quarantine import USUAL, require_few
from ..sources import Corpus, choose_episodes, make_tables, read_corpus
from .garbage import no_builder
from .verify import recorded_encoder

PLACES = ("source", "encoder", "config")  # attributes that are kept: folders that moved, or views named now
NEEDED = (*PLACES, "views")  # attributes of a dataset that say how it was built


@dataclass(frozen=True)
class RepairReport:
    """What was wrong and what was done."""

    damaged: dict[str, str]  # file → what was wrong with it
    shards: int  # built again
    tables: tuple[str, ...]  # datasets whose tables were written again
    other_bytes: tuple[str, ...]  # files whose new bytes are not the old ones, though the settings are
    intact: bool = False  # nothing had to be done

    @property
    def parts(self) -> str:
        """What was written again, for people."""
        return parts(self.shards, self.tables)


@dataclass(frozen=True)
class _Findings:
    """What is wrong with a cache, and what has to be rebuilt."""

    written: Files  # all files, as they were written
    damaged: dict[str, str]
    drop: tuple[Path, ...]  # commit records that go
    shards: int
    tables: tuple[str, ...]
    channels: bool  # the channel scales are damaged
    intact: bool


def repair(
    path: Path,
    sources: Sequence[str] = (),
    vlm_path: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
    progress: Progress = lambda *_: None,
    allow_quarantine: bool = False,
) -> RepairReport:
    """Find and rebuild what is damaged or missing in the cache at `path`; an interrupted build or repair is finished.

    `sources`, `vlm_path`: where they are now, if they moved. `UserError`, before anything is touched, when the sources
    or the VLM are not those of the cache (the differing fields are named), or while a builder runs.
    `TooManyQuarantined` as from a build, for one that it was to finish, unless `allow_quarantine`.
    """
    cached, finished = read_fingerprint(path), is_finished(path)
    plan = plan_of(cached, path / FINGERPRINT)
    with no_builder(path):
        found = _examine(path, plan, cached, progress)
        if found.intact:
            return RepairReport({}, 0, (), (), intact=True)
        for name, problem in sorted(found.damaged.items()):
            say(f"{name}: {problem}")
        job = None
        if found.shards or found.tables or found.channels:
            job = _Job.prepare(path, plan, cached, found, sources, vlm_path, device, progress, say)
        say(f"rebuilding {parts(found.shards, found.tables)}")
        try:
            for record in found.drop:
                record.unlink()
            (path / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot repair {path}: {error.strerror}; it must be writable") from None
    settings = {key: value for key, value in cached.items() if key != "store"}
    with CacheWriter.create_or_resume(path, settings, plan) as writer:
        if job is not None:
            job.run(writer, progress)
        if not (finished or allow_quarantine):
            require_few(path, plan, writer.quarantined(), USUAL)
        manifest = writer.finish()
    other = tuple(name for name, entry in sorted(manifest["files"].items()) if found.written.get(name, entry) != entry)
    return RepairReport(found.damaged, found.shards, found.tables, other)


def parts(shards: int, tables: Sequence[str]) -> str:
    """The shards, tables of datasets, and metadata (always written again), for people."""
    named = [f"{shards} shard{'s' * (shards != 1)}"] if shards else []
    return ", ".join([*named, *([f"the tables of {', '.join(tables)}"] if tables else []), "the metadata"])


# --- finding ----------------------------------------------------------------------------------------------------------


def _examine(path: Path, plan: BuildPlan, cached: dict[str, Any], progress: Progress) -> _Findings:
    """Check every file against its commit record, or the manifest where it has none. Nothing is changed."""
    records, manifest = commit_records(path), find_manifest(path)
    if manifest is not None and not records:
        raise UserError(f"copy the whole folder of {path} again, hidden files too: it has no commit records (.commits)")
    committed: Files = {name: entry for r in records.values() if r is not None for name, entry in r["files"].items()}
    written = {**(manifest["files"] if manifest else {}), **committed}
    damaged = damaged_files(path, written, in_megabytes(progress, "checksums"))
    if FINGERPRINT in damaged:
        raise UserError(
            f"put back a copy of {path}/{FINGERPRINT}, or build again: it is damaged, and nothing else tells what the "
            "cache was built from"
        )
    agrees = (
        manifest is not None
        and not incomplete(path, manifest, cached)
        and all(manifest["files"].get(n) == e for n, e in committed.items())
    )
    if not agrees and is_finished(path):
        damaged[MANIFEST] = "cannot be read, or is not what the build wrote"
    drop = []
    for file, record in records.items():
        if record is None or not _attributes_agree(path, file, record, damaged, agrees):
            damaged[file.relative_to(path).as_posix()] = "cannot be read, or is not what the build wrote"
            drop.append(file)
        elif damaged.keys() & record["files"].keys():
            drop.append(file)
    gone, begun = set(drop), CacheWriter(path, plan, None)
    shards = {t for t in plan.tasks() if shard_commit(path, t) in gone} | set(begun.missing())
    tables = {d.name for d in plan.datasets if tables_commit(path, d.name) in gone} | set(begun.tables_missing())
    scales = scale_commit(path)
    channels = plan.format.quantized and (scales in gone or not scales.exists())
    return _Findings(
        written,
        damaged,
        tuple(drop),
        len(shards),
        tuple(sorted(tables)),
        channels,
        agrees and not (damaged or shards or tables or channels),
    )


def _attributes_agree(path: Path, file: Path, record: dict[str, Any], damaged: dict[str, str], agrees: bool) -> bool:
    """Whether a record of tables holds the attributes that the dataset's metadata, known to be intact, holds too."""
    dataset = file.parent.name
    if file != tables_commit(path, dataset) or not agrees or f"{dataset}/zarr.json" in damaged:
        return True
    stored = {k: v for k, v in read_attributes(path, dataset).items() if k != "quarantined"}
    return record.get("attributes") == stored


# --- rebuilding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What rebuilding takes, checked to be what the cache was built from."""

    batch_size: int
    encoder: VisionLanguageEncoder
    corpora: tuple[Corpus, ...]
    attributes: dict[str, dict[str, Any]]
    channels: np.ndarray | None  # float32 [D], when those of the cache are damaged

    @classmethod
    def prepare(
        cls,
        path: Path,
        plan: BuildPlan,
        cached: dict[str, Any],
        found: _Findings,
        sources: Sequence[str],
        vlm_path: str | None,
        device: str,
        progress: Progress,
        say: Callable[[str], None],
    ) -> _Job:
        """Open the sources and the VLM that the cache names. `UserError` when they are not those it was built from."""
        attributes = {d.name: _attributes(path, d.name, found) for d in plan.datasets}
        # as much of a cache as opening its sources takes; its tables may be damaged
        described = SimpleNamespace(
            path=path, datasets=[SimpleNamespace(name=n, attributes=a) for n, a in attributes.items()]
        )
        opened = sources_of(described, tuple(sources))  # type: ignore[arg-type]
        choose_episodes(opened, Selection(), cached)
        encoder = recorded_encoder(next(iter(attributes.values())), vlm_path, device, say)
        corpora = tuple(read_corpus(source, encoder.reads, progress) for source in opened)
        config = BuildConfig(
            tuple(sources),
            encoder.spec,
            path,
            cached["batch_size"],
            plan.shard_frames,
            device,
            format=plan.format,
            frame_stride=plan.frame_stride,
            augment=plan.variants,
        )
        now = {
            **make_fingerprint(encoder, corpora, config),
            "store": make_plan(config, [c.plan for c in corpora], encoder).document(),
        }
        if lines := fp.diff(cached, now, now="found"):
            more = f"; … {len(lines) - 8} more" if len(lines) > 8 else ""
            raise UserError(
                f"cache {path} was not built from these sources and this VLM: {'; '.join(lines[:8])}{more}. Give the "
                "right --source and --vlm-path, or build it again"
            )
        channels = _channels(path, plan, found, corpora, encoder) if found.channels else None
        return cls(config.batch_size, encoder, corpora, attributes, channels)

    def run(self, writer: CacheWriter, progress: Progress) -> None:
        """Write the tables and shards that are missing."""
        channels = writer.channel_scale(lambda: self.channels)  # type: ignore[arg-type, return-value]
        by_name = {c.plan.name: c for c in self.corpora}
        for name in writer.tables_missing():
            tables = make_tables(by_name[name], self.encoder)
            before = {key: self.attributes[name][key] for key in PLACES}
            writer.write_tables(name, dataclasses.replace(tables, attributes={**tables.attributes, **before}))
        todo = units(writer.missing(), self.encoder.by_observation)
        shown, sources = CameraProgress(todo, progress), {name: c.source for name, c in by_name.items()}
        none = Earlier(None)
        for unit, _ in run_here(writer, todo, sources, self.encoder, self.batch_size, channels, none, shown):
            shown.finish(unit)


def _attributes(path: Path, dataset: str, found: _Findings) -> dict[str, Any]:
    """How the dataset was built: from its metadata, or from the commit record of its tables where that is damaged."""
    record, metadata = tables_commit(path, dataset), f"{dataset}/zarr.json"
    recorded = []
    if metadata not in found.damaged and (path / metadata).exists():
        recorded.append(read_attributes(path, dataset))
    if record.relative_to(path).as_posix() not in found.damaged and record.exists():
        recorded.append(read_commit(record).get("attributes", {}))
    for attributes in recorded:
        if all(key in attributes for key in NEEDED):
            return attributes
    raise UserError(
        f"build cache {path} again: neither {metadata} nor its commit record tells what {dataset} was built from"
    )


def _channels(
    path: Path, plan: BuildPlan, found: _Findings, corpora: Sequence[Corpus], encoder: VisionLanguageEncoder
) -> np.ndarray:
    """float32 [D]: the channel scales, from an earlier generation with the same, or measured again.

    Every code depends on them: `UserError` where they cannot be recovered to the bit.
    """
    name = f"{CHANNELS}/c/0"
    entry = found.written.get(name)
    for folder in generations(path):
        if entry and (folder / name).exists() and file_crc32c(folder / name) == (entry["bytes"], entry["crc32c"]):
            return np.array(open_table(folder, CHANNELS, ((plan.width,), "float32")))
    scales = channel_scale(pilot_features(corpora, plan, encoder))
    with tempfile.TemporaryDirectory() as scratch:
        written = write_table(Path(scratch) / CHANNELS, scales, ("channel",))[Path(scratch) / name]
    if entry and written != (entry["bytes"], entry["crc32c"]):
        raise UserError(
            f"put back a copy of {path}/{name}, or build the cache again: the file is damaged, and the channel scales "
            "measured now are not the same (another machine, or episodes were appended since)"
        )
    return scales
