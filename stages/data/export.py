"""`dvla data export`: any source as a folder of Episode-HDF5 files, one per episode. Resumable; every file is complete.

The folder holds ep_<episode id>.hdf5 and, written last, quarantine.jsonl: a line per episode that could not be used.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.readers import Source
from ...cache.readers.episode import CorruptEpisode
from ...cache.readers.episode_hdf5 import episode_files, read_attributes, write_episode
from ...common import fingerprint
from ...common.documents import json_value, open_regular
from ...common.files import hold, write_file
from ...common.progress import Progress
from ...errors import UserError, unknown

FORMATS = ("episode_hdf5",)
COMPRESSIONS = ("none", "gzip")
_LEDGER, _LOCK = "quarantine.jsonl", ".lock"


@dataclass
class ExportReport:
    """What happened. Frames and bytes count the whole folder; seconds are wall-clock of this call."""

    path: Path
    episodes: int = 0  # files in the folder
    kept: int = 0  # of these, finished before
    frames: int = 0
    bytes: int = 0
    quarantined: int = 0  # lines of quarantine.jsonl
    seconds: float = 0.0


def check_options(to: str, compression: str) -> None:
    """`UserError` for an unknown format or compression; called before a source is opened or fetched."""
    for kind, given, allowed in (("export format", to, FORMATS), ("compression", compression, COMPRESSIONS)):
        if given not in allowed:
            raise unknown(kind, given, allowed)


def export(
    source: Source,
    out: Path,
    progress: Progress = lambda *_: None,
    *,
    to: str = "episode_hdf5",
    compression: str = "none",
) -> ExportReport:
    """Write every episode of `source` into the folder `out`, or resume an export that was begun there.

    A finished file stays when its episode and the settings are the same. Episodes that cannot be used go to
    `quarantine.jsonl`. `UserError` for an unknown format or compression, for a folder that holds something else or an
    export of other data or settings (the differing fields are named), and when no episode can be used.
    """
    began = time.perf_counter()
    check_options(to, compression)
    out = Path(out)
    settings = _settings(source, compression)
    report, ledger = ExportReport(out), []
    with _locked(out, source):
        for done, number in enumerate(source.episode_ids):
            progress(f"{source.name}: episodes", done, len(source.episode_ids))
            path = out / f"ep_{number:06d}.hdf5"
            try:
                report.frames += _export_one(source, number, path, settings, compression, report)
            except CorruptEpisode as error:
                if path.exists():
                    raise UserError(
                        f"repair the source, or delete {path}: it was exported before, but its episode cannot be read "
                        f"now ({error})"
                    ) from None
                ledger.append({"dataset": source.name, "episode_id": number, "reason": str(error)})
        progress(f"{source.name}: episodes", len(source.episode_ids), len(source.episode_ids))
        write_file(out / _LEDGER, "".join(fingerprint.canonical(line) + "\n" for line in ledger).encode())
    report.quarantined = len(ledger)
    if not report.episodes:
        raise source.no_usable_episode([line["reason"] for line in ledger], f"see {out / _LEDGER}")
    report.seconds = time.perf_counter() - began
    return report


def _export_one(
    source: Source, number: int, path: Path, settings: dict[str, Any], compression: str, report: ExportReport
) -> int:
    """Write or keep one file; returns T."""
    episode = source.load(number)
    if path.exists():
        _check_same(path, episode.source_hash, settings)
        report.kept += 1
    else:
        actions, states = source.action_map, source.state_map
        attributes = {
            "embodiment_id": source.config.embodiment_id,
            "action_dim": actions.native_dim,
            "source_hash": episode.source_hash,
            "settings": fingerprint.canonical(settings),
        }
        write_episode(
            path,
            episode,
            actions.to_unified(episode.action),
            states.to_unified(episode.state),
            attributes,
            {"action_mask": actions.mask, "proprio_mask": states.mask},
            None if compression == "none" else compression,
        )
    report.episodes += 1
    report.bytes += path.stat().st_size
    return episode.length


def _settings(source: Source, compression: str) -> dict[str, Any]:
    """What a file's content depends on besides its episode, as it comes back from JSON."""
    settings = {
        "dataset": source.name,
        "embodiment": source.config.embodiment,
        "views": source.view_names,
        "control_hz": source.control_hz,
        "action_map": source.action_map.to_dict(),
        "state_map": source.state_map.to_dict(),
        "compression": compression,
    }
    return json.loads(fingerprint.canonical(settings))


def _check_same(path: Path, source_hash: str, settings: dict[str, Any]) -> None:
    """`UserError` unless the file at `path` was exported from this episode with these settings."""
    try:
        attributes = read_attributes(path, str(path))
        found = json_value(attributes["settings"])
        others = [name for name in settings if found[name] != settings[name]]
    except (CorruptEpisode, KeyError, ValueError, TypeError):
        raise UserError(
            f"{path} is damaged or not an export of this release; delete it or choose another --out"
        ) from None
    if others:
        raise UserError(f"{path} was exported with another {', another '.join(others)}; choose another --out")
    if attributes["source_hash"] != source_hash:
        raise UserError(f"{path} was exported from other data (source_hash differs); choose another --out")


@contextmanager
def _locked(out: Path, source: Source) -> Iterator[None]:
    """Hold `out` as a folder of this export alone; temporary files of a killed one are removed."""
    if source.path.exists() and out.resolve() in (source.path.resolve(), source.path.resolve().parent):
        raise UserError(f"{out} holds the source itself; choose another --out")
    names = os.listdir(out) if out.is_dir() else []
    listed = episode_files(names)
    wanted = {f"ep_{number:06d}.hdf5" for number in source.episode_ids}
    other = sorted(n for n in names if n not in wanted and n not in (_LEDGER, _LOCK) and ".tmp-" not in n)
    if other:
        what = "episodes that the source does not have" if other[0] in listed.values() else "other files"
        raise UserError(f"{out} holds {what} ({', '.join(other[:3])}); choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(open_regular(out / _LOCK, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from None
    with lock:
        hold(lock, f"another process is exporting to {out}")
        for left in out.glob(".*.tmp-*"):
            left.unlink()
        yield
