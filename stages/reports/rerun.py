"""`dvla rerun`: one recorded episode with a policy's predictions at each frame, as a file for the Rerun viewer.

    views/<camera>                      images
    action/<field>/expert …/predicted   recorded and predicted action of each frame, in the robot's units
    error                               RMS of their difference, each field in units of its standard deviation
    way/expert, way/predicted           end-effector trajectory of the coming chunk in meters, where actions give one

Letters: T frames of the episode, H steps of a chunk, d native action width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.actions.action_map import ActionMap
from ...cache.actions.history import NO_HISTORY
from ...cache.actions.slots import SLOTS
from ...cache.loader.provenance import name_at
from ...cache.readers import open_source
from ...cache.readers.config import DatasetConfig
from ...cache.readers.episode import CorruptEpisode, Episode
from ...common.config import from_mapping
from ...common.files import discard
from ...common.packages import require_package
from ...common.progress import Progress
from ...errors import UserError

BATCH = 16  # observations of one forward pass
QUALITY = 85  # of the JPEGs


@dataclass(frozen=True)
class RerunReport:
    """What was written. `error`: its mean over the frames."""

    path: Path
    frames: int
    predicted: int
    error: float


def write_rerun(
    run: str,
    source: str,
    episode_id: int,
    out: Path,
    *,
    every: int = 1,
    dataset_config: str | None = None,
    vlm_path: str | None = None,
    device: str = "auto",
    progress: Progress = lambda *_: None,
) -> RerunReport:
    """Write an episode of the dataset `source` with the predictions of policy `run` at every `every`-th frame.

    `UserError` without rerun-sdk, for a dataset the policy was not trained on, a missing or damaged episode, or a file
    that exists.
    """
    require_package("rerun-sdk", "a file for Rerun", "rerun", module="rerun")
    if out.suffix != ".rrd":
        raise UserError(f"{out}: give a name that ends in .rrd")
    if out.exists():
        raise UserError(f"{out} exists; choose another name")
    if every < 1:
        raise UserError(f"--every {every}: give at least 1")
    data = open_source(source, dataset_config or _own_map(run, source))
    if episode_id not in data.episode_ids:
        first, last = data.episode_ids[0], data.episode_ids[-1]
        raise UserError(f"{source} has no episode {episode_id}; its {len(data.episode_ids)} are {first} to {last}")
    from ..policy.policy import Policy

    policy = Policy.from_pretrained(run, dataset=data.name, device=device, vlm_path=vlm_path)
    try:
        episode = data.load(episode_id)
        return _write(policy, episode, episode_id, out, every, progress)
    except CorruptEpisode as error:
        raise UserError(f"{source}: {error}") from None


def _own_map(run: str, source: str) -> DatasetConfig | None:
    """The map with which the run's dataset of this name was read; None where the run has none."""
    from ..policy.checkpoint import resolve
    from ..policy.document import read_document

    try:
        datasets = read_document(resolve(run, lambda _: None))["datasets"]
    except UserError:
        return None  # the policy's loader says it, after the dataset was looked at
    found = [d for d in datasets if d["name"] == name_at(source)] or datasets[: len(datasets) == 1]
    config = found[0].get("config") if found else None  # earlier releases stored none
    return None if config is None else from_mapping(DatasetConfig, config, "policy.json")


def _write(policy: Any, episode: Episode, episode_id: int, out: Path, every: int, progress: Progress) -> RerunReport:
    import rerun as rr

    fields = [
        (i, rr.escape_entity_path_part(name))
        for i, name in enumerate(policy.robot.action_map.field_names)
        if name != "dropped"
    ]
    mine, spread = [i for i, _ in fields], np.maximum(episode.action.std(0), 1e-3)  # [d]
    part = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    record = rr.RecordingStream(f"dvla {episode.dataset}")
    errors: list[float] = []
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            record.save(part)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from None
        record.send_blueprint(_blueprint(episode, [name for _, name in fields]))
        record.log("instruction", rr.TextDocument(episode.instruction or "(none)"), static=True)
        for step, (images, chunk) in enumerate(_frames(policy, episode, every)):
            record.set_time("frame", sequence=step)
            record.set_time("time", duration=float(episode.timestamps[step]))
            for view, frame in images.items():
                record.log(f"views/{view}", rr.Image(frame).compress(jpeg_quality=QUALITY))
            for i, name in fields:
                record.log(f"action/{name}/expert", rr.Scalars(float(episode.action[step, i])))
            if chunk is not None:
                for i, name in fields:
                    record.log(f"action/{name}/predicted", rr.Scalars(float(chunk[0, i])))
                errors.append(float(np.sqrt(np.mean((((chunk[0] - episode.action[step]) / spread)[mine]) ** 2))))
                record.log("error", rr.Scalars(errors[-1]))
                coming = episode.action[step : step + len(chunk)]
                for who, actions, color in (
                    ("expert", coming, (0, 114, 178)),
                    ("predicted", chunk[: len(coming)], (213, 94, 0)),
                ):
                    path = _trajectory(policy.robot.action_map, actions)
                    if path is not None:
                        record.log(f"way/{who}", rr.LineStrips3D([path], colors=[color], labels=[who]))
            progress("frames", step + 1, episode.length)
        record.flush()
        record.disconnect()
        os.replace(part, out)
    finally:
        discard(part)
    return RerunReport(out, episode.length, len(errors), float(np.mean(errors)))


def _frames(policy: Any, episode: Episode, every: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]:
    """(image of each view, predicted chunk [H,d] or None) of every frame, in order."""
    from ..policy.history import Past
    from ..policy.observation import Observation

    streams, past = {view.name: view.frames() for view in episode.views}, Past(getattr(policy, "history", NO_HISTORY))
    waiting: list[dict[str, np.ndarray]] = []
    seen: dict[int, Observation] = {}  # step → what is asked there
    for step in range(episode.length):
        images = {name: next(stream) for name, stream in streams.items()}
        shown = {v: images[v] for v in policy.robot.views if v in images}
        observation = past.push(Observation(shown, episode.instruction, episode.state[step], step=step))
        waiting.append(images)
        if step % every == 0:
            seen[step] = observation
        if len(waiting) < BATCH * every and step + 1 < episode.length:
            continue
        chunks = dict(zip(seen, policy.act_batch(list(seen.values())))) if seen else {}
        yield from ((images, chunks.get(at)) for at, images in enumerate(waiting, step + 1 - len(waiting)))
        waiting, seen = [], {}


def _trajectory(fields: ActionMap, actions: np.ndarray) -> np.ndarray | None:
    """End-effector positions [t,3] in meters that native actions [t,d] lead the (right or only) hand to.

    Velocities are integrated from the origin; None where actions are joints."""
    unified = fields.to_unified(actions)  # [t,128]
    position, velocity = ([SLOTS[f"eef_{kind}_{a}"] for a in "xyz"] for kind in ("pos", "vel"))
    if fields.mask[position].all():
        return unified[:, position]
    if fields.mask[velocity].all():
        return np.vstack([np.zeros(3), np.cumsum(unified[:, velocity], 0) / fields.control_hz])
    return None


def _blueprint(episode: Episode, fields: Sequence[str]) -> Any:
    """Images on the left, curves on the right, the trajectory below them."""
    import rerun.blueprint as rrb

    curves = [rrb.TimeSeriesView(origin=f"action/{name}", name=name) for name in fields]
    return rrb.Blueprint(
        rrb.Horizontal(
            rrb.Vertical(
                *(rrb.Spatial2DView(origin=f"views/{view.name}", name=view.name) for view in episode.views),
                rrb.TextDocumentView(origin="instruction"),
            ),
            rrb.Vertical(
                rrb.Tabs(*curves),
                rrb.TimeSeriesView(origin="error", name="error"),
                rrb.Spatial3DView(origin="way", name="coming chunk"),
            ),
        )
    )
