"""What `dvla train` can be asked for: options, recipes, what a cache cannot give, the dry run, and what the console
says."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dvla.cache.loader.loader import gather
from dvla.cache.store.cache import Cache
from dvla.common import console
from dvla.common.config import from_mapping
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.load import load_net
from dvla.stages.training import checks as requirements
from dvla.stages.training import console as training_console
from dvla.stages.training import dry_run as dry_run_module
from dvla.stages.training import throughput
from dvla.stages.training import train as train_module
from dvla.stages.training.checks import require_trainable
from dvla.stages.training.config import TrainConfig, WandbConfig, load_recipe, recipe_names, train_config
from dvla.stages.training.context import TrainReport
from dvla.stages.training.dry_run import PILOT_STEPS, dry_run, report, resolved
from dvla.stages.training.parallel.world import ALONE
from dvla.stages.training.stage_three import finetune
from dvla.stages.training.throughput import bottleneck
from support import synthetic_cache as synthetic
from support.cli_runner import Dvla, refused

SETTINGS = {
    "model_size": "tiny",
    "dit": {"width": 32, "blocks": 1, "heads": 2, "horizon": 4},
    "steps": 1000,
    "batch_size": 4,
    "draws": 2,
    "holdout": 0.3,
    "threads": 1,
    "cpu_threads": 1,
    "device": "cpu",
}


def configure(cache: Path, **changes: Any) -> TrainConfig:
    return from_mapping(TrainConfig, {"cache": str(cache), "out": "", **SETTINGS, **changes})


# --- options ---------------------------------------------------------------------------------------------------------


def test_a_network_of_the_slots_in_use(cache: Path, tmp_path: Path) -> None:
    """It reads and gives those alone, learns as the whole one does, and goes on where it stopped."""
    opened, runs = Cache.open(cache), {}
    used = tuple(
        np.flatnonzero(
            np.any([mask for d in opened.datasets for mask in (d.action_mask, d.proprio_mask)], axis=0)
        ).tolist()
    )
    assert 0 < len(used) < 128
    for name, space, stops in (("all", "unified", (None,)), ("few", "active", (None,)), ("again", "active", (2, None))):
        config = configure(cache, out=str(tmp_path / name), action_space=space, steps=4, eval_every=0, log_every=1)
        for stop in stops:
            report = train_module.train(config, say=lambda _: None, stop_after=stop)
        folder = ck.resolve(tmp_path / name)
        runs[name] = load_net(read_json(folder / "policy.json"), folder, "model"), report.loss
    few, whole = runs["few"][0], runs["all"][0]
    assert few.config.slots == used and few.config.dit.action_dim == len(used) and not whole.config.slots
    assert sum(p.numel() for p in few.parameters()) < sum(p.numel() for p in whole.parameters())
    assert (
        all(torch.equal(a, b) for a, b in zip(few.state_dict().values(), runs["again"][0].state_dict().values()))
        and runs["few"][1] == runs["again"][1]
    )
    batch = gather(opened, np.array([0, 1]), np.array([3, 2]), 4)
    noise, alpha = torch.randn(2, 3, 4, few.config.dit.noise_dim), torch.ones(2)
    out = few(batch, noise, alpha)
    unused = [i for i in range(128) if i not in used]
    assert out.shape == (2, 3, 4, 128) and not out[..., unused].any() and out[..., list(used)].abs().min() > 0
    other = dataclasses.replace(batch, proprio=batch.proprio.index_fill(1, torch.tensor(unused), 7.0))
    assert torch.equal(few(other, noise, alpha), out)
    with pytest.raises(UserError, match="action_space active needs a head that acts in one pass"):
        configure(cache, action_space="active", loss={"kind": "flow"})


def asked(dvla: Dvla, monkeypatch: pytest.MonkeyPatch, *options: Any) -> TrainConfig:
    """The settings that `dvla train OPTIONS` would train with."""
    seen: list[TrainConfig] = []

    def stop(config: TrainConfig, *_: Any) -> None:
        seen.append(config)
        raise UserError("seen")

    monkeypatch.setattr(train_module, "train", stop)
    refused(dvla("train", "--from-cache", "C", "--out", "R", *options), "seen")
    return seen[0]


def test_normalization_for_all_and_for_one_dataset(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(dvla, monkeypatch, "--normalize", "minmax", "--normalize", "a=b=quantile")
    assert config.normalize == {"*": "minmax", "a=b": "quantile"}
    assert asked(dvla, monkeypatch, "--set", "normalize=meanstd").normalize == {"*": "meanstd"}
    assert asked(dvla, monkeypatch, "--set", "normalize.alpha=meanstd").normalize == {"alpha": "meanstd"}
    refused(dvla("train", "--from-cache", "C", "--out", "R", "--normalize", "gauss"), "unknown value 'gauss'", "std5")


def test_without_options_the_defaults_hold(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(dvla, monkeypatch)
    assert config == TrainConfig("C", "R")
    proposal = {
        "model_size": "base",
        "batch_size": 16,
        "steps": 10_000,
        "eval_batches": 50,
        "image_aug": False,
        "attention": "auto",
    }
    assert {name: getattr(config, name) for name in proposal} == proposal
    assert (config.optimizer.lr, config.loss.kind, config.wandb.mode) == (4e-4, "hybrid", "disabled")
    assert dataclasses.astuple(config.masking) == (0.1, 0.1, 0.1) and config.optimizer.vlm_lr_scale == 0.1


def test_every_option_reaches_its_setting(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked(
        dvla,
        monkeypatch,
        *shlex.split(
            "--model-size small --loss-type flow --max-steps 7 --batch-size 3 --grad-accumulation 5 --draws 2"
        ),
        *shlex.split("--lr 1e-3 --cond-mask-prob 0.2 --image-aug --blind --weight a=b=0.25 --weight droid_1.0.1=0.5"),
        *shlex.split(
            "--temperature 1 --order block --seed 9 --num-workers 4 --precision bf16 --compile --use-flash-attn"
        ),
        *shlex.split(
            "--strategy fsdp2 --local-cache L --log-every 11 --eval-every 0 --eval-batches 13 --save-every 17"
        ),
        *shlex.split("--wandb-mode offline --wandb-project p --set wandb.name=n --set masking.text=0.3 --device cpu"),
    )
    expected = {
        "model_size": "small",
        "steps": 7,
        "batch_size": 3,
        "accumulate": 5,
        "draws": 2,
        "image_aug": True,
        "blind": True,
        "weights": {"a=b": 0.25, "droid_1.0.1": 0.5},
        "temperature": 1.0,
        "order": "block",
        "seed": 9,
        "threads": 4,
        "precision": "bf16",
        "compile": True,
        "attention": "flash",
        "strategy": "fsdp2",
        "log_every": 11,
        "eval_every": 0,
        "eval_batches": 13,
        "save_every": 17,
        "local": "L",
        "device": "cpu",
        "wandb": WandbConfig("offline", "p", "n"),
    }
    assert {name: getattr(given, name) for name in expected} == expected
    assert (given.loss.kind, given.optimizer.lr, given.masking.text, given.masking.images) == ("flow", 1e-3, 0.3, 0.2)


def test_every_setting_is_an_option_too(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(dvla, monkeypatch, "--optimizer.warmup=7", "--keep_last=4", "--set", "wandb.name=a=b", "--lr=0.5")
    assert (config.optimizer.warmup, config.keep_last, config.wandb.name, config.optimizer.lr) == (7, 4, "a=b", 0.5)
    train = ("train", "--from-cache", "C", "--out", "R")
    refused(dvla(*train, "--optimizer.warmpu=3"), "unknown setting 'warmpu'", "did you mean 'warmup'")
    refused(dvla(*train, "--batchsize=3"), "unknown setting 'batchsize'", "did you mean 'batch_size'")
    refused(dvla(*train, "--warmup=3"), "unknown setting 'warmup'", "did you mean 'optimizer.warmup'")
    refused(dvla("eval", "x", "--env", "e", "--warmup=3"), "No such option: --warmup")


def test_the_command_line_wins_over_the_recipe(dvla: Dvla, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("steps: 5\ndevice: cpu\nbatch_size: 2\noptimizer: {lr: 1.0, warmup: 3}\n")
    config = asked(dvla, monkeypatch, "--recipe", tmp_path / "r.yaml", "--steps", 6, "--lr", 0.5)
    assert (config.steps, config.device, config.batch_size, config.optimizer.lr, config.optimizer.warmup) == (
        6,
        "cpu",
        2,
        0.5,
        3,
    )


def test_finetune_takes_a_recipe_over_the_run(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def stop(start: Path, sources: tuple[str, ...], lora: Any, overrides: dict[str, Any], *_: Any) -> None:
        seen.append(overrides)
        raise UserError("seen")

    monkeypatch.setattr(finetune, "finetune_config", stop)
    refused(
        dvla(
            "finetune",
            "runs/a",
            *shlex.split("--source s --out R --recipe posttrain --steps 9 --wandb-mode offline"),
        ),
        "seen",
    )
    expected = {
        "steps": 9,
        "batch_size": 64,
        "accumulate": 2,
        "image_aug": True,
        "optimizer.vlm_lr_scale": 0.05,
        "masking.text": 0.1,
        "wandb.project": "drifting-vla-posttrain",
        "wandb.mode": "offline",
        "out": "R",
        "device": "auto",
    }
    assert (
        {name: seen[0][name] for name in expected} == expected
        and "cache" not in seen[0]
        and "model_size" not in seen[0]
    )


def test_finetune_keeps_the_network(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, out=str(tmp_path / "run"), steps=1, eval_every=0)
    train_module.train(config, say=lambda _: None)
    for overrides, message in (
        ({"dit.horizon": 8}, "dit is .*'horizon': 8.*: leave dit out"),
        ({"model_size": "small"}, "model_size is small, but .* whose model_size is tiny: leave model_size out"),
    ):
        with pytest.raises(UserError, match=message):
            finetune.finetune_config(config.out, ("s",), None, {"out": str(tmp_path / "two"), **overrides})
    kept = finetune.finetune_config(
        config.out, ("s",), None, {"out": str(tmp_path / "two"), "model_size": "tiny", "steps": 2}
    )
    assert (kept.train.dit, kept.train.steps) == (config.dit, 2)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--weight", "droid"], ["--weight droid: expected NAME=SHARE"]),
        (["--weight", "droid=much"], ["--weight droid=much: expected NAME=SHARE"]),
        (["--weight", "=0.5"], ["expected NAME=SHARE"]),
        (["--loss-type", "flwo"], ["did you mean 'flow'"]),
        (["--wandb-mode", "ofline"], ["did you mean 'offline'"]),
        (["--order", "blok"], ["did you mean 'block'"]),
        (["--strategy", "fsdp"], ["did you mean 'fsdp2'"]),
        (["--precision", "bf61"], ["did you mean 'bf16'"]),
        (["--set", "wandb.projct=x"], ["unknown setting 'projct'", "did you mean 'project'"]),
        (["--eval-batches", "0"], ["eval_batches is 0"]),
    ],
)
def test_wrong_values(dvla: Dvla, tmp_path: Path, options: list[str], words: list[str]) -> None:
    refused(dvla("train", "--from-cache", tmp_path, "--out", tmp_path / "run", *options), *words)
    assert not (tmp_path / "run").exists()


def test_only_a_dry_run_needs_no_folder(dvla: Dvla, cache: Path) -> None:
    refused(dvla("train", "--from-cache", cache), "Missing option '--out'", "--dry-run")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load(name: str) -> None:
    config = train_config(name, {"cache": "c", "out": "o"})
    for key in load_recipe(name):
        assert hasattr(config, key)


def test_the_proposals_runs() -> None:
    pretrain, posttrain = (train_config(name, {"cache": "c", "out": "o"}) for name in ("pretrain", "posttrain"))
    assert pretrain.batch_size * pretrain.accumulate * 64 == 8192  # on 64 GPUs
    assert (pretrain.steps, posttrain.steps, pretrain.image_aug, posttrain.image_aug) == (
        1_000_000,
        200_000,
        False,
        True,
    )


# --- what a cache cannot give ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_aug": True}, "holds no augmented images; build it with --augment 4"),
        (
            {"dit": {"horizon": 41}},
            "the horizon is 41 steps and the longest episode of .* has 40 frames; give a shorter one",
        ),
        ({"weights": {"gamma": 0.5}}, "unknown dataset in weights 'gamma'.*alpha, beta"),
        ({"weights": {"alpha": 0.7, "beta": 0.7}}, "the weights given sum to 1.4"),
        (
            {"dit": {"embodiments": 4}},
            "dit.embodiments is 4; it must be at least 5: cache .* holds embodiment number 4",
        ),
        ({"loss": {"embodiments": 2}}, "loss.embodiments is 2;"),
        ({"holdout": 1.0}, "holdout is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_what_the_cache_cannot_give(cache: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        require_trainable(configure(cache, **changes), Cache.open(cache))
    assert "\n" not in str(error.value)


def test_what_it_can_give(cache: Path) -> None:
    opened = Cache.open(cache)
    require_trainable(configure(cache, weights={"alpha": 0.7}, dit={"horizon": 40}), opened)
    require_trainable(configure(cache, image_aug=True), opened, live=True)  # made at each step


def test_single_episodes_cannot_be_held_out(tmp_path: Path) -> None:
    plan = synthetic.make_plan()
    plan = dataclasses.replace(
        plan, datasets=tuple(dataclasses.replace(d, episodes=d.episodes[1:2]) for d in plan.datasets)
    )
    synthetic.build(tmp_path / "cache", plan=plan)
    opened = Cache.open(tmp_path / "cache")
    with pytest.raises(
        UserError, match="no dataset of .* has two usable episodes, so none can be held out .* --set holdout=0"
    ):
        require_trainable(configure(tmp_path / "cache"), opened)
    require_trainable(configure(tmp_path / "cache", holdout=0.0), opened)
    require_trainable(configure(tmp_path / "cache", eval_every=0), opened)


def test_too_many_views(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.PolicyNetConfig, "max_views", 1)
    with pytest.raises(
        UserError, match="has 2 views and the network can tell 1 apart; build the cache with fewer, using --view"
    ):
        require_trainable(configure(cache), Cache.open(cache))


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_dry_run_shows_everything_and_writes_nothing(
    dvla: Dvla, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("steps: 1000\ndit: {width: 32, blocks: 1, heads: 2}\noptimizer: {lr: 1.0e-5}\n")
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    result = dvla(
        "train",
        "--from-cache",
        cache,
        *shlex.split("--out run --recipe r.yaml --model-size tiny --batch-size 4 --set dit.horizon=4 --device cpu"),
        *shlex.split("--grad-accumulation 2 --set cpu_threads=1 --dry-run"),
    )
    assert (result.code, result.err) == (0, "")
    settings, found = result.out.split("\n\n")
    config = from_mapping(TrainConfig, yaml.safe_load(settings))  # the settings are a recipe
    assert (config.batch_size, config.optimizer.lr, config.dit, config.out) == (
        4,
        1e-5,
        {"width": 32, "blocks": 1, "heads": 2, "horizon": 4},
        "run",
    )
    origin = {line.split(":")[0]: line.rsplit("# ", 1)[1] for line in settings.splitlines() if "# " in line}
    assert {k: origin[k] for k in ("batch_size", "steps", "  width", "  horizon", "  lr", "  warmup", "seed")} == {
        "batch_size": "command line",
        "steps": "recipe",
        "  width": "recipe",
        "  horizon": "command line",
        "  lr": "recipe",
        "  warmup": "default",
        "seed": "default",
    }
    assert (
        f"pilot of {PILOT_STEPS} steps on cpu" in found and "bottleneck: " in found and "1000 steps would take" in found
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml"]
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


def test_the_pilot_measures_memory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(dry_run_module, "PILOT_STEPS", 3)
    small, large = (
        dry_run(configure(cache, accumulate=2, draws=draws), lambda *at: shown.append(at)) for draws in (2, 8)
    )
    assert shown[-1][0] == shown[-1][1] and (small.batch, small.processes, small.device) == (8, 1, "cpu")
    weights = small.memory["weights"]
    assert (
        weights == small.memory["gradients"] == small.memory["EMA"]
        and 2 * weights <= small.memory["moments"] < 2.1 * weights
    )
    assert large.memory["activations"] > 1.5 * small.memory["activations"] > 0 and small.peak > sum(
        small.memory.values()
    )
    assert small.hours == pytest.approx(1000 / small.steps_per_second / 3600) and 0 <= small.wait_share < 1
    assert (
        0.5 < small.observations / sum(d.observations for d in Cache.open(cache).datasets) < 1
    )  # without the held-out ones
    text = "\n".join(report(small))
    assert f"Parameters: {weights // 4:,}" in text and "weights" in text and "samples/s" in text


def test_both_refuse_before_anything_is_made(dvla: Dvla, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for more in (["--dry-run"], ["--out", out]):
        refused(dvla("train", "--from-cache", cache, "--image-aug", *more), "holds no augmented images")
        refused(
            dvla("train", "--from-cache", cache, "--weight", "gama=0.5", *more), "unknown dataset in weights 'gama'"
        )
        refused(dvla("train", "--from-cache", cache / "none", *more), "no cache at")
    assert not out.exists()


def test_a_killed_run_logs_every_step_once(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, out=str(tmp_path / "run"), steps=5, save_every=2, log_every=1, eval_every=0)
    train_module.train(config, say=lambda _: None, stop_after=3)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")  # killed before it was saved
    train_module.train(config, say=lambda _: None)
    lines = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == [1, 2, 3, 4, 5] and {
        "binds",
        "wait_share",
        "samples_per_second",
    } <= lines[0].keys()


def test_printed_settings_are_the_settings(cache: Path) -> None:
    config = configure(cache)
    lines = resolved(config, {}, {"cache": "", "dit": {}})
    values = yaml.safe_load("\n".join(lines))
    assert from_mapping(TrainConfig, values) == config
    assert all("# command line" in line for line in lines if line.startswith(("cache", "  width", "  horizon")))


# --- what the console says -------------------------------------------------------------------------------------------


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 0.5, "mse": 0.25, "samples_per_second": 369.2, "wait_share": 0.004, **more}


def test_training_lines_say_speed_bottleneck_and_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, shown = iter([0.0, 10.0, 20.0, 30.0]), []
    monkeypatch.setattr(training_console.time, "perf_counter", lambda: next(clock))
    on_log = training_console.training_lines(lambda *at: shown.append(at), 100)
    for entry in (
        line(51),
        line(61, binds="disk"),
        line(71, binds="host→device", **{"eval/mse": 0.125}),
        line(100, binds="compute"),
    ):
        on_log(entry)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "step  51/100  loss 0.5000  mse 0.2500  369 samples/s",
        "step  61/100  loss 0.5000  mse 0.2500  369 samples/s  I/O-bound  39 s left",
        "step  71/100  loss 0.5000  mse 0.2500  369 samples/s  copy-bound  29 s left",
        "held-out mse 0.1250 at step 71",
        "step 100/100  loss 0.5000  mse 0.2500  369 samples/s",
    ]
    assert max(map(len, printed)) <= 80
    assert shown == [("training", step, 100) for step in (51, 61, 71, 100)]


def test_the_end_of_a_run_names_error_checkpoint_and_next_command() -> None:
    report = TrainReport(Path("runs/a"), 40, 0.5, 0.75, 0.125, 369.0, 0.0, False)
    assert training_console.closing_lines(report, 40, "dvla eval runs/a --env TASK") == [
        "runs/a: step 40 of 40, held-out mse 0.1250",
        "checkpoint: runs/a/checkpoints/step-00000040",
        "next: dvla eval runs/a --env TASK",
    ]
    stopped = dataclasses.replace(report, step=20, eval_mse=None)
    assert training_console.closing_lines(stopped, 40, "")[::2] == [
        "runs/a: step 20 of 40",
        "rerun without --stop-after to resume",
    ]
    interrupted = dataclasses.replace(report, step=20, interrupted=True)
    assert training_console.closing_lines(interrupted, 40, "")[-1] == "checkpoint: runs/a/checkpoints/step-00000020"


def test_the_meter_counts_steps_alone_and_anew_after_each_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 6.0, 100.0, 101.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    loader = SimpleNamespace(wait_seconds=0.0)
    meter = throughput.Meter(ALONE, loader, samples=8)
    for _ in range(2):
        with meter.step(2):
            loader.wait_seconds += 0.5
    assert meter.line(1 << 20) == {"samples_per_second": 4 * 8 / 2, "wait_share": 0.5, "binds": "disk"}
    with meter.step(2):  # after 94 s of evaluation
        pass
    assert meter.line(1 << 20) == {"samples_per_second": 2 * 8 / 1, "wait_share": 0.0, "binds": "compute"}
    assert [bottleneck(*x) for x in ((0.04, 0.9, 1.0), (0.06, 1.0, 1.0), (0.0, 0.5, 1.0))] == [
        "host→device",
        "disk",
        "compute",
    ]


def test_a_resumed_bar_begins_where_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left is that of the steps still to do: those done before the resume took no time now."""
    from rich.console import Console

    monkeypatch.setattr(console, "console", Console(force_terminal=True, quiet=True))
    with console.progress_bars() as show:
        show("training", 5000, 10_000)
        progress = next(c.cell_contents for c in show.__closure__ if hasattr(c.cell_contents, "tasks"))
        assert progress.tasks[0].completed == 5000 and progress.tasks[0].speed is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_pilot_on_a_gpu(cache: Path) -> None:
    found = dry_run(configure(cache, device="cuda", precision="bf16"))
    assert found.device.startswith("cuda") and found.peak == sum(found.memory.values())


@pytest.mark.parametrize(
    "options, lora, full",
    [
        ((), True, False),
        (("--lora",), True, False),
        (("--frozen",), False, False),
        (("--vlm-mode", "lora"), True, False),
        (("--vlm-mode", "frozen"), False, False),
        (("--vlm-mode", "full"), False, True),
    ],
)
def test_what_is_trained_of_the_vlm(
    dvla: Dvla, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], lora: bool, full: bool
) -> None:
    seen: list[Any] = []

    def stop(*given: Any) -> None:
        seen.extend(given)
        raise UserError("seen")

    monkeypatch.setattr(finetune, "finetune_config", stop)
    refused(dvla("finetune", "runs/a", "--source", "s", "--out", "R", *options), "seen")
    assert (seen[2] is not None, seen[5]) == (lora, full)


def test_vlm_modes_that_exclude_each_other(dvla: Dvla) -> None:
    refused(
        dvla("finetune", "a", "--source", "s", "--out", "R", "--vlm-mode", "whole"),
        "unknown --vlm-mode 'whole'",
        "full",
    )
    refused(
        dvla("finetune", "a", "--source", "s", "--out", "R", "--vlm-mode", "full", "--lora"),
        "--lora is short for --vlm-mode lora; given as well: --vlm-mode full",
    )
