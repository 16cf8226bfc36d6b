"""A cache's content as WebDataset samples, and back to what a writer needs. Format: tars.py.

Every file of the cache is compared with its manifest before it is exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ....common import fingerprint as fp
from ....common.files import file_crc32c
from ....errors import UserError
from ...actions.statistics import Statistics
from ..cache import Cache
from ..dataset import CacheDataset
from ..manifest import FINGERPRINT, MANIFEST, json_bytes, read_commit, shard_commit
from ..plan import BuildPlan, DatasetTables, array_name
from .tars import field_name, labels, npy, sample_key

BLOCK_NBYTES = 32 << 20  # features in memory at a time


class Files:
    """Compares each file of a cache with the manifest before it is exported."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self._seen = cache, set[str]()

    def check(self, name: str) -> None:
        """`UserError` when the file is damaged. Each is read once."""
        if name in self._seen:
            return
        try:
            nbytes, crc = file_crc32c(self.cache.path / name)
        except OSError as error:
            raise UserError(
                f"cannot read {self.cache.path / name}: {error.strerror}; run `dvla cache verify {self.cache.path}`"
            ) from None
        if {"bytes": nbytes, "crc32c": crc} != self.cache.manifest["files"].get(name):
            raise UserError(
                f"{self.cache.path / name} is damaged and was not exported; run `dvla cache repair {self.cache.path}`"
            )
        self._seen.add(name)

    def check_tables(self) -> None:
        """Everything but the features and their scales."""
        for name in self.cache.manifest["files"]:
            if "/c/" not in name or name.split("/")[1] not in ("features", "scales"):
                self.check(name)


def meta_samples(cache: Cache, files: Files) -> Iterator[dict[str, Any]]:
    """The samples of _meta.tar: that of the store, and one with the tables of each dataset."""
    files.check_tables()
    ledger: dict[str, list[Any]] = {}  # shard → its quarantined [episode, reason]
    for task in BuildPlan.from_document(cache.fingerprint["store"]).tasks():
        if bad := read_commit(shard_commit(cache.path, task))["quarantined"]:
            ledger[f"{task.dataset}/{task.array}/{task.index}"] = bad
    store = {
        "__key__": "cache/store",
        FINGERPRINT: json_bytes(cache.fingerprint),
        MANIFEST: json_bytes(cache.manifest),
        "quarantine.json": json_bytes(ledger),
    }
    if (scale := cache.datasets[0].channel_scale) is not None:
        store["channel_scale.npy"] = npy(scale)
    yield store
    for d in cache.datasets:
        names = ("action", "proprio", "timestamp", "action_mask", "proprio_mask", "null_text")
        arrays = {name: getattr(d, name) for name in names} | {"text.embedding": d.text, "text.length": d.text_length}
        for name in ("start", "length", "id", "instruction"):
            arrays[f"episodes.{name}"] = getattr(d, f"episode_{name}")
        arrays |= {f"null.{label}": d.null_features[i] for i, label in enumerate(labels(d.views).values())}
        document = {"__key__": f"{d.name}/tables", "json": json_bytes(d.attributes)}
        yield document | {f"{name}.npy": npy(array) for name, array in arrays.items()}


def _row_document(d: CacheDataset, episode: int, row: int) -> dict[str, Any]:
    """The facts about one observation that other tools need."""
    text = int(d.episode_instruction[episode])
    return {
        "dataset": d.name,
        "episode_id": int(d.episode_id[episode]),
        "step": row - int(d.episode_start[episode]),
        "row": row,
        "timestamp": float(d.timestamp[row]),
        "instruction": d.instructions[text],
        **({"visible": int(d.visible[text])} if "visible" in d.attributes else {}),  # tokens that are real, the first
        "control_hz": d.control_hz,
        "embodiment": d.embodiment_id,
        "embodiment_name": d.attributes.get("embodiment_name"),
        "dtype": d.format.dtype,
        "frame_stride": d.frame_stride,
        "quarantined": bool(d.quarantined[episode]),
    }


def sample_nbytes(d: CacheDataset, views: dict[str, str]) -> int:
    """Bytes of the largest possible sample in a tar: a header of 512 and full blocks of 512 for each member."""
    longest = max(range(len(d.episode_id)), key=lambda e: len(d.instructions[int(d.episode_instruction[e])]))
    document = fp.canonical(_row_document(d, longest, int(d.episode_start[longest]))).encode()
    features = [128 + d.tokens * d.width * d.format.itemsize, *[128 + 4 * d.tokens] * d.format.quantized]
    # 64: longer numbers
    members = [len(document) + 64, 128 + 512, 128 + 512, *features * (len(views) * (d.variants + 1))]
    return sum(512 + -(-n // 512) * 512 for n in members)


def observation_samples(
    d: CacheDataset, views: dict[str, str], observations: np.ndarray, files: Files
) -> Iterator[dict[str, Any]]:
    """One sample for each of `observations` [n], read in blocks."""
    arrays = [(view, label, k) for view, label in views.items() for k in range(d.variants + 1)]
    size = max(1, BLOCK_NBYTES // (d.format.record_nbytes(d.tokens, d.width) * len(arrays)))
    for block in (observations[i : i + size] for i in range(0, len(observations), size)):
        for shard in np.unique(block // d.shard_frames).tolist():
            for view, _, k in arrays:
                files.check(f"{d.name}/features/{array_name(view, k)}/c/{shard}/0/0")
                if d.format.quantized:
                    files.check(f"{d.name}/scales/{array_name(view, k)}/c/{shard}/0")
        rows = d.frame_of(block)
        episodes = d.episode_of(rows)
        records = [d.records(view, rows, k) for view, _, k in arrays]
        for i, (row, e) in enumerate(zip(rows.tolist(), episodes.tolist())):
            sample: dict[str, Any] = {
                "__key__": sample_key(d.name, e, row - int(d.episode_start[e])),
                "json": fp.canonical(_row_document(d, e, row)).encode(),
                "action.npy": npy(d.action[row]),
                "proprio.npy": npy(d.proprio[row]),
            }
            for (_, label, k), (codes, scale) in zip(arrays, records):
                sample[field_name("features", label, k)] = npy(codes[i])
                if scale is not None:
                    sample[field_name("scales", label, k)] = npy(scale[i])
            yield sample


def tables_of(d: CacheDataset) -> DatasetTables:
    """The tables that `CacheWriter.write_tables` was given for a cached dataset."""
    a, slots = d.attributes, np.arange(d.action_mask.size)
    stats = {kind: Statistics.from_dict(a[f"{kind}_stats"]) for kind in ("action", "proprio")}
    rotation = {kind: np.isin(slots, a[f"{kind}_rotation"]) for kind in ("action", "proprio")}
    return DatasetTables(
        action=d.action,
        action_mask=d.action_mask,
        action_rotation=rotation["action"],
        action_stats=stats["action"],
        proprio=d.proprio,
        proprio_mask=d.proprio_mask,
        proprio_rotation=rotation["proprio"],
        proprio_stats=stats["proprio"],
        timestamp=d.timestamp,
        text=d.text,
        text_length=np.array(d.text_length),
        null_text=d.null_text,
        null_features=dict(zip(d.views, d.null_features)),
        embodiment=d.embodiment_id,
        control_hz=d.control_hz,
        attributes={name: value for name, value in a.items() if name != "quarantined"},
    )
