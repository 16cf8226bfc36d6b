"""The training loop: a resumed run is the uninterrupted one, bit for bit, and what cannot be trained is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dvla.cache.shard import file_crc32c
from dvla.errors import UserError
from dvla.settings import from_mapping
from dvla.stages import checkpoint as ck
from dvla.stages import train as train_module
from dvla.stages.train import learning_rate, train
from dvla.stages.train_config import TrainConfig, train_config
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import synthetic_cache as synthetic  # noqa: E402

STEMS = ("model", "ema", "optimizer")
SETTINGS = {
    "model_size": "tiny",
    "dit": {"width": 32, "blocks": 1, "heads": 2, "horizon": 4},
    "steps": 4,
    "batch_size": 4,
    "draws": 2,
    "holdout": 0.3,
    "eval_every": 2,
    "eval_batches": 2,
    "save_every": 1,
    "log_every": 1,
    "threads": 1,
    "device": "cpu",
    "optimizer": {"lr": 1e-3, "warmup": 2},
}


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "cache"
    synthetic.build(path)
    return path


def configure(cache: Path, out: Path, **changes: Any) -> TrainConfig:
    return from_mapping(TrainConfig, {"cache": str(cache), "out": str(out), **SETTINGS, **changes})


@pytest.fixture(scope="module")
def straight(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a stop."""
    out = tmp_path_factory.mktemp("straight") / "run"
    report = train(configure(cache, out), say=quiet)
    assert (report.step, report.interrupted) == (4, False)
    return out


def tensors(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    folder = ck.resolve(run) if step is None else run / "checkpoints" / f"step-{step:08d}"
    return {f"{stem}/{n}": t for stem in STEMS for n, t in load_file(folder / f"{stem}.safetensors").items()}


def assert_equal_runs(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and ck.resolve(a).name == ck.resolve(b).name
    assert [n for n in first if not torch.equal(first[n], second[n])] == []
    states = [ck.read_json(ck.resolve(run) / "state.json") for run in (a, b)]
    assert states[0] == states[1]  # step, offset, losses, held-out metrics, hashes of all files


def change_weights(folder: Path, name: str, value: float) -> None:
    """Overwrite one tensor of a checkpoint's model and correct its recorded hash."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    stored[name].fill_(value)
    save_file(stored, file)
    state = ck.read_json(folder / "state.json")
    state["files"][file.name] = list(file_crc32c(file))
    (folder / "state.json").write_bytes(ck.json_bytes(state))


def test_resume_equals_straight(cache: Path, straight: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "run", []
    report = train(configure(cache, out), say=quiet, stop_after=2)
    assert (report.step, ck.resolve(out).name) == (2, "step-00000002")
    torch.manual_seed(123)  # nothing may hang on the global generator
    report = train(configure(cache, out, threads=2, log_every=3), say=said.append)
    assert said == [f"resuming {out} at step 2 of 4"] and report.step == 4
    assert_equal_runs(out, straight)
    again = train(configure(cache, out), say=quiet)  # a finished run: nothing happens
    assert (again.step, again.first_loss, again.loss) == (4, report.first_loss, report.loss)
    assert_equal_runs(out, straight)


def test_accumulated_run_resumes(cache: Path, tmp_path: Path) -> None:
    for out, stops in ((tmp_path / "a", (None,)), (tmp_path / "b", (1, None))):
        for stop in stops:
            train(configure(cache, out, accumulate=2, steps=2, alpha_max=4.0), say=quiet, stop_after=stop)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_the_run_learns_and_is_whole(cache: Path, straight: Path) -> None:
    assert [p.name for p in ck.checkpoints(straight)] == ["step-00000003", "step-00000004"]  # keep_last = 2
    before, after = tensors(straight, 3), tensors(straight, 4)
    moved = [n for n in after if n.startswith("model/") and not torch.equal(before[n], after[n])]
    assert len(moved) > 0.7 * sum(n.startswith("model/") for n in after)
    assert any(not torch.equal(after[n], after[n.replace("model/", "ema/")]) for n in moved)
    assert all(torch.isfinite(t).all() for t in after.values())
    lines = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"eval/mse", "eval/mae", "eval/mse/alpha", "eval/mse/beta"} <= lines[-1].keys()
    config = configure(cache, straight)
    assert [line["lr"] for line in lines] == [learning_rate(i, config) for i in range(4)]
    assert learning_rate(0, config) == 0.5e-3 and learning_rate(config.steps, config) < 1e-12


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"batch_size": 8}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"dit": {"horizon": 8}}, "dit.horizon"),
        ({"optimizer": {"lr": 2e-3, "warmup": 2}}, "optimizer.lr"),
        ({"steps": 5}, "steps"),
        ({"blind": True}, "blind"),
    ],
)
def test_other_settings_are_refused(cache: Path, straight: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"begun with other settings: .*\b{field}\b") as error:
        train(configure(cache, straight, **changes), say=quiet)
    assert "\n" not in str(error.value)


def test_another_cache_at_the_same_place_is_refused(cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    train(configure(copy, tmp_path / "run"), say=quiet, stop_after=1)
    fingerprint = ck.read_json(copy / "fingerprint.json")
    fingerprint["encoder"]["resolution"] = 224
    (copy / "fingerprint.json").write_text(json.dumps(fingerprint))
    with pytest.raises(UserError, match=r"not the one run .* was begun with.*resolution.*448.*224"):
        train(configure(copy, tmp_path / "run"), say=quiet)


def test_foreign_folder_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; choose another --out"):
        train(configure(cache, tmp_path), say=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no state"])
def test_damaged_newest_checkpoint_falls_back(cache: Path, straight: Path, tmp_path: Path, damage: str) -> None:
    out, said = shutil.copytree(straight, tmp_path / "run"), []
    file = out / "checkpoints" / "step-00000004" / ("state.json" if damage == "no state" else "ema.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content[:-1] if damage == "truncated" else content)
    if damage == "no state":
        file.unlink()
    report = train(dataclasses.replace(configure(cache, straight), out=str(out)), say=said.append)
    assert "step-00000004" in said[0] and "falling back to the checkpoint before" in said[0]
    assert said[1] == f"resuming {out} at step 3 of 4" and report.step == 4
    assert_equal_runs(out, straight)


def test_no_whole_checkpoint_is_said(cache: Path, straight: Path, tmp_path: Path) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    for folder in ck.checkpoints(out):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is whole .*model.safetensors is damaged"):
        train(configure(cache, out), say=quiet)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_loss_stops_before_the_step(
    cache: Path, straight: Path, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    folder = ck.resolve(out)
    change_weights(folder, "proj_seq.0.weight", value)
    steps, before = [], tensors(out)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: steps.append(1))
    with pytest.raises(UserError, match="the loss at step 3 is nan, .*; training stopped before the optimiser step"):
        train(configure(cache, out), say=quiet)
    assert not steps
    assert ck.checkpoints(out)[-1] == folder and ck.load_state(folder)["step"] == 3
    after = tensors(out)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_non_finite_gradient_stops_before_the_step(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, step = configure(cache, tmp_path / "run"), train_module.training_step
    train(config, say=quiet, stop_after=1)
    before = tensors(tmp_path / "run")

    def cliff(net: Any, *rest: Any) -> Any:  # finite, but without a derivative
        result = step(net, *rest)
        return dataclasses.replace(result, total=result.total + (0 * net.proj_seq[0].weight).sqrt().sum())

    monkeypatch.setattr(train_module, "training_step", cliff)
    with pytest.raises(UserError, match="the loss at step 1 is [0-9.]+, its gradient's norm nan; training stopped"):
        train(config, say=quiet)
    after = tensors(tmp_path / "run")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_failed_save_leaves_the_one_before(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(cache, tmp_path / "run")
    train(config, say=quiet, stop_after=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck, "write_file", full)
    with pytest.raises(UserError, match="cannot write checkpoint .*step-00000002: No space left"):
        train(config, say=quiet)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    ck.load_state(ck.resolve(tmp_path / "run"))


SIGTERM_SCRIPT = """
import json, os, signal, sys
from dvla.settings import from_mapping
from dvla.stages.train import train
from dvla.stages.train_config import TrainConfig

def on_log(line):
    if line["step"] == 2:
        os.kill(os.getpid(), signal.SIGTERM)

report = train(from_mapping(TrainConfig, json.loads(sys.argv[1])), on_log=on_log)
print("report", report.step, report.interrupted)
"""


def test_sigterm_saves_and_the_run_goes_on(cache: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    values = {"cache": str(cache), "out": str(out), **SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", SIGTERM_SCRIPT, json.dumps({**values, "save_every": 1000})],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["report", "2", "True"]), done.stderr
    assert [p.name for p in ck.checkpoints(out)] == ["step-00000002"]
    assert train(from_mapping(TrainConfig, {**values, "save_every": 1000}), say=quiet).step == 4
    assert_equal_runs(out, straight)


def test_signal_during_a_save(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during a save ends the run one step later, with that step saved."""
    save, config = ck.save_checkpoint, configure(cache, tmp_path / "run", save_every=2, steps=6, eval_every=0)

    def and_signal(*args: Any, **kw: Any) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return save(*args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(ck, "save_checkpoint", and_signal)
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the second signal, of the last save, does nothing
        try:
            report = train(config, say=quiet)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert report.interrupted and ck.load_state(ck.resolve(tmp_path / "run"))["step"] == report.step == 3


def test_blind_run_does_not_see_features(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feature = synthetic.feature
    monkeypatch.setattr(synthetic, "feature", lambda *key: -feature(*key))
    synthetic.build(tmp_path / "other")
    for path in (cache, tmp_path / "other"):
        for blind in (True, False):
            train(configure(path, tmp_path / f"{path.name}-{blind}", blind=blind, steps=2), say=quiet)
    assert_equal_runs(tmp_path / "cache-True", tmp_path / "other-True")
    seeing = tensors(tmp_path / "cache-False"), tensors(tmp_path / "other-False")
    assert any(not torch.equal(seeing[0][n], seeing[1][n]) for n in seeing[0])
    document = ck.read_json(ck.resolve(tmp_path / "cache-True") / "policy.json")
    assert document["conditions"]["blind"] is True


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"batchsize": 4}, "unknown setting 'batchsize'; did you mean 'batch_size'"),
        ({"optimizer.learning": 1.0}, "training settings.optimizer: unknown setting 'learning'"),
        ({"loss.kind": "hybrd"}, "hybrd.*did you mean 'hybrid'"),
        ({"steps": "many"}, "steps: expected int, got 'many'"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"masking.text": 1.5}, "masking of text is 1.5"),
        ({"precision": "fp16"}, "precision.*fp16"),
        ({"steps.of": 1}, "'steps' is a value, not a group"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train_config(None, {"cache": "c", "out": "o", "steps": 3, **overrides})
    assert "\n" not in str(error.value)


def test_bad_model_settings(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown DiT setting 'widht'; did you mean 'width'"):
        train(configure(cache, tmp_path / "run", dit={"widht": 32}), say=quiet)
    with pytest.raises(UserError, match="unknown DiT size 'bse'; did you mean 'base'"):
        train(configure(cache, tmp_path / "run", model_size="bse"), say=quiet)
    with pytest.raises(UserError, match="no cache at"):
        train(configure(tmp_path / "none", tmp_path / "run"), say=quiet)
    assert not (tmp_path / "run").exists()


def test_rate_at_the_end_of_warmup() -> None:
    config = from_mapping(
        TrainConfig, {"cache": "c", "out": "o", "steps": 1000, "optimizer": {"lr": 1.0, "warmup": 100}}
    )
    rates = np.array([learning_rate(i, config) for i in range(1000)])
    assert rates.argmax() in range(95, 101) and rates.max() > 0.97
    assert (np.diff(rates[100:]) < 0).all() and (np.diff(rates[:95]) > 0).all()
