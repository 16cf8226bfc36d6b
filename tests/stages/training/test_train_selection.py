"""Training on chosen demonstrations of a cache: the run of a cache of these alone, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla.cache.actions.selection import Selection
from dvla.cache.loader.loader import Loader
from dvla.cache.loader.select import select
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.caching.transfer.webdataset import export
from dvla.stages.policy import checkpoint as ck
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.train import train
from support.cli_runner import Dvla, refused
from support.corner import Corner, other_instruction
from support.lerobot_samples import LENGTHS
from support.pauses import KEPT, marked, with_pause
from support.run_samples import EVALUATED
from support.vlm_samples import TINY

SETTINGS: dict[str, Any] = {**EVALUATED, "optimizer": {}, "panels": {"every": 0}}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


@pytest.fixture
def corner(recorded: dict[str, Path], vlm: Path, tmp_path: Path) -> Corner:
    return Corner(tmp_path, recorded["image"], vlm)


def configure(cache: Path, out: Path, **changes: Any) -> TrainConfig:
    return from_mapping(TrainConfig, {"cache": str(cache), "out": str(out), **SETTINGS, **changes})


def run(cache: Path, out: Path, said: list[str] | None = None, stop_after: int | None = None, **changes: Any) -> Path:
    train(configure(cache, out, **changes), say=(said if said is not None else []).append, stop_after=stop_after)
    return out


def learned(run: Path) -> tuple[list[dict[str, float]], dict[str, bytes], dict[str, Any]]:
    """The losses and held-out errors of every step, the weights, and what the policy knows of its data."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    numbers = [
        {k: v for k, v in x.items() if k in ("loss", "grad_norm", "mse") or k.startswith("eval/")} for x in lines
    ]
    folder = ck.resolve(run)
    weights = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".safetensors"}
    return numbers, weights, read_json(folder / "policy.json")["datasets"][0]


CHOSEN = {"include": ["1-"]}


@pytest.mark.parametrize("order", ["global", "block", "sequential"])
def test_a_selection_learns_what_the_reduced_cache_teaches(corner: Corner, tmp_path: Path, order: str) -> None:
    corner.record(3, with_pause).build()
    corner.build(out=tmp_path / "some", select=Selection(("1-",)))
    wanted = learned(run(tmp_path / "some", tmp_path / "a", order=order))
    found = learned(run(corner.out, tmp_path / "b", order=order, select=CHOSEN))
    assert found == wanted and len(wanted[0]) == 4
    assert learned(run(corner.out, tmp_path / "c", order=order))[0] != wanted[0]


def test_texts_are_padded_as_in_the_reduced_cache(corner: Corner, tmp_path: Path) -> None:
    corner.record(3, other_instruction).build()
    selected = select(Cache.open(corner.out), Selection(("0,2",)))
    corner.build(out=tmp_path / "some", select=Selection(("0,2",)))
    assert selected.datasets[0].text.shape[1] < Cache.open(corner.out).datasets[0].text.shape[1]
    assert selected.datasets[0].text.shape[1:] == Cache.open(tmp_path / "some").datasets[0].text.shape[1:]


def test_idle_frames_are_not_trained_on(corner: Corner, tmp_path: Path) -> None:
    """From a cache of all frames as from one without the idle ones; the commands of the pause stay in the chunks."""
    corner.record(3, with_pause).build()
    corner.build(out=tmp_path / "some", select=Selection(drop_idle=True))
    said: list[str] = []
    found = learned(run(corner.out, tmp_path / "a", said, select={"drop_idle": True}))
    assert found == learned(run(tmp_path / "some", tmp_path / "b"))
    assert "Idle: 36% of frames, not trained on" in said and "Data: 3 episodes, 0 left out by the selection" in said
    said.clear()
    run(corner.out, tmp_path / "c", said)
    assert "Idle: 36% of frames; --drop-idle leaves them out" in said
    chosen = select(Cache.open(corner.out), Selection(drop_idle=True))
    with Loader(chosen, batch_size=sum(map(len, KEPT.values())), horizon=8, order="sequential") as loader:
        batch = next(loader).batch
    starts = np.cumsum([0, *LENGTHS[:-1]])
    wanted = [s + f for s, frames in zip(starts, KEPT.values()) for f in frames]
    assert batch.frame_index.tolist() == wanted
    assert batch.step_mask[-9].all()  # frame 7 of the last episode, whose chunk reaches through the pause


def test_frames_to_keep(corner: Corner, tmp_path: Path) -> None:
    corner.record(3).build()
    file = tmp_path / "keep.json"
    file.write_text(json.dumps({"0": [[0, 3], [6, 9]], "2": [[10, 16]]}))
    corner.build(out=tmp_path / "some", select=Selection((str(file),)))
    wanted = learned(run(tmp_path / "some", tmp_path / "a"))
    assert learned(run(corner.out, tmp_path / "b", select={"include": [str(file)]})) == wanted


def test_an_export_is_selected_from_too(corner: Corner, tmp_path: Path) -> None:
    corner.record(3, with_pause).build()
    export(corner.out, str(tmp_path / "tars"))
    how = {"select": {**CHOSEN, "drop_idle": True}}
    assert learned(run(tmp_path / "tars", tmp_path / "a", **how)) == learned(run(corner.out, tmp_path / "b", **how))


def test_failed_demonstrations_are_left_out(corner: Corner, tmp_path: Path) -> None:
    corner.record(3, marked(0)).build()
    said: list[str] = []
    wanted = learned(run(corner.out, tmp_path / "a", said, select=CHOSEN))
    assert learned(run(corner.out, tmp_path / "b", said, select={"success_only": True})) == wanted
    assert not any("marked as failed" in line for line in said)
    run(corner.out, tmp_path / "c", said)
    assert "Data: 1 of 3 demonstrations are marked as failed; --success-only leaves them out" in said


def test_resume_keeps_the_selection(corner: Corner, tmp_path: Path) -> None:
    corner.record(3).build()
    file = tmp_path / "keep.json"
    file.write_text("[1, 2]")
    how = {"select": {"include": [str(file)]}}
    whole = learned(run(corner.out, tmp_path / "a", **how))
    run(corner.out, tmp_path / "b", stop_after=2, **how)
    for other in ({"include": ["1-"]}, {}, {**how["select"], "drop_idle": True}):
        with pytest.raises(UserError, match=r"has other settings: select\."):
            run(corner.out, tmp_path / "b", select=other)
    assert learned(run(corner.out, tmp_path / "b", **how)) == whole
    file.write_text("[0, 2]")
    with pytest.raises(UserError, match=r"has other settings: select.include"):
        run(corner.out, tmp_path / "b", **how)


def test_a_run_without_a_selection_stores_none(corner: Corner, tmp_path: Path) -> None:
    """A run of an earlier release, whose settings do not know of it, resumes."""
    corner.record(3).build()
    run(corner.out, tmp_path / "a", stop_after=2)
    settings = read_json(tmp_path / "a" / "config.json")
    del settings["select"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(settings))
    run(corner.out, tmp_path / "a")
    assert learned(tmp_path / "a") == learned(run(corner.out, tmp_path / "b"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--include-episodes", "7"), ("data has no episode 7; it has 2, 0 to 1",)),
        (("--include-episodes", "0-1", "--exclude-episodes", "0"), ("both name episode 0",)),
        (("--exclude-episodes", "0-"), ("no episode of data is left",)),
        (("--include-episodes", "x"), ("'x' is no id",)),
        (("--include-episodes", "a.json"), ("cannot read a.json",)),
        (("--include-episodes", '{"a--b": [[0, 3]]}'), ("dvla cache build",)),
        (("--success-only",), ("marks no demonstration as failed",)),
    ],
)
def test_bad_input_is_one_line(corner: Corner, dvla: Dvla, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    corner.record(2).build()
    out = corner.folder / "run"
    refused(dvla("train", "--from-cache", corner.out, "--out", out, "--device", "cpu", *options), *words)
    assert not out.exists()
