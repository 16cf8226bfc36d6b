"""The staged recipe, and the loop of the three stages by one command."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.experiments import cotrain as cotrain_module
from dvla.stages.experiments.cotrain import CotrainConfig, cotrain, steps
from dvla.stages.training.config import OptimizerConfig, load_recipe, train_config
from dvla.stages.training.parallel.replicas import parameter_groups
from dvla.stages.training.stage_three import finetune as finetune_module
from support.cli_runner import Dvla
from support.run_samples import TINY

TRAIN = (
    "--model-size tiny --set dit.width=32 --set dit.blocks=1 --set dit.heads=2 --set dit.horizon=4 --batch-size 4 "
    "--draws 2 --steps 2 --set holdout=0.3 --eval-every 2 --eval-batches 1 --log-every 1 --lr 1e-3 --device cpu"
)


def words(config: CotrainConfig) -> list[str]:
    return [shlex.join(command) for step in steps(config) for command in step.commands]


def test_every_build_of_the_loop_gets_the_map(dvla: Dvla, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CotrainConfig] = []
    monkeypatch.setattr(cotrain_module, "cotrain", lambda config, *_: seen.append(config))
    given = ("--dataset-config", "my map.yaml", "--cache", "--tokens 49")
    assert dvla("cotrain", "d", "--out", "o", *given).code == 0
    builds = [line for line in words(seen[0]) if line.startswith("cache build")]
    assert len(builds) == 2 and all("--dataset-config 'my map.yaml' --tokens 49" in line for line in builds)


# --- the staged recipe ----------------------------------------------------------------------------------------------


def test_the_vlm_rate_is_halved_at_its_steps() -> None:
    named = {
        "adapter.a": torch.nn.Parameter(torch.zeros(2, 2)),
        "proj_seq.0.weight": torch.nn.Parameter(torch.zeros(2, 2)),
        "dit.x": torch.nn.Parameter(torch.zeros(2, 2)),
    }
    groups = parameter_groups(named, OptimizerConfig(vlm_lr_halved=(3, 5)))
    assert [(g["halved"], g["lr_scale"]) for g in groups] == [((3, 5), 0.1), ((), 0.5), ((), 1.0)]
    with pytest.raises(UserError, match=r"vlm_lr_halved\[0\] is 0; it must be at least 1"):
        OptimizerConfig(vlm_lr_halved=(0,))


def test_the_loop_trains_by_the_stages(loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA begins at its step, and its rate is halved at its own: seen in what AdamW is given."""
    rates: list[tuple[float, float, bool]] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, closure: Any = None) -> Any:
        groups = {bool(g["halved"]): g for g in self.param_groups}
        rates.append((groups[False]["lr"], groups[True]["lr"], groups[True]["params"][0].grad is not None))
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    sources = tuple(json.loads((loop / "sources.json").read_text()))
    config = finetune_module.finetune_config(
        loop / "run" / "train-0",
        sources,
        finetune_module.LoraSpec(r=2),
        {
            "out": str(loop / "staged"),
            "steps": 4,
            "unfreeze": {"adapter.": 1},
            "optimizer.vlm_lr_halved": [2, 3],
            "optimizer.projector_lr_scale": 1.0,
        },
    )
    finetune_module.finetune(config, say=lambda _: None)
    assert [trained for *_, trained in rates] == [False, True, True, True]
    for (dit, lora, _), factor in zip(rates, (1, 1, 0.5, 0.25)):
        assert lora == pytest.approx(dit * config.train.optimizer.vlm_lr_scale * factor)


def test_the_recipe(dvla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config("cotrain", {"cache": "c", "out": "o"})
    assert config.unfreeze == {"adapter.": 5000} and config.optimizer.vlm_lr_halved == (50000,)
    assert config.optimizer.lr * config.optimizer.vlm_lr_scale == pytest.approx(1e-5)
    seen: list[dict[str, Any]] = []

    def stop(start: Path, sources: Any, lora: Any, overrides: dict[str, Any], *_: Any) -> None:
        seen.append(overrides)
        raise UserError("seen")

    monkeypatch.setattr(finetune_module, "finetune_config", stop)
    assert dvla("finetune", "a", "--source", "s", "--out", "R", "--recipe", "cotrain").code == 2
    assert seen[0]["unfreeze"] == {"adapter.": 5000} == load_recipe("cotrain")["unfreeze"] and seen[0][
        "optimizer.vlm_lr_halved"
    ] == [50000]


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop(recorded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the loop in `run`, all by its commands."""
    from dvla import cli

    folder = tmp_path_factory.mktemp("loop")
    vlm = make_tiny_qwen3vl(folder / "vlm", TINY)
    said: list[str] = []
    config = CotrainConfig(
        (str(recorded["h264"]),),
        folder / "run",
        "tiny_qwen3vl",
        str(vlm),
        "--batch-size 8",
        TRAIN,
        "--steps 2 --lora-r 2 --vlm-lr-scale 1.0 --device cpu",
    )
    summary = cotrain(config, cli.run, lambda line, **_: said.append(line))
    (folder / "said.json").write_text(json.dumps(said))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "sources.json").write_text(json.dumps(config.sources))
    return folder


def test_one_command_runs_the_loop(recorded: dict[str, Path], loop: Path) -> None:
    said, summary = (json.loads((loop / f"{name}.json").read_text()) for name in ("said", "summary"))
    names = ["cache build", "train", "finetune", "cache build", "cache diff", "train"]
    shown = [line for line in said if line.startswith("[bold]$ dvla ")]
    assert [line.startswith(f"[bold]$ dvla {name} ") for line, name in zip(shown, names)] == [True] * 6 and len(
        shown
    ) == 6
    assert json.loads((loop / "run" / "summary.json").read_text()) == summary
    assert list(summary["held_out_mse"]) == ["train-0", "lora-1", "train-1"] and all(
        v > 0 for v in summary["held_out_mse"].values()
    )
    [[drift]] = summary["drift"]
    assert drift["dataset"] == "h264" and drift["relative"] > 0
    assert said[-2].startswith("Held-out action error (MSE, normalized): train-0 ") and "→ lora-1" in said[-2]
    assert said[-1].endswith(f"Checkpoint: {loop / 'run' / 'train-1'}")
    before, after = (
        json.loads((loop / "run" / f"cache-{n}" / "fingerprint.json").read_text())["encoder"]["adapter"] for n in (0, 1)
    )
    assert before is None and set(after) == {"sha256", "scaling"}
    assert json.loads((loop / "run" / "train-1" / "config.json").read_text())["init"] == str(loop / "run" / "lora-1")


def test_an_interrupted_loop_resumes(recorded: dict[str, Path], loop: Path, tmp_path: Path) -> None:
    config = CotrainConfig(tuple(json.loads((loop / "sources.json").read_text())), tmp_path / "run", rounds=2)
    ran: list[list[str]] = []

    def broken(command: list[str]) -> None:
        ran.append(command)
        if command[:2] == ["cache", "diff"]:
            raise SystemExit(1)  # they differ, which does not stop the loop
        if len(ran) == 4:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cotrain_module, "summarize", lambda *_: {"held_out_mse": {}, "drift": []})
            try:
                cotrain(config, broken, lambda *_, **__: None)
            except KeyboardInterrupt:
                assert len(ran) == 4
    commands = [list(c) for step in steps(config) for c in step.commands]
    assert ran == commands[:4] + commands[3:] and len(commands) == 10
    with pytest.raises(UserError, match="holds a cotraining with other settings; choose another --out"):
        cotrain(dataclasses.replace(config, rounds=1), broken, lambda *_, **__: None)
    with pytest.raises(SystemExit):
        cotrain(
            dataclasses.replace(config, out=tmp_path / "other"),
            lambda _: (_ for _ in ()).throw(SystemExit(1)),
            lambda *_, **__: None,
        )


def test_its_commands() -> None:
    config = CotrainConfig(
        ("data/a b",),
        Path("loop"),
        vlm_path="V",
        cache="--tokens 49",
        train="--recipe base",
        finetune="--steps 9",
        retrain="--steps 5",
    )
    assert words(config) == [
        "cache build 'data/a b' --vlm qwen3vl --vlm-path V --tokens 49 --out loop/cache-0",
        "train --from-cache loop/cache-0 --recipe base --out loop/train-0",
        "finetune --vlm-mode lora loop/train-0 --source 'data/a b' --steps 9 --out loop/lora-1",
        "cache build 'data/a b' --adapter loop/lora-1 --tokens 49 --out loop/cache-1",
        "cache diff loop/cache-0 loop/cache-1 --json loop/drift-1.json",
        "train --from-cache loop/cache-1 --init loop/lora-1 --steps 5 --out loop/train-1",
    ]
    assert (
        words(dataclasses.replace(config, rounds=2, retrain=None))[-1]
        == "train --from-cache loop/cache-2 --init loop/lora-2 --recipe base --out loop/train-2"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": "--out x"}, "--train '--out x': --out is set by `dvla cotrain` itself"),
        ({"cache": "--vlm=paligemma2"}, "--vlm is set by `dvla cotrain` itself"),
        ({"finetune": "'"}, "No closing quotation"),
        ({"rounds": 0}, "--rounds 0: give at least 1"),
        ({"sources": ()}, "no source given"),
    ],
)
def test_what_the_loop_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CotrainConfig(**{"sources": ("s",), "out": Path("o"), **changes})
