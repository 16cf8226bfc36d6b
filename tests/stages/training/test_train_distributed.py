"""Training in two processes (gloo, CPU) is training in one with the double batch, whatever is split over them and where
it stops.

One launch does all the runs: importing torch three times is what takes the time.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.training import checks
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.parallel.world import ENVIRONMENT, World, join
from dvla.stages.training.train import train
from support import synthetic_cache as synthetic
from support.distributed_runs import in_two_processes
from support.run_samples import EVALUATED

SETTINGS = {**EVALUATED, "dit": {**EVALUATED["dit"], "blocks": 2}, "eval_batches": 3, "save_every": 1}
THAW = {"unfreeze": {"dit.blocks.1": 2}, "eval_every": 0}
QUEUES = {"loss": {"queue": "task", "queue_size": 3}, "eval_every": 0, "accumulate": 2}
PAST = {"history": [0, -3], "proprio_history": [0, -1], "accumulate": 2, "eval_every": 0}
RUNS: dict[str, dict[str, Any]] = {  # in two processes; the same name in ONE: in one process
    "ddp": {"accumulate": 2},
    "fsdp2": {"accumulate": 2, "strategy": "fsdp2"},
    "mixed": {"accumulate": 2, "stop_after": 2},
    "thaw": THAW,
    "thaw-fsdp2": {**THAW, "strategy": "fsdp2"},
    "signal": {"signal": [1, 3], "save_every": 100, "eval_every": 0},
    "queues": QUEUES,
    "still": {"steps": 1, "eval_every": 1, "optimizer": {"lr": 0.0}},
    "flow": {"loss": {"kind": "flow"}, "steps": 2},
    "foreign": {},
    "history": PAST,
    "moved": {"steps": 6, "stop_after": 2, "eval_every": 0},
}
if find_spec("deepspeed"):
    RUNS |= {"zero2": {"accumulate": 2, "stop_after": 2, "strategy": "zero2"}}
ONE: dict[str, dict[str, Any]] = {
    "ddp": {"batch_size": 8, "accumulate": 2},
    "thaw": {"batch_size": 8, **THAW},
    "queues": {"batch_size": 8, **QUEUES},
    "history": {"batch_size": 8, **PAST},
    "still": {"steps": 1, "eval_every": 1, "optimizer": {"lr": 0.0}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two/NAME (and NAME.report, what each process said) and one/NAME."""
    base = tmp_path_factory.mktemp("distributed")
    synthetic.build(base / "cache")
    common = {**SETTINGS, "cache": str(base / "cache")}
    (base / "two" / "foreign").mkdir(parents=True)
    (base / "two" / "foreign" / "notes.txt").write_text("mine")
    jobs = [{**common, "out": str(base / "two" / name), **changes} for name, changes in RUNS.items()]
    jobs.append(
        {**common, "out": str(base / "two" / "mixed"), "accumulate": 2, "strategy": "fsdp2"}
    )  # the other half, otherwise
    if "zero2" in RUNS:
        jobs.append({**common, "out": str(base / "two" / "zero2"), "accumulate": 2, "strategy": "zero2"})
    in_two_processes(jobs)
    for name, changes in ONE.items():
        train(from_mapping(TrainConfig, {**common, "out": str(base / "one" / name), **changes}), say=lambda _: None)
    return base


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = ck.resolve(run)
    return {
        f"{stem}/{n}": t
        for stem in ("model", "ema", "optimizer")
        for n, t in load_file(folder / f"{stem}.safetensors").items()
    }


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def reports(runs: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((runs / "two" / f"{name}.report").read_text())


@pytest.mark.parametrize(
    "two, one",
    [
        ("ddp", "ddp"),
        ("fsdp2", "ddp"),
        ("mixed", "ddp"),
        ("thaw", "thaw"),
        ("thaw-fsdp2", "thaw"),
        ("queues", "queues"),
        ("history", "history"),
        ("zero2", "ddp"),
    ],
)
def test_two_processes_learn_what_one_does(runs: Path, two: str, one: str) -> None:
    if two not in RUNS:
        pytest.skip("needs the package deepspeed")
    found, expected = tensors(runs / "two" / two), tensors(runs / "one" / one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    lines, others = log(runs / "two" / two), log(runs / "one" / one)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # written once, by the first process
    for line, other in zip(lines, others):
        for key in ("loss", "mse", "drift", "scale", "grad_norm", "mean_square"):
            assert line[key] == pytest.approx(other[key], rel=1e-4), key
    assert read_json(ck.resolve(runs / "two" / two) / "state.json")["offset"] == 4 * 8 * (1 if one == "thaw" else 2)


def test_queues_hold_the_chunks_of_all_processes(runs: Path) -> None:
    found, expected = (load_file(ck.resolve(runs / n / "queues") / "queues.safetensors") for n in ("two", "one"))
    assert (
        torch.equal(found["keys"], expected["keys"])
        and torch.equal(found["pushed"], expected["pushed"])
        and found["pushed"].sum() > 8
    )
    torch.testing.assert_close(found["chunks"], expected["chunks"], rtol=1e-5, atol=1e-6)


def test_one_process_speaks(runs: Path) -> None:
    first, second = reports(runs, "ddp")
    assert first["said"][0] == "Batch: 4/process × 2 accum × 2 processes = 16 global" and second["said"] == []
    assert reports(runs, "mixed")[0]["said"][0] == f"resuming {runs / 'two' / 'mixed'} at step 2 of 4"


def test_evaluation_does_not_depend_on_the_number_of_processes(runs: Path) -> None:
    one, two = (log(runs / n / "still")[0] for n in ("one", "two"))
    names = [k for k in one if k.startswith("eval/")]
    assert {"eval/mse", "eval/correlation/alpha", "eval/mse/embodiment/gripper_joint"} <= set(names)
    assert {k: two[k] for k in names} == pytest.approx({k: one[k] for k in names}, rel=1e-5)


def test_a_signal_to_one_stops_both_after_the_same_step(runs: Path) -> None:
    assert [(r["step"], r["interrupted"]) for r in reports(runs, "signal")] == [(3, True), (3, True)]
    state = read_json(ck.resolve(runs / "two" / "signal") / "state.json")
    assert (state["step"], state["offset"]) == (3, 3 * 8)


def test_a_refusal_reaches_every_process(runs: Path) -> None:
    answers = reports(runs, "foreign")
    assert len(answers) == 2 and all("holds other files; choose another --out" in a["error"] for a in answers)
    assert [p.name for p in (runs / "two" / "foreign").iterdir()] == ["notes.txt"]


def test_other_heads_train_and_evaluate(runs: Path) -> None:
    assert all(torch.isfinite(torch.tensor([line["loss"], line["mse"]])).all() for line in log(runs / "two" / "flow"))
    assert "eval/mse" in log(runs / "two" / "flow")[-1]


def test_a_run_goes_on_in_another_number_of_processes(runs: Path) -> None:
    said: list[str] = []
    settings = {
        **SETTINGS,
        "cache": str(runs / "cache"),
        "out": str(runs / "two" / "moved"),
        "steps": 6,
        "eval_every": 0,
    }
    train(from_mapping(TrainConfig, settings), say=said.append)
    assert said[1] == "resuming in 1 process a run of 2: same samples in the same order, 4 per step"
    assert read_json(ck.resolve(runs / "two" / "moved") / "state.json")["offset"] == 2 * 8 + 4 * 4


def test_sharding_needs_processes(runs: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "cache": str(runs / "cache"), "out": str(tmp_path / "run"), "strategy": "fsdp2"}
    with pytest.raises(
        UserError, match="strategy fsdp2 splits the network over processes and this is a single one; .*torchrun"
    ):
        train(from_mapping(TrainConfig, settings), say=lambda _: None)


def test_zero2_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"zero2 needs the package deepspeed, which is not installed: pip install 'dvla\[deepspeed\]'"
    ):
        checks.require_deepspeed()


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as world:
        assert world == World(torch.device("cpu")) and world.main and not world.launched
        assert (
            world.mean(1.5, 2.0) == [1.5, 2.0] and world.any(True) and not world.any(False) and world.gather(None) == []
        )
        assert world.on_main(lambda: 3) == 3
