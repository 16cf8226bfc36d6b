"""Generations of a cache: what a new one may reuse of the finished one before it, and how the two change places.

OUT.next is the generation being made. Once it is finished, OUT becomes OUT.gen-N, and OUT.next becomes OUT. The process
that makes a generation holds the lock of OUT, and with it that of OUT.gen-N after the exchange.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.store.cache import Cache, beside
from ...cache.store.dataset import CacheDataset
from ...cache.store.manifest import has_size, is_begun, is_finished, read_fingerprint
from ...cache.store.plan import BuildPlan, DatasetPlan, EpisodePlan, ShardTask
from ...cache.store.zarr_format import scales_folder
from ...common import fingerprint as fp
from ...common.files import file_crc32c, lock_folder, sync_folder
from ...errors import UserError


class Earlier:
    """The finished generation that a new one copies features from: those of episodes whose images are the same."""

    def __init__(self, cache: Cache | None) -> None:
        self.path = cache.path if cache else None
        self._cache, self._datasets = cache, {d.name: d for d in cache.datasets} if cache else {}
        self._checked: set[Path] = set()

    @property
    def channels(self) -> np.ndarray | None:
        """Channel scales of its 8-bit features: codes can be copied only together with them."""
        return self._cache.datasets[0].channel_scale if self._cache else None

    def whole(self, task: ShardTask, plan: DatasetPlan, build: BuildPlan) -> bool:
        """Whether it has the same shard: the same rows of the same images, stored the same way."""
        dataset = self._datasets.get(task.dataset)
        if (
            dataset is None
            or task.view not in dataset.views
            or dataset.shard_frames != build.shard_frames
            or dataset.frame_stride != build.frame_stride
            or dataset.attributes["compression"] != build.format.compression
        ):
            return False
        counts = plan.observations(build.frame_stride)
        starts, view = np.cumsum(counts) - counts, plan.views.index(task.view)
        last = int(np.searchsorted(starts, task.stop, side="left"))  # episodes before the shard's end
        total = int(dataset.episode_observations.sum())
        if task.stop > total or (task.stop < task.start + build.shard_frames and task.stop != total):
            return False
        old = dataset.attributes["view_hashes"][task.view][:last]
        kept = dataset.attributes.get("kept", [None] * len(dataset.episode_id))[:last]
        entries = plan.episodes[:last]
        return (
            dataset.episode_id[:last].tolist() == [e.episode_id for e in entries]
            and dataset.episode_length[:last].tolist() == [e.length for e in entries]
            and old == [e.view_hashes[view] for e in entries]
            and kept == [None if e.kept is None else [list(r) for r in e.kept] for e in entries]
            and not dataset.quarantined[:last].any()
        )

    def find(
        self, name: str, view: str, number: int, entry: EpisodePlan, frames: np.ndarray
    ) -> tuple[CacheDataset, int] | None:
        """(dataset, its first row of the episode) for the view that is the plan's `number`-th.

        None when the view's images are new or changed, or one of `frames` could not be read or was not kept then.
        """
        dataset = self._datasets.get(name)
        if dataset is None or view not in dataset.views or not entry.view_hashes:
            return None
        at = np.flatnonzero(dataset.episode_id == entry.episode_id)
        if not len(at) or dataset.quarantined[at[0]] or dataset.episode_length[at[0]] != entry.length:
            return None
        start = int(dataset.episode_start[at[0]])
        same = dataset.attributes["view_hashes"][view][int(at[0])] == entry.view_hashes[number]
        return (dataset, start) if same and dataset.has_features(start + frames).all() else None

    def records(
        self, dataset: CacheDataset, task: ShardTask, frames: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Stored features of `frames` [n], as `CacheDataset.records`.

        The checksum of each shard is verified once, since a copy of a damaged feature would pass every later check.
        """
        assert self._cache is not None  # that `dataset` belongs to
        scales = scales_folder(self._cache.path, task.dataset, task.array) / "c"
        for index in np.unique(dataset.observation_of(frames) // dataset.shard_frames).tolist():
            self._require_undamaged(self._cache, dataset.shard_path(task.view, index, task.variant))
            if dataset.format.quantized:
                self._require_undamaged(self._cache, scales / str(index) / "0")
        return dataset.records(task.view, frames, task.variant)

    def _require_undamaged(self, cache: Cache, file: Path) -> None:
        if file in self._checked:
            return
        entry = cache.manifest["files"][file.relative_to(cache.path).as_posix()]
        if file_crc32c(file) != (entry["bytes"], entry["crc32c"]):
            raise UserError(
                f"{file} of the previous generation is damaged; run `dvla cache repair {cache.path}`, then rerun this"
            )
        self._checked.add(file)


# --- what changes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewChange:
    """What becomes of the features of one view of a dataset, in observations; the same for every augmented variant."""

    dataset: str
    view: str
    new: int  # encoded: of an episode, view or dataset that the previous generation does not have
    again: int  # encoded: their images or the settings changed
    copied: int  # one by one, out of shards that change
    adopted: int  # in shards that are reused unchanged
    episodes: int  # to be decoded, for those that are encoded


def changes(earlier: Cache, plan: BuildPlan, reused: Earlier, unchanged: bool) -> list[ViewChange]:
    """Per dataset and view of `plan`, against the finished cache `earlier`; `reused` and `unchanged` are `decide`'s."""
    old, out = {d.name: d for d in earlier.datasets}, []
    tasks = [task for task in plan.tasks() if not task.variant]
    for dataset in plan.datasets:
        counts = dataset.observations(plan.frame_stride)
        starts = np.cumsum(counts) - counts
        before = old.get(dataset.name)
        for number, view in enumerate(dataset.views):
            whole, sums = np.zeros(int(counts.sum()), bool), dict.fromkeys(("new", "again", "copied", "episodes"), 0)
            known = set(before.episode_id.tolist()) if before is not None and view in before.views else set()
            for task in tasks:
                mine = (task.dataset, task.view) == (dataset.name, view)
                if mine and (unchanged or reused.whole(task, dataset, plan)):
                    whole[task.start : task.stop] = True
            for entry, start, count in zip(dataset.episodes, starts.tolist(), counts.tolist()):
                rest = count - int(whole[start : start + count].sum())
                if not rest:
                    continue
                found = reused.find(dataset.name, view, number, entry, entry.observed(plan.frame_stride))
                sums["copied" if found else "again" if entry.episode_id in known else "new"] += rest
                sums["episodes"] += not found
            out.append(ViewChange(dataset.name, view, adopted=int(whole.sum()), **sums))
    return out


# --- what may change --------------------------------------------------------------------------------------------------


def same_features(earlier: Cache, fingerprint: Mapping[str, Any], plan: BuildPlan) -> bool:
    """Whether the previous generation's features are those that this build would compute from the same images."""
    keys = ("encoder", "transform_version", *(("augmentation",) if plan.variants else ()))
    before, store = earlier.fingerprint["store"], plan.document()
    return (
        all(fp.canonical(earlier.fingerprint[key]) == fp.canonical(fingerprint[key]) for key in keys)
        and all(before[key] == store[key] for key in ("format", "dtype"))
        and not store["frame_stride"] % before["frame_stride"]
        and store["variants"] <= before["variants"]
    )


def require_only_new(earlier: Cache, fingerprint: Mapping[str, Any], plan: BuildPlan) -> None:
    """`UserError` unless the only differences are episodes that the cache does not have."""
    before, now = earlier.fingerprint, {**fingerprint, "store": plan.document()}
    kept = {key: value for key, value in now.items() if key not in ("store", "sources")}
    lines = fp.diff({key: before[key] for key in kept}, kept)
    for key in ("format", "tokens", "width", "dtype", "compression", "frame_stride", "variants", "shard_frames"):
        lines += fp.diff({key: before["store"][key]}, {key: now["store"][key]})
    for dataset in earlier.datasets:
        old, new = before["store"]["datasets"][dataset.name], now["store"]["datasets"].get(dataset.name)
        if new is None:
            lines.append(f"dataset {dataset.name} is gone")
            continue
        lines += fp.diff({"views": old["views"]}, {"views": list(new["views"])})
        changed = [e for e, entry in old["episodes"].items() if new["episodes"].get(e) != entry]
        lines += [f"episode {e} of {dataset.name} changed or is gone" for e in changed]
        config = {k: v for k, v in before["sources"][dataset.name].items() if k != "revision"}
        lines += fp.diff({dataset.name: config}, {dataset.name: {k: now["sources"][dataset.name][k] for k in config}})
    if lines:
        more = "; …" if len(lines) > 6 else ""
        raise UserError(f"use --update: --append adds new episodes only, but {'; '.join(lines[:6])}{more}")


def require_intact(earlier: Cache) -> None:
    """`UserError` naming a file of the finished cache that is missing or truncated; bytes are checked on copying."""
    for name, entry in earlier.manifest["files"].items():
        file = earlier.path / name
        if not has_size(file, entry):
            raise UserError(f"{file} is missing or damaged; run `dvla cache repair {earlier.path}`, then rerun this")


def require_same_start(ready: Path, asked: Mapping[str, Any]) -> None:
    """`UserError` when `ready` is a generation that was begun for something other than `asked`."""
    if is_begun(ready) and (lines := fp.diff(read_fingerprint(ready), dict(asked))):
        raise UserError(
            f"remove the folder {ready}, then rerun: it is a generation begun from other sources or settings "
            f"({'; '.join(lines[:4])}{'; …' if len(lines) > 4 else ''})"
        )


# --- places -----------------------------------------------------------------------------------------------------------


def next_generation(out: Path) -> Path:
    """Where the generation after the one at `out` is made."""
    return beside(out, "next")


def generations(out: Path) -> list[Path]:
    """Earlier generations of the cache at `out` that still exist, oldest first."""
    any_of = beside(out, "gen-*")
    found = {int(m[1]): p for p in any_of.parent.glob(any_of.name) if (m := re.fullmatch(r".*\.gen-(\d+)", p.name))}
    return [found[n] for n in sorted(found)]


def exchange(out: Path) -> Path:
    """Replace `out`, whose lock the caller holds, by its finished next generation; returns where the old one is now."""
    last = generations(out)[-1:]
    number = int(last[0].name.rsplit("-", 1)[1]) + 1 if last else 1
    previous = beside(out, f"gen-{number}")
    os.rename(out, previous)
    os.rename(next_generation(out), out)  # a crash in between is mended by the next build
    sync_folder(out.parent)
    return previous


def finish_exchange(out: Path) -> None:
    """Finish an exchange that was interrupted between its two renames; `UserError` while one is running."""
    ready, last = next_generation(out), generations(out)[-1:]
    if not out.exists() and last and is_finished(ready):
        with lock_folder(last[0]):
            os.rename(ready, out)
            sync_folder(out.parent)
