"""The training loop: a resumed run is the uninterrupted one, bit for bit, and what cannot be trained is refused."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dvla.batch import FeatureBatch
from dvla.cache.store.cache import Cache
from dvla.common.config import from_mapping
from dvla.common.documents import json_bytes, read_json
from dvla.common.files import file_crc32c
from dvla.errors import UserError
from dvla.stages.caching.transfer.webdataset import export
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.export import export_policy
from dvla.stages.training import loop
from dvla.stages.training.config import TrainConfig, train_config
from dvla.stages.training.context import Session
from dvla.stages.training.loop import run
from dvla.stages.training.setup import memory_errors
from dvla.stages.training.step import learning_rate
from dvla.stages.training.train import policy_net, train
from support import synthetic_cache as synthetic
from support.run_samples import EVALUATED

STEMS = ("model", "ema", "optimizer")
SETTINGS = {**EVALUATED, "save_every": 1}


def quiet(*_: Any) -> None:
    pass


def configure(cache: Path | str, out: Path, **changes: Any) -> TrainConfig:
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
    states = [read_json(ck.resolve(run) / "state.json") for run in (a, b)]
    assert states[0] == states[1]  # step, offset, losses, held-out metrics, hashes of all files


def change_weights(folder: Path, name: str, value: float) -> None:
    """Overwrite one tensor of a checkpoint's model and correct its recorded hash."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    stored[name].fill_(value)
    save_file(stored, file)
    state = read_json(folder / "state.json")
    state["files"][file.name] = list(file_crc32c(file))
    del state["crc32c"]  # as checkpoints of earlier releases
    (folder / "state.json").write_bytes(json_bytes(state))


def test_resume_equals_straight(cache: Path, straight: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "run", []
    report = train(configure(cache, out), say=quiet, stop_after=2)
    assert (report.step, ck.resolve(out).name) == (2, "step-00000002")
    torch.manual_seed(123)  # nothing may hang on the global generator
    report = train(configure(cache, out, threads=2, log_every=3), say=said.append)
    assert said[:2] == [f"resuming {out} at step 2 of 4", "Batch: 4/process × 1 accum × 1 process = 4 global"]
    assert said[2].startswith("Parameters: ") and len(said) == 3 and report.step == 4
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
    best = ck.resolve(straight / "checkpoints" / "best")
    kept = {"step-00000003", "step-00000004", best.name}  # keep_last = 2
    assert {p.name for p in ck.checkpoints(straight)} == kept
    before, after = tensors(straight, 3), tensors(straight, 4)
    moved = [n for n in after if n.startswith("model/") and not torch.equal(before[n], after[n])]
    assert len(moved) > 0.7 * sum(n.startswith("model/") for n in after)
    assert any(not torch.equal(after[n], after[n.replace("model/", "ema/")]) for n in moved)
    assert all(torch.isfinite(t).all() for t in after.values())
    lines = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    errors = {line["step"]: line["eval/mse"] for line in lines if "eval/mse" in line}
    assert best.name == f"step-{min(errors, key=errors.get):08d}" and errors.keys() == {2, 4}
    assert all(line["binds"] in ("disk", "compute") for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"eval/mse", "eval/mae", "eval/mse/alpha", "eval/mse/beta"} <= lines[-1].keys()
    config = configure(cache, straight)
    assert [line["lr"] for line in lines] == [learning_rate(i, config) for i in range(4)]
    assert learning_rate(0, config) == 0.5e-3 and learning_rate(config.steps, config) < 1e-12
    assert learning_rate(0, configure(cache, straight, optimizer={"lr": 1.0, "warmup": 0})) == 1.0


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"batch_size": 8}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"dit": {"horizon": 8}}, "dit.horizon"),
        ({"optimizer": {"lr": 2e-3, "warmup": 2}}, "optimizer.lr"),
        ({"blind": True}, "blind"),
    ],
)
def test_other_settings_are_refused(cache: Path, straight: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"has other settings: .*\b{field}\b") as error:
        train(configure(cache, straight, **changes), say=quiet)
    assert "\n" not in str(error.value)


def test_another_cache_at_the_same_place_is_refused(cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    train(configure(copy, tmp_path / "run"), say=quiet, stop_after=1)
    fingerprint = read_json(copy / "fingerprint.json")
    fingerprint["encoder"]["resolution"] = 224
    (copy / "fingerprint.json").write_text(json.dumps(fingerprint))
    synthetic.seal(copy)
    with pytest.raises(UserError, match=r"not the one run .* was begun with.*resolution.*448.*224"):
        train(configure(copy, tmp_path / "run"), say=quiet)


def test_a_second_training_into_the_same_run_is_one_line(cache: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "run", []

    def at_first_line(_: object) -> None:
        with pytest.raises(UserError, match="another process is training in .*; wait for it to finish") as error:
            train(configure(cache, out), say=quiet)
        refused.append(str(error.value))

    train(configure(cache, out), on_log=at_first_line, say=quiet, stop_after=1)
    assert len(refused) == 1 and "\n" not in refused[0]
    assert train(configure(cache, out), say=quiet).step == 4  # the lock went with the first


def test_a_run_knows_its_cache_by_fingerprint_not_by_name(
    cache: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name, a moved cache; and one that has grown since: its earlier generation stays beside it."""
    copy, out, said = shutil.copytree(cache, tmp_path / "cache"), tmp_path / "run", []
    train(configure(copy, out), say=quiet, stop_after=1)
    monkeypatch.chdir(tmp_path)
    assert train(configure("cache", Path("run")), say=quiet, stop_after=2).step == 2
    copy.rename(tmp_path / "moved")
    assert train(configure(tmp_path / "moved", out), say=quiet, stop_after=3).step == 3
    (tmp_path / "moved").rename(tmp_path / "cache.gen-1")
    synthetic.build(tmp_path / "cache", plan=synthetic.make_plan(frame_stride=2))  # in its place, another
    assert train(configure("cache", out), say=said.append).step == 4
    assert any("resumes with" in line and "cache.gen-1" in line for line in said)
    assert_equal_runs(out, straight)
    shutil.rmtree(tmp_path / "cache.gen-1")
    with pytest.raises(UserError, match="is not the one run .* was begun with: it was built again or grown"):
        train(configure("cache", out), say=quiet)


@pytest.mark.parametrize(("name", "value"), [("offset", 0), ("step", 99), ("files", {}), ("loss", None)])
def test_a_changed_state_resumes_nowhere(cache: Path, straight: Path, tmp_path: Path, name: str, value: object) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    for folder in ck.checkpoints(run):
        state = read_json(folder / "state.json") | {name: value}
        (folder / "state.json").write_bytes(json_bytes(state))
    with pytest.raises(UserError, match=r"no checkpoint is intact .*state.json is damaged"):
        train(configure(cache, run), say=quiet)


@pytest.mark.parametrize("change", ["nan", "empty", "shape", "foreign"])
def test_weights_that_are_not_the_networks_are_refused(
    cache: Path, straight: Path, tmp_path: Path, change: str
) -> None:
    """Their checksums are right: whoever made them wrote those too."""
    run = shutil.copytree(straight, tmp_path / "run")
    for folder in ck.checkpoints(run):
        state = read_json(folder / "state.json")
        del state["crc32c"]
        for stem in ("model", "ema"):
            file = folder / f"{stem}.safetensors"
            stored = load_file(file)
            name = next(n for n, t in stored.items() if t.ndim == 2)
            stored = {
                "nan": {**stored, name: torch.full_like(stored[name], torch.nan)},
                "empty": {},
                "shape": {**stored, name: stored[name][:-1].contiguous()},
                "foreign": {**stored, "more": torch.zeros(1)},
            }[change]
            save_file(stored, file)
            state["files"][file.name] = list(file_crc32c(file))
        (folder / "state.json").write_bytes(json_bytes(state))
    refused = "does not hold the weights of its network|is not finite"
    with pytest.raises(UserError, match=refused):
        train(configure(cache, run, steps=4), say=quiet)
    with pytest.raises(UserError, match=refused):
        export_policy(run, tmp_path / "policy", say=quiet)
    assert not (tmp_path / "policy").exists()


def test_foreign_folder_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; choose another --out"):
        train(configure(cache, tmp_path), say=quiet)
    with pytest.raises(UserError, match="cannot make run folder .*notes.txt: File exists; choose another --out"):
        train(configure(cache, tmp_path / "notes.txt"), say=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"] and (tmp_path / "notes.txt").read_text() == "mine"


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
    assert "step-00000004" in said[0] and "falling back to the previous checkpoint" in said[0]
    assert said[1] == f"resuming {out} at step 3 of 4" and report.step == 4
    assert_equal_runs(out, straight)


def test_no_whole_checkpoint_is_said(cache: Path, straight: Path, tmp_path: Path) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    for folder in ck.checkpoints(out):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is intact .*model.safetensors is damaged"):
        train(configure(cache, out), say=quiet)


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_non_finite_loss_stops_before_the_step(
    cache: Path, straight: Path, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    folder = ck.resolve(out)
    change_weights(folder, "proj_seq.0.weight", value)
    steps, before = [], tensors(out)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: steps.append(1))
    with pytest.raises(
        UserError,
        match="training stopped before optimizer step 4: the loss is nan, .* Rows: (alpha|beta):",
    ):
        train(configure(cache, out), say=quiet)
    assert not steps
    assert ck.checkpoints(out)[-1] == folder and ck.load_state(folder)["step"] == 3
    after = tensors(out)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_rows_that_are_not_finite_are_named(cache: Path, tmp_path: Path) -> None:
    config, opened, seen = configure(cache, tmp_path / "run"), Cache.open(cache), []

    def poisoned(batch: FeatureBatch, *_: Any) -> FeatureBatch:
        seen.append(f"{opened.datasets[batch.dataset[2]].name}:{batch.frame_index[2]}")
        return batch.replace(tokens=batch.tokens.index_fill(0, torch.tensor([2]), float("nan")))

    with pytest.raises(UserError) as error:
        run(Session(config, opened, policy_net(config, opened), {}, features=poisoned, say=quiet))
    said = str(error.value)
    assert "training stopped before optimizer step 1: the loss is nan, its gradient's norm nan. Lower the" in said
    assert said.endswith(f"Rows: {seen[0]} hold non-finite values")


def test_a_full_gpu_is_one_line() -> None:
    with (
        pytest.raises(UserError, match=r"cuda:0 is out of memory \(another 2.50 GiB needed\): halve --batch-size"),
        memory_errors(torch.device("cuda:0")),
    ):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"
        )


def test_non_finite_gradient_stops_before_the_step(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, step = configure(cache, tmp_path / "run"), loop.batch_loss
    train(config, say=quiet, stop_after=1)
    before = tensors(tmp_path / "run")

    def cliff(net: Any, *rest: Any) -> Any:  # finite, but without a derivative
        result = step(net, *rest)
        return dataclasses.replace(result, total=result.total + (0 * net.proj_seq[0].weight).sqrt().sum())

    monkeypatch.setattr(loop, "batch_loss", cliff)
    with pytest.raises(
        UserError, match="stopped before optimizer step 2: the loss is [0-9.]+, its gradient's norm nan"
    ):
        train(config, say=quiet)
    after = tensors(tmp_path / "run")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_failed_save_leaves_the_one_before(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(cache, tmp_path / "run")
    train(config, say=quiet, stop_after=1)

    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), ck.save_checkpoint

    def without_room(*args: Any) -> Path:  # files end at 4 KiB: writing more is an error of the system
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for where, name, broken in ((ck, "save_checkpoint", without_room), (ck, "write_file", full)):
        with (
            monkeypatch.context() as patch,
            pytest.raises(
                UserError, match="cannot write checkpoint .*step-00000002 .*(File too large|No space left)"
            ) as error,
        ):
            patch.setattr(where, name, broken)
            train(config, say=quiet)
        assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    ck.load_state(ck.resolve(tmp_path / "run"))


SIGTERM_SCRIPT = """
import json, os, signal, sys
from dvla.common.config import from_mapping
from dvla.stages.training.train import train
from dvla.stages.training.config import TrainConfig

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
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["report 2 True"]), done.stderr
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
        reached: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: reached.append(number))
        try:
            report = train(config, say=quiet)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert not reached  # nor does the second signal, of the last save, end it before it is saved
    assert report.interrupted and ck.load_state(ck.resolve(tmp_path / "run"))["step"] == report.step == 3


def test_what_this_machine_cannot_do_is_refused_first(cache: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"attention": "flash"}, "attention is flash and the device cpu"),
        ({"attention": "flex"}, "attention flex has no gradient on a CPU"),
        ({"strategy": "zero2"}, "strategy zero2 splits the network over processes and this is a single one"),
        ({"loss": {"neighbours": 2}}, "loss.neighbours is 2"),
        ({"wandb": {"mode": "online"}}, "W&B mode online needs"),
    ):
        with pytest.raises(UserError, match=message) as error:
            train(configure(cache, tmp_path / "run", **changes), say=quiet)
        assert "\n" not in str(error.value)
    with pytest.raises(
        UserError,
        match="memory://none is remote; give a folder for copies of what is read: --local-cache FOLDER",
    ):
        train(configure("memory://none", tmp_path / "run"), say=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["url", "export"])
def test_the_same_cache_elsewhere_trains_alike(cache: Path, straight: Path, tmp_path: Path, where: str) -> None:
    if where == "url":
        fsspec.filesystem("memory").put(str(cache), "/bucket/cache", recursive=True)
        train(configure("memory://bucket/cache", tmp_path / "run", local=str(tmp_path / "copies")), say=quiet)
    else:
        export(cache, str(tmp_path / "tars"))
        train(configure(tmp_path / "tars", tmp_path / "run"), say=quiet)
    found, expected = tensors(tmp_path / "run"), tensors(straight)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


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
    document = read_json(ck.resolve(tmp_path / "cache-True") / "policy.json")
    assert document["conditions"]["blind"] is True


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"batchsize": 4}, "unknown setting 'batchsize'; did you mean 'batch_size'"),
        ({"lr": 1.0}, "unknown setting 'lr'; did you mean 'optimizer.lr'"),
        ({"optimizer.learning": 1.0}, "training settings.optimizer: unknown setting 'learning'"),
        ({"loss.kind": "hybrd"}, "hybrd.*did you mean 'hybrid'"),
        ({"steps": "many"}, "steps: expected int, got 'many'"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"masking.text": 1.5}, "masking.text is 1.5; it must be at least 0 and at most 1"),
        ({"precision": "fp16"}, "precision.*fp16"),
        ({"steps.of": 1}, "'steps' is a value, not a group"),
        ({"temperature": 2.0}, r"temperature is 2.0; it must be at least 0 and at most 1 \(--temperature\)"),
        ({"optimizer.clip": 0.0}, "optimizer.clip is 0.0; it must be above 0"),
        ({"optimizer.lr": float("nan")}, "optimizer.lr is nan; it must be a finite number"),
        ({"optimizer.betas": [0.9]}, r"optimizer.betas: expected 2 values, got \[0.9\]"),
        ({"optimizer.ema": 1.0}, "optimizer.ema is 1.0; it must be at least 0 and below 1"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"loss.temperatures": []}, "loss.temperatures is empty"),
        ({"loss.temperatures": [1, 0]}, r"loss.temperatures\[1\] is 0.0; it must be above 0"),
        ({"threads": 10**26}, "threads is 1000+; it must be below 2.63"),
        ({"batch_size": 10**12}, r"batch_size is 10+; .* at most 1000000000 \(--batch-size\)"),
        ({"dit.heads": 0}, "dit.heads is 0; it must be at least 1"),
        ({"dit.horizon": 4.5}, "dit.horizon is 4.5; it must be a whole number"),
        ({"dit.skip_std": "much"}, "dit.skip_std is 'much'; it must be a number"),
        ({"dit.denoising": True}, "dit.denoising follows from"),
        ({"local_gib": 0}, "local_gib is 0.0; it must be above 0"),
        ({"strategy": "fsdp"}, "strategy.*did you mean 'fsdp2'"),
        ({"unfreeze": {"dit": 0}}, r"unfreeze\['dit'\] is 0; it must be at least 1"),
        ({"unfreeze": {"dit": 9}, "strategy": "zero2"}, "strategy zero2 cannot unfreeze"),
        (
            {"alpha_max": 3.0, "loss.kind": "flow"},
            "alpha_max is 3.0; it must be 1, or loss.kind one of .*: a flow head",
        ),
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


@pytest.mark.parametrize("kind", ["mse", "pure_drift", "flow", "diffusion"])
def test_every_head_trains_and_resumes(cache: Path, tmp_path: Path, kind: str) -> None:
    loss = {"kind": kind, **({"sample_steps": 3} if kind in ("flow", "diffusion") else {})}
    for out, stops in ((tmp_path / "a", (None,)), (tmp_path / "b", (1, None))):
        for stop in stops:
            train(configure(cache, out, loss=loss, accumulate=2, steps=2), say=quiet, stop_after=stop)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    document = read_json(ck.resolve(tmp_path / "a") / "policy.json")
    assert document["loss"] == {"kind": kind, "sample_steps": loss.get("sample_steps", 0)}
    assert document["net"]["dit"]["denoising"] is (kind in ("flow", "diffusion"))
    line = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])
    assert line["loss"] > 0 and np.isfinite(line["eval/mse"]) and "eval/nl2/embodiment/gripper_joint" in line


@pytest.mark.parametrize("queue", ["task", "global"])
def test_queues_resume(cache: Path, tmp_path: Path, queue: str) -> None:
    changes = {"loss": {"queue": queue, "queue_size": 3}, "accumulate": 2, "steps": 3}
    for out, stops in ((tmp_path / "a", (None,)), (tmp_path / "b", (1, 2, None))):
        for stop in stops:
            train(configure(cache, out, **changes), say=quiet, stop_after=stop)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    stored = [load_file(ck.resolve(tmp_path / n) / "queues.safetensors") for n in "ab"]
    assert stored[0]["pushed"].sum() > 0 and all(torch.equal(stored[0][n], stored[1][n]) for n in stored[0])


def test_staged_unfreezing(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", unfreeze={"dit.skip": 2, "dit.noise_in": 3}, keep_last=9, eval_every=0)
    train(config, say=quiet, stop_after=2)
    train(config, say=quiet)  # resumed where the first is let go
    for step, trained in ((2, ()), (3, ("dit.skip.weight",)), (4, ("dit.skip.weight", "dit.noise_in.weight"))):
        before, after = tensors(tmp_path / "run", step - 1), tensors(tmp_path / "run", step)
        moved = {
            n.removeprefix("model/") for n in after if n.startswith("model/") and not torch.equal(before[n], after[n])
        }
        assert "dit.action_head.3.weight" in moved  # the others train all the time
        assert moved & {"dit.skip.weight", "dit.noise_in.weight"} == set(trained)
    with pytest.raises(UserError, match="name in unfreeze 'dit.skipp'; did you mean 'dit.skip"):
        train(configure(cache, tmp_path / "no", unfreeze={"dit.skipp": 3}), say=quiet)
    with pytest.raises(UserError, match="unfreeze leaves nothing to train before step 3"):
        train(configure(cache, tmp_path / "no", unfreeze={"": 3}), say=quiet)
    assert not (tmp_path / "no").exists()


def test_compiled_run_is_the_same_run(
    cache: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated ahead of time, but without generating C++, which takes a minute."""
    monkeypatch.setenv("CXX", sys.executable)  # whatever can be run: no compiler is called
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    train(configure(cache, tmp_path / "run", compile=True), say=quiet, stop_after=2)
    train(configure(cache, tmp_path / "run"), say=quiet)  # the rest without: a checkpoint does not know
    expected, found = tensors(straight), tensors(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_best_is_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.5, 0.2, 0.3, 0.4, 0.6])
    monkeypatch.setattr(loop, "held_out_metrics", lambda session, seen: {"mse": next(errors)})
    config = configure(cache, tmp_path / "run", steps=5, eval_every=1, save_every=2, keep_last=1)
    train(config, say=quiet, stop_after=3)
    train(config, say=quiet)
    run = tmp_path / "run"
    assert [p.name for p in ck.checkpoints(run)] == ["step-00000002", "step-00000005"]
    assert ck.resolve(run / "checkpoints" / "best").name == "step-00000002" and ck.resolve(run).name == "step-00000005"


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(straight: Path, tmp_path: Path) -> None:
    out, said = shutil.copytree(straight, tmp_path / "run"), []
    (out / "checkpoints" / "step-00000004" / "ema.safetensors").write_bytes(b"")
    assert ck.resolve(out, said.append).name == "step-00000003"
    assert len(said) == 1 and "ema.safetensors is damaged" in said[0] and "falling back" in said[0]
    with pytest.raises(UserError, match="is damaged"):
        ck.resolve(out / "checkpoints" / "step-00000004")


def test_settings_that_are_newer_than_the_run_count_as_default(cache: Path, straight: Path, tmp_path: Path) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    saved = read_json(out / "config.json")
    for name in ("order", "temperature", "weights", "unfreeze", "strategy"):
        del saved[name]
    del saved["loss"]["sample_steps"]
    (out / "config.json").write_bytes(json_bytes(saved))
    assert train(dataclasses.replace(configure(cache, straight), out=str(out)), say=quiet).step == 4
    with pytest.raises(UserError, match="other settings: temperature"):
        train(dataclasses.replace(configure(cache, straight, temperature=1.0), out=str(out)), say=quiet)
