"""`dvla cache repair`: what is damaged is found by its checksum and built again, alone, with the settings the cache was built with.

Every file a builder wrote is in a commit record, so dropping the record of a damaged file turns the finished cache back into one that
is unfinished in just that place. The order makes an interrupted repair harmless: records are dropped first, then the manifest.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....cache.loader.provenance import sources_of
from ....cache.store.checksums import damaged_files
from ....cache.store.codec import channel_scale
from ....cache.store.manifest import (
    FINGERPRINT,
    MANIFEST,
    Files,
    commit_records,
    find_manifest,
    is_finished,
    manifest_document,
    read_attributes,
    read_commit,
    read_fingerprint,
    read_plan,
    scale_commit,
    shard_commit,
    tables_commit,
)
from ....cache.store.plan import BuildPlan, units
from ....cache.store.writer import CacheWriter
from ....cache.store.zarr_format import open_table, write_table
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....cache.vlm.load import load_encoder
from ....cache.vlm.spec import EncoderSpec
from ....common import fingerprint as fp
from ....common.config import from_mapping
from ....common.device import pick_device
from ....common.files import file_crc32c
from ....errors import UserError
from ..build_plan import make_fingerprint, make_plan
from ..calibration import pilot_features
from ..config import BuildConfig
from ..generations import Earlier, generations
from ..pipeline import run_unit
from ..sources import Corpus, Progress, make_tables, read_corpus
from .garbage import no_builder

CHANNELS = "channel_scale"  # the channel scales of an 8-bit cache
PLACES = (
    "source",
    "encoder",
    "config",
)  # attributes that are kept: a folder that moved, or views named now, change no byte
NEEDED = (*PLACES, "views")  # attributes of a dataset that say how it was built


@dataclass(frozen=True)
class RepairReport:
    """What was wrong and what was done."""

    damaged: dict[str, str]  # file → what was wrong with it
    shards: int  # built again
    tables: tuple[str, ...]  # datasets whose tables were written again
    other_bytes: tuple[str, ...]  # files whose new bytes are not the old ones, though the settings are
    whole: bool = False  # nothing had to be done

    @property
    def parts(self) -> str:
        """For people: what was written again."""
        return parts(self.shards, self.tables)


@dataclass(frozen=True)
class _Findings:
    """What is wrong with a cache, and what has to be built for it."""

    written: Files  # all files, as they were written
    damaged: dict[str, str]
    drop: tuple[Path, ...]  # commit records that go
    shards: int
    tables: tuple[str, ...]
    channels: bool  # the channel scales are among it
    whole: bool  # nothing at all is wrong


def repair(
    path: Path,
    sources: Sequence[str] = (),
    vlm_path: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
    progress: Progress = lambda *_: None,
) -> RepairReport:
    """Find and rebuild what is damaged or missing in the cache at `path`; an interrupted repair or build is finished with it.

    `sources` and `vlm_path` where these are not where they were. `UserError`, before anything is touched, when the sources or the
    VLM are not those of the cache (the differing fields are named), or while a builder runs.
    """
    plan, cached = read_plan(path), read_fingerprint(path)
    with no_builder(path):
        found = _examine(path, plan, cached, progress)
        if found.whole:
            return RepairReport({}, 0, (), (), whole=True)
        for name, problem in sorted(found.damaged.items()):
            say(f"{name}: {problem}")
        job = None
        if found.shards or found.tables or found.channels:
            job = _Job.prepare(path, plan, cached, found, sources, vlm_path, device, progress)
        say(f"building again: {parts(found.shards, found.tables)}")
        try:
            for record in found.drop:
                record.unlink()
            (path / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot repair {path}: {error.strerror}; it must be writable") from None
    with CacheWriter.create_or_resume(
        path, {key: value for key, value in cached.items() if key != "store"}, plan
    ) as writer:
        if job is not None:
            job.run(writer, progress)
        manifest = writer.finish()
    other = tuple(name for name, entry in sorted(manifest["files"].items()) if found.written.get(name, entry) != entry)
    return RepairReport(found.damaged, found.shards, found.tables, other)


def parts(shards: int, tables: Sequence[str]) -> str:
    """For people: so many shards, the tables of these datasets, and the metadata, which is always written again."""
    named = [f"{shards} shard{'s' * (shards != 1)}"] if shards else []
    return ", ".join([*named, *([f"the tables of {', '.join(tables)}"] if tables else []), "the metadata"])


# --- finding -------------------------------------------------------------------------------------------------------------


def _examine(path: Path, plan: BuildPlan, cached: dict[str, Any], progress: Progress) -> _Findings:
    """Check every file against its commit record, or the manifest where it has none. Nothing is changed."""
    records, manifest = commit_records(path), find_manifest(path)
    if manifest is not None and not records:
        raise UserError(
            f"cache {path} has no commit records (.commits), as after a copy without hidden files; copy the whole folder again"
        )
    committed: Files = {name: entry for r in records.values() if r is not None for name, entry in r["files"].items()}
    written = {**(manifest["files"] if manifest else {}), **committed}
    damaged = damaged_files(path, written, lambda done, total: progress("checksums", done, total))
    if FINGERPRINT in damaged:
        raise UserError(
            f"{path}/{FINGERPRINT} is damaged, and it alone says what the cache was built from; put back a copy of it, or build again"
        )
    agrees = (
        manifest is not None
        and _describes(manifest, plan, cached)
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


def _describes(manifest: dict[str, Any], plan: BuildPlan, cached: dict[str, Any]) -> bool:
    """Whether what the manifest says of the cache is so."""
    try:
        quarantined = {d["name"]: d["quarantined"] for d in manifest["datasets"]}
        expected = manifest_document(plan, cached, manifest["files"], quarantined)
    except (KeyError, TypeError):
        return False
    return all(manifest.get(key) == value for key, value in expected.items())


def _attributes_agree(path: Path, file: Path, record: dict[str, Any], damaged: dict[str, str], agrees: bool) -> bool:
    """Whether a record of tables holds the attributes that the dataset's metadata, known to be whole, holds too."""
    dataset = file.parent.name
    if file != tables_commit(path, dataset) or not agrees or f"{dataset}/zarr.json" in damaged:
        return True
    stored = {k: v for k, v in read_attributes(path, dataset).items() if k != "quarantined"}
    return record.get("attributes") == stored


# --- building again ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Described:
    """As much of a cached dataset as opening its source takes; its tables may be damaged."""

    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class _Recorded:
    """As much of a cache as `sources_of` asks for."""

    path: Path
    datasets: tuple[_Described, ...]


@dataclass(frozen=True)
class _Job:
    """What building the missing parts takes, checked to be what the cache was built from."""

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
    ) -> _Job:
        """Open sources and VLM as the cache has them recorded. `UserError` when they are others."""
        described = _Recorded(path, tuple(_Described(d.name, _attributes(path, d.name, found)) for d in plan.datasets))
        spec = from_mapping(EncoderSpec, described.datasets[0].attributes["encoder"], "cache")
        opened = sources_of(described, tuple(sources))  # type: ignore[arg-type]
        encoder = load_encoder(dataclasses.replace(spec, path=vlm_path) if vlm_path else spec, pick_device(device))
        corpora = tuple(read_corpus(source, encoder.by_observation, progress) for source in opened)
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
        if lines := fp.diff(cached, now):
            more = f"; … {len(lines) - 8} more" if len(lines) > 8 else ""
            raise UserError(
                f"cache {path} was not built from these sources and this VLM: {'; '.join(lines[:8])}{more}. Give those it was built from "
                "(--source, --vlm-path), or build it again"
            )
        channels = _channels(path, plan, found, corpora, encoder) if found.channels else None
        return cls(config.batch_size, encoder, corpora, {d.name: d.attributes for d in described.datasets}, channels)

    def run(self, writer: CacheWriter, progress: Progress) -> None:
        """Write the tables and shards that are missing."""
        channels = writer.channel_scale(lambda: self.channels)  # type: ignore[arg-type, return-value]
        by_name = {c.plan.name: c for c in self.corpora}
        for name in writer.tables_missing():
            tables = make_tables(by_name[name], self.encoder)
            before = {key: self.attributes[name][key] for key in PLACES}
            writer.write_tables(name, dataclasses.replace(tables, attributes={**tables.attributes, **before}))
        todo, done = units(writer.missing(), self.encoder.by_observation), 0
        total = sum(unit.records for unit in todo)
        for unit in todo:
            run_unit(
                writer,
                unit,
                by_name[unit.dataset].source,
                self.encoder,
                self.batch_size,
                channels,
                Earlier(None),
                lambda records: progress("repair", done + records, total),
            )
            done += unit.records


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
        f"neither {path}/{metadata} nor its commit record says what dataset {dataset} was built from; build the cache again"
    )


def _channels(
    path: Path, plan: BuildPlan, found: _Findings, corpora: Sequence[Corpus], encoder: VisionLanguageEncoder
) -> np.ndarray:
    """float32 [D]: the channel scales again, from an earlier generation that has the same or measured. Every code depends on them: where
    they cannot be had to the bit, `UserError`."""
    name = f"{CHANNELS}/c/0"
    entry = found.written.get(name)
    for folder in generations(path):
        if entry and (folder / name).exists() and file_crc32c(folder / name) == (entry["bytes"], entry["crc32c"]):
            return np.array(open_table(folder / CHANNELS))
    scales = channel_scale(pilot_features(corpora, plan, encoder))
    with tempfile.TemporaryDirectory() as scratch:
        written = write_table(Path(scratch) / CHANNELS, scales, ("channel",))[Path(scratch) / name]
    if entry and written != (entry["bytes"], entry["crc32c"]):
        raise UserError(
            f"{path}/{name} is damaged, and the channel scales measured now are not those its features were stored with (another "
            "machine, or episodes were appended since); put back a copy of it, or build the cache again"
        )
    return scales
