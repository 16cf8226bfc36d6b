"""`dvla cotrain`: the loop of the three stages by the commands a user would type.

OUT/cache-0  OUT/train-0                a cache of the VLM as it is, and the policy trained from it
OUT/lora-1  OUT/cache-1  OUT/train-1    LoRA on live features; a cache of what the VLM learnt; training that goes on from it
OUT/lora-2 …                            and so on, for every round
OUT/drift-1.json …                      how far a round moved the features
OUT/progress.json  OUT/summary.json     what is done; held-out errors and drifts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import json_bytes, read_json, write_file
from ...errors import UserError
from ..training.run_log import evaluations, read_log
from .runner import Step, travel, words

OWN = (
    "--out",
    "--from-cache",
    "--init",
    "--adapter",
    "--source",
    "--vlm",
    "--vlm-path",
    "--vlm-mode",
    "--lora",
    "--frozen",
    "--stop-after",
    "--dry-run",
    "--append",
    "--update",
)
"""Options of the commands that the loop sets itself, or that would end it early."""


@dataclass(frozen=True)
class CotrainConfig:
    """The loop's commands: options as one would type them."""

    sources: tuple[str, ...]  # dataset folders or hub ids
    out: Path  # folder of everything
    vlm: str = "qwen3vl"  # model (configs/models)
    vlm_path: str | None = None  # its checkpoint; None: the model's own
    cache: str = ""  # options of every `dvla cache build`
    train: str = ""  # of the first `dvla train`
    finetune: str = ""  # of every `dvla finetune`
    retrain: str | None = None  # of every later `dvla train`; None: those of the first
    rounds: int = 1  # how often the VLM learns and the cache is made again

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("no source given; name at least one dataset folder or hub id")
        if self.rounds < 1:
            raise UserError(f"--rounds {self.rounds}: give at least 1")
        for name in ("cache", "train", "finetune", "retrain"):
            options(name, getattr(self, name) or "")


def options(name: str, text: str) -> tuple[str, ...]:
    """The words of a string of options. `UserError` for one that the loop sets itself."""
    return words(f"--{name}", text, OWN, "dvla cotrain")


def steps(config: CotrainConfig) -> list[Step]:
    """The road, in order."""
    out, cached, tuned = config.out, options("cache", config.cache), options("finetune", config.finetune)
    first = options("train", config.train)
    later = first if config.retrain is None else options("retrain", config.retrain)
    vlm = ("--vlm", config.vlm, *(("--vlm-path", config.vlm_path) if config.vlm_path else ()))
    sources = [word for source in config.sources for word in ("--source", source)]

    def folder(kind: str, n: int) -> str:
        return str(out / f"{kind}-{n}")

    road = [
        ("cache build 0", ("cache", "build", *config.sources, *vlm, *cached, "--out", folder("cache", 0))),
        ("train 0", ("train", "--from-cache", folder("cache", 0), *first, "--out", folder("train", 0))),
    ]
    for n in range(1, config.rounds + 1):
        road += [
            (
                f"finetune {n}",
                (
                    "finetune",
                    "--vlm-mode",
                    "lora",
                    folder("train", n - 1),
                    *sources,
                    *tuned,
                    "--out",
                    folder("lora", n),
                ),
            ),
            (
                f"cache build {n}",
                (
                    "cache",
                    "build",
                    *config.sources,
                    "--adapter",
                    folder("lora", n),
                    *cached,
                    "--out",
                    folder("cache", n),
                ),
            ),
            (
                f"cache diff {n}",
                ("cache", "diff", folder("cache", n - 1), folder("cache", n), "--json", str(out / f"drift-{n}.json")),
            ),
            (
                f"train {n}",
                (
                    "train",
                    "--from-cache",
                    folder("cache", n),
                    "--init",
                    folder("lora", n),
                    *later,
                    "--out",
                    folder("train", n),
                ),
            ),
        ]
    return [Step(name, (command,)) for name, command in road]


def cotrain(config: CotrainConfig, run: Callable[[list[str]], None], say: Callable[..., None]) -> dict[str, Any]:
    """Run every command (`run` runs one in this process), then say and write `summary.json`. `UserError` when `out` holds something else."""

    def perform(step: Step) -> None:
        try:
            run(list(step.commands[0]))
        except SystemExit as stop:
            if stop.code != 1 or step.commands[0][:2] != (
                "cache",
                "diff",
            ):  # whose 1 says that the features moved, as they should
                raise

    seconds = travel(config.out, steps(config), perform, say, "cotraining")
    summary = summarise(config, seconds)
    write_file(config.out / "summary.json", json_bytes(summary))
    say("")
    for n, drifts in enumerate(summary["drift"], 1):
        for drift in drifts:
            say(
                f"round {n} moved the features of {drift['dataset']} by a relative RMS of {drift['relative']:.3g} (cosine {drift['cosine']:.5f})",
                markup=False,
            )
    found = [f"{name} {error:.4g}" for name, error in summary["held_out_mse"].items() if error is not None]
    say(
        f"held-out error (mse): {' → '.join(found) or 'not measured'}; {sum(seconds.values()):.0f} s in all. Act with {config.out}/train-{config.rounds}",
        markup=False,
    )
    return summary


def summarise(config: CotrainConfig, seconds: dict[str, float]) -> dict[str, Any]:
    """What the loop measured: held-out errors of every run in their order, and the drift of every round."""
    runs = ["train-0", *(f"{kind}-{n}" for n in range(1, config.rounds + 1) for kind in ("lora", "train"))]
    return {
        "seconds": seconds,
        "held_out_mse": {name: _held_out(config.out / name) for name in runs},
        "drift": [read_json(config.out / f"drift-{n}.json")["drifts"] for n in range(1, config.rounds + 1)],
    }


def _held_out(run: Path) -> float | None:
    """The newest held-out error of a run; None where none was measured."""
    found = evaluations(read_log(run))
    return found[-1]["eval/mse"] if found else None
