"""Documents and tensors of a run: what no training writes is one line before a step is taken, also where a forger made
the checksums fit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvla.common.config import from_mapping
from dvla.common.documents import json_bytes
from dvla.common.files import crc32c, file_crc32c
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.training.config import TrainConfig, read_settings
from dvla.stages.training.train import train
from support import synthetic_cache as synthetic
from support.run_samples import FOUR_STEPS

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of four steps, with queues."""
    base = tmp_path_factory.mktemp("begun")
    synthetic.build(base / "cache")
    train(configure(base / "cache", base / "run"), say=lambda _: None, stop_after=2)
    return base


def configure(cache: Path, out: Path) -> TrainConfig:
    queue = {"queue": "task", "queue_size": 3}
    return from_mapping(TrainConfig, {**FOUR_STEPS, "loss": queue, "cache": str(cache), "out": str(out)})


def resumed(begun: Path, tmp_path: Path, spoil: Callable[[Path], Any]) -> Callable[[], Any]:
    """A resumed training of a copy of the run that `spoil(run)` was applied to."""
    shutil.copytree(begun / "run", tmp_path / "run")
    spoil(tmp_path / "run")
    for folder in ck.checkpoints(tmp_path / "run"):
        state = json.loads((folder / "state.json").read_text())
        state.pop("crc32c", None)
        state["files"] = {name: list(file_crc32c(folder / name)) for name in state["files"]}
        (folder / "state.json").write_bytes(json_bytes({**state, "crc32c": crc32c(json_bytes(state))}))
    return lambda: train(configure(begun / "cache", tmp_path / "run"), say=lambda _: None)


def test_an_unspoiled_one_resumes(begun: Path, tmp_path: Path) -> None:
    assert resumed(begun, tmp_path, lambda run: None)().step == 4


def changed(stem: str, change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        file = ck.checkpoints(run)[-1] / f"{stem}.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)

    return spoil


NAME = "dit.modulation.weight"


@pytest.mark.parametrize(
    ("stem", "change", "said"),
    [
        ("model", lambda t: t.update({NAME: t[NAME].double()}), f"{NAME} is float64"),
        ("optimizer", lambda t: t.clear(), "AdamW's state of its network: .* is missing"),
        ("optimizer", lambda t: t.pop(f"{NAME}:exp_avg"), f"{NAME}:exp_avg is missing"),
        ("optimizer", lambda t: t.update({"more:exp_avg": torch.ones(1)}), "'more:exp_avg' belongs to no part of it"),
        ("optimizer", lambda t: t.update({f"{NAME}:exp_avg": t[f"{NAME}:exp_avg"].half()}), "is float16"),
        ("optimizer", lambda t: t.update({f"{NAME}:exp_avg": t[f"{NAME}:exp_avg"][:-1]}), "expected float32"),
        ("optimizer", lambda t: t[f"{NAME}:exp_avg"].fill_(torch.nan), "is not finite"),
        ("optimizer", lambda t: t[f"{NAME}:exp_avg_sq"].fill_(-1), "nothing that 2 steps give"),
        ("optimizer", lambda t: t[f"{NAME}:step"].fill_(3), "nothing that 2 steps give"),
        ("queues", lambda t: t.clear(), "queues of its settings: keys is missing"),
        ("queues", lambda t: t.update(chunks=t["chunks"][:, :, :2]), "chunks is float32"),
        ("queues", lambda t: t.update(keys=t["keys"].float()), "keys is float32"),
        ("queues", lambda t: t["pushed"].zero_(), "a queue is empty"),
        ("queues", lambda t: t["keys"].zero_(), "given twice"),
        ("queues", lambda t: t["chunks"].fill_(torch.inf), "not finite"),
    ],
)
def test_forged_tensors_are_refused(
    begun: Path, tmp_path: Path, stem: str, change: Callable[[Tensors], Any], said: str
) -> None:
    resume = resumed(begun, tmp_path, changed(stem, change))
    with pytest.raises(UserError, match=said) as error:
        resume()
    assert "\n" not in str(error.value)


def document(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        value = json.loads((run / name).read_text())
        change(value)
        (run / name).write_text(json.dumps(value))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (document("config.json", lambda v: v.update(batch_size="4")), "config.json is damaged: .*batch_size"),
        (document("config.json", lambda v: v.update(holdout=float("nan"))), "config.json is not valid JSON"),
        (document("config.json", lambda v: v.update(more=1)), "config.json is damaged: .*more"),
        (document("config.json", lambda v: v.pop("seed")), "config.json is damaged: 'seed' is missing"),
        (document("config.json", lambda v: v["loss"].pop("kind")), "config.json is damaged: 'loss.kind' is missing"),
        (document("config.json", lambda v: v.update(stage_three={"start": 1})), "start"),
        (document("environment.json", lambda v: v.update(cache_fingerprint=[])), "cache_fingerprint"),
        (document("environment.json", lambda v: v.update(more=[])), "'more' is no key of it"),
        (lambda run: (run / "log.jsonl").write_text('{"step": 1}\n[]\n'), "log.jsonl line 2 is damaged"),
    ],
)
def test_documents_of_another_form_are_refused(
    begun: Path, tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        resumed(begun, tmp_path, spoil)()


def test_a_pipe_is_not_waited_for(begun: Path, tmp_path: Path) -> None:
    for name in ("config.json", "environment.json", "log.jsonl"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()

        def spoil(run: Path, name: str = name) -> None:
            (run / name).unlink()
            os.mkfifo(run / name)

        with pytest.raises(UserError, match=f"{name}: it is a pipe"):
            resumed(begun, folder, spoil)()


def test_earlier_runs_lack_later_settings_alone(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "run", tmp_path / "run")
    document("config.json", lambda v: (v.pop("select"), v["optimizer"].pop("schedule")))(tmp_path / "run")
    assert read_settings(tmp_path / "run")["batch_size"] == 4
    document("config.json", lambda v: v.pop("draws"))(tmp_path / "run")
    assert read_settings(tmp_path / "run", whole=False)["batch_size"] == 4
    with pytest.raises(UserError, match="'draws' is missing"):
        read_settings(tmp_path / "run")
