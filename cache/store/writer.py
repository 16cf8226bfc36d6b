"""Building a feature cache, shard by shard, resumable after anything.

The file system is the truth. A shard is written under a temporary name, synced, renamed and then recorded in
`.commits/`; the manifest with `"complete": true` comes last. So a build may be killed at any moment and rerun, and
the finished bytes depend neither on the order of the work nor on restarts. Layout: zarr_format.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common import fingerprint as fp
from ...common.documents import read_json
from ...common.files import file_crc32c, lock_folder, names_full_disk, publish, temporary_name, write_file
from ...errors import Failed, UserError
from .manifest import (
    FINGERPRINT,
    MANIFEST,
    QUARANTINE,
    Files,
    commit_document,
    is_begun,
    is_committed,
    is_finished,
    json_bytes,
    manifest_document,
    read_commit,
    read_fingerprint,
    read_manifest,
    scale_commit,
    shard_commit,
    tables_commit,
)
from .plan import BuildPlan, DatasetTables, ShardTask
from .shard_writer import ShardWriter
from .validation import check_features, checked_arrays
from .zarr_format import (
    CHANNEL_NAMES,
    CHANNELS,
    ArrayForm,
    dataset_attributes,
    dataset_nodes,
    dimensions_of,
    features_folder,
    open_table,
    record_compression,
    root_document,
    scales_folder,
    shard_names,
    table_names,
    write_table,
)

PIECE_NBYTES = 1 << 20  # written at a time
Features = np.ndarray | tuple[np.ndarray, np.ndarray]  # float16, or (codes, token scales)


def require_place(path: Path) -> None:
    """`UserError` where `path` is a file or a folder of something else than a cache."""
    if path.is_file():
        raise UserError(f"{path} is a file; choose another --out")
    others = [n for n in os.listdir(path) if n != ".lock" and ".tmp-" not in n] if path.is_dir() else []
    if others and not is_begun(path):
        raise UserError(f"{path} holds other files ({', '.join(sorted(others)[:3])}); choose another --out")


class CacheWriter:
    """The one builder of a cache. Use as a context manager; make it with `create_or_resume`.

    Work: `write_shard` for every task of `missing()`, `write_tables` for every name of `tables_missing()`, `finish()`.
    """

    def __init__(self, path: Path, plan: BuildPlan, lock: Any) -> None:
        self.path, self.plan, self._lock = path, plan, lock
        self._datasets = {d.name: d for d in plan.datasets}

    @classmethod
    def create_or_resume(cls, path: Path | str, fingerprint: dict[str, Any], plan: BuildPlan) -> CacheWriter:
        """Start a cache at `path`, or resume the build that was started there with the same fingerprint and plan.

        `fingerprint` is JSON; the plan is added under "store". `UserError` when `path` holds something else, was built
        from other settings (the differing fields are named) or is being built by another process. Nothing of value is
        deleted: only temporary files of a killed builder, and the manifest when a listed shard has disappeared.
        """
        path = Path(path)
        plan.check()
        if "store" in fingerprint:
            raise ValueError('the fingerprint key "store" is the plan\'s own')
        asked = {**fingerprint, "store": plan.document()}
        writer = cls(path, plan, None)
        if writer.complete:
            _require_same(path, asked)
            if writer._nothing_missing():
                return writer  # needs no lock, and may be read-only
        require_place(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write a cache at {path}: {error.strerror}; choose another --out") from None
        writer._lock = lock_folder(path)
        try:
            writer._prepare(asked)
        except BaseException:
            writer.close()
            raise
        return writer

    @property
    def complete(self) -> bool:
        """Whether the cache was finished: nothing is left to do."""
        return is_finished(self.path)

    def missing(self) -> list[ShardTask]:
        """The shards still to be written, in dataset, view, variant and row order."""
        quantized = self.plan.format.quantized
        return [
            t
            for t in self.plan.tasks()
            if not is_committed(self.path, shard_commit(self.path, t), shard_names(t, quantized))
        ]

    def tables_missing(self) -> list[str]:
        """The datasets whose tables are still to be written."""
        return [
            d.name
            for d in self.plan.datasets
            if not is_committed(self.path, tables_commit(self.path, d.name), table_names(d))
        ]

    @names_full_disk
    def write_shard(
        self, task: ShardTask, chunks: Iterable[Features | Failed], quarantined: Sequence[tuple[int, str]] = ()
    ) -> None:
        """Write one shard from features of observations `task.start … task.stop-1`, in order, and commit it.

        `chunks`: float16 [tokens, width] (one image) or [k, tokens, width]; of an 8-bit cache (codes
        [k, tokens, width], token scales float32 [k, tokens]). A `Failed` stands for rows that could not be decoded:
        they become zeros, and the episode goes into the ledger with its reason. `quarantined`: (episode id, reason) of
        episodes whose zeros are among the chunks. `UserError` naming the row for a value that is not finite.
        """
        plan, tail = self.plan, (self.plan.tokens, self.plan.width)
        step, failed = max(1, PIECE_NBYTES // plan.format.record_nbytes(*tail)), list(quarantined)
        path = features_folder(self.path, task.dataset, task.array) / "c" / str(task.index) / "0" / "0"
        scales = scales_folder(self.path, task.dataset, task.array) / "c" / str(task.index) / "0"
        with contextlib.ExitStack() as stack:
            compression = record_compression(plan.format)
            shard = stack.enter_context(
                ShardWriter(path, (1, *tail), plan.format.zarr_dtype, plan.shard_frames, compression)
            )
            beside: ShardWriter | None = None
            if plan.format.quantized:
                beside = stack.enter_context(ShardWriter(scales, (1, plan.tokens), "float32", plan.shard_frames))
            for chunk in chunks:
                if isinstance(chunk, Failed):
                    failed.append((chunk.episode, str(chunk)))
                    chunk = self._zeros(chunk.rows)
                block, scale = chunk if isinstance(chunk, tuple) else (chunk[None] if chunk.ndim == 2 else chunk, None)
                if scale is not None and len(scale) != len(block):
                    raise ValueError(f"{task}: {len(block)} records came with {len(scale)} rows of scales")
                for at in range(0, len(block), step):  # checked, summed and written while in the processor's cache
                    part, scales_part = block[at : at + step], None if scale is None else scale[at : at + step]
                    check_features(part, scales_part, task, task.start + shard.count, plan)
                    shard.append(part)
                    if beside is not None and scales_part is not None:
                        beside.append(scales_part)
            if shard.count != task.stop - task.start:
                raise ValueError(f"{task}: got {shard.count} observations, expected {task.stop - task.start}")
            known = {e.episode_id for e in self._datasets[task.dataset].episodes}
            if any(episode not in known for episode, _ in failed):
                raise ValueError(f"{task}: quarantined episodes {failed} are not all in the plan")
            written = {path: shard.commit()} | ({scales: beside.commit()} if beside is not None else {})
        self._commit(
            shard_commit(self.path, task),
            written,
            quarantined=sorted(map(list, {(int(episode), reason) for episode, reason in failed})),
        )

    def _zeros(self, rows: int) -> Features:
        plan = self.plan
        codes = np.zeros((rows, plan.tokens, plan.width), plan.format.zarr_dtype)
        return (codes, np.ones((rows, plan.tokens), np.float32)) if plan.format.quantized else codes

    @names_full_disk
    def channel_scale(self, measure: Callable[[], np.ndarray]) -> np.ndarray | None:
        """float32 [D] of an 8-bit cache, measured by the first call, before any shard; None of a 16-bit one."""
        if not self.plan.format.quantized:
            return None
        if not is_committed(self.path, scale_commit(self.path), CHANNEL_NAMES):
            written = write_table(self.path / CHANNELS, measure().astype(np.float32), ("channel",))
            self._commit(scale_commit(self.path), written)
        return np.array(open_table(self.path, CHANNELS, ((self.plan.width,), "float32")))

    @names_full_disk
    def adopt(self, task: ShardTask, other: Path) -> None:
        """Commit a shard that is byte for byte that of the finished cache `other`, by hard links where possible."""
        record = shard_commit(other, task)
        for name in read_commit(record)["files"]:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(target)
            try:
                os.link(other / name, temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(other / name, temporary)
            publish(temporary, target)
        write_file(shard_commit(self.path, task), record.read_bytes())

    @names_full_disk
    def write_tables(self, dataset: str, tables: DatasetTables) -> None:
        """Write and commit everything of a dataset but its vision features. `ValueError` for wrong shapes or dtypes."""
        plan, given = self._datasets[dataset], tables.attributes
        written: dict[Path, tuple[int, int]] = {}
        for name, values in checked_arrays(plan, self.plan, tables).items():
            written |= write_table(self.path / dataset / name, values, dimensions_of(name))
        own = dataset_attributes(plan, self.plan, tables)
        clash = [n for n in own.keys() & given.keys() if fp.canonical({n: own[n]}) != fp.canonical({n: given[n]})]
        if clash or "quarantined" in given:
            raise ValueError(f"attributes {sorted(clash) or 'quarantined'} belong to the store")
        self._commit(tables_commit(self.path, dataset), written, attributes={**given, **own})

    @names_full_disk
    def finish(self) -> dict[str, Any]:
        """Write the metadata, the quarantine ledger and, last, the manifest; returns the manifest.

        `ValueError` while shards or tables are missing.
        """
        if (missing := self.missing()) or self.tables_missing():
            raise ValueError(f"{self.path}: {len(missing)} shards are missing, and tables of {self.tables_missing()}")
        if self.complete:
            return read_manifest(self.path)
        self._clear()  # of lost workers
        files, attributes, quarantined = self._committed_work()
        ledger = [
            {"dataset": name, "episode_id": episode, "reason": reason}
            for name, found in quarantined.items()
            for episode, reason in sorted(found)
        ]
        bad = {name: sorted({episode for episode, _ in found}) for name, found in quarantined.items()}
        contents = {QUARANTINE: "".join(fp.canonical(line) + "\n" for line in ledger).encode()}
        contents |= self._metadata(files, {name: {**attributes[name], "quarantined": bad[name]} for name in bad})
        files |= {name: _entry(write_file(self.path / name, data)) for name, data in contents.items()}
        files[FINGERPRINT] = _entry(file_crc32c(self.path / FINGERPRINT))
        counts = {name: len(episodes) for name, episodes in bad.items()}
        manifest = manifest_document(self.plan, read_fingerprint(self.path), files, counts)
        write_file(self.path / MANIFEST, json_bytes(manifest))
        return manifest

    def quarantined(self) -> dict[str, set[tuple[int, str]]]:
        """Each dataset's quarantined (episode, reason), once nothing is missing."""
        return self._committed_work()[2]

    def _committed_work(self) -> tuple[Files, dict[str, dict[str, Any]], dict[str, set[tuple[int, str]]]]:
        """What the commit records hold: all files, and each dataset's attributes and quarantined (episode, reason)."""
        files: Files = read_commit(scale_commit(self.path))["files"] if self.plan.format.quantized else {}
        attributes, quarantined = {}, {d.name: set(d.quarantined) for d in self.plan.datasets}
        for name in quarantined:
            tables = read_commit(tables_commit(self.path, name))
            files, attributes[name] = files | tables["files"], tables["attributes"]
        for task in self.plan.tasks():
            commit = read_commit(shard_commit(self.path, task))
            files |= commit["files"]
            quarantined[task.dataset] |= {(episode, reason) for episode, reason in commit["quarantined"]}
        return files, attributes, quarantined

    def _metadata(self, files: Files, attributes: dict[str, dict[str, Any]]) -> dict[str, bytes]:
        """The Zarr documents of groups and features, and of the root, which includes those of all tables in `files`."""
        nodes = {
            name: document
            for d in self.plan.datasets
            for name, document in dataset_nodes(d, self.plan, attributes[d.name])
        }
        contents = {f"{name}/zarr.json": json_bytes(document) for name, document in nodes.items()}
        nodes |= {
            name.removesuffix("/zarr.json"): read_json(self.path / name, ArrayForm)
            for name in files
            if name.endswith("/zarr.json")
        }
        return contents | {"zarr.json": json_bytes(root_document(nodes, self.plan.version))}

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @names_full_disk
    def _prepare(self, asked: dict[str, Any]) -> None:
        """Under the lock: check or write the fingerprint, and remove what a killed builder left."""
        if is_begun(self.path):
            _require_same(self.path, asked)
        self._clear()
        if not is_begun(self.path):
            write_file(self.path / FINGERPRINT, json_bytes(asked))
        if self.complete and not self._nothing_missing():
            (self.path / MANIFEST).unlink()

    def _clear(self) -> None:
        for left in self.path.rglob(".*.tmp-*"):
            left.unlink(missing_ok=True)  # a worker that outlived its builder may rename it

    def _nothing_missing(self) -> bool:
        return not (self.missing() or self.tables_missing())

    def _commit(self, record: Path, written: dict[Path, tuple[int, int]], **extra: Any) -> None:
        files = {path.relative_to(self.path).as_posix(): _entry(entry) for path, entry in written.items()}
        write_file(record, json_bytes(commit_document(files, **extra)))


def _entry(written: tuple[int, int]) -> dict[str, int]:
    return {"bytes": written[0], "crc32c": written[1]}


def _require_same(path: Path, asked: dict[str, Any]) -> None:
    lines = fp.diff(read_fingerprint(path), asked)
    if lines:
        more = f"; … {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError(
            f"cache {path} was built from other settings: {'; '.join(lines[:8])}{more}. "
            f"Choose another --out, or run with the cache's settings"
        )
