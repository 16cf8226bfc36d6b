"""`dvla cotrain`: the loop of the three stages by the commands a user would type.

OUT/cache-0  OUT/train-0                a cache of the initial VLM, and the policy trained from it
OUT/lora-1  OUT/cache-1  OUT/train-1    LoRA on live features; a cache of the fine-tuned VLM; training resumed on it
OUT/lora-2 …                            and so on, for every round
OUT/drift-1.json …                      how much a round changed the features
OUT/progress.json  OUT/summary.json     finished commands; held-out errors and feature changes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.documents import Form, json_bytes, read_json
from ...common.files import write_file
from ...errors import UserError
from ..training.run_log import evaluations, read_log
from .runner import Command, Job, options, run_in_order, split_options

RESERVED = (
    *("--out", "--from-cache", "--init", "--adapter", "--source", "--vlm", "--vlm-path", "--vlm-mode"),
    *("--lora", "--frozen", "--stop-after", "--dry-run", "--append", "--update"),
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
            self.extra(name)

    def extra(self, name: str) -> Command:
        """The user's options of one command, as words. `UserError` for an option that the loop sets itself."""
        return split_options(f"--{name}", getattr(self, name) or "", RESERVED, "dvla cotrain")


def steps(config: CotrainConfig) -> list[Job]:
    """The commands of the loop, in order."""
    later = config.extra("train" if config.retrain is None else "retrain")
    vlm = options(vlm=config.vlm, **({"vlm_path": config.vlm_path} if config.vlm_path else {}))

    def folder(kind: str, n: int) -> str:
        return str(config.out / f"{kind}-{n}")

    def build(n: int, encoder: Command) -> Job:
        command = ("cache", "build", *config.sources, *encoder, *config.extra("cache"), "--out", folder("cache", n))
        return Job(
            f"cache build {n}", (command,), purpose=f"Cache the features of the VLM, round {n} of {config.rounds}."
        )

    def train(n: int, start: Command, extra: Command) -> Job:
        command = ("train", "--from-cache", folder("cache", n), *start, *extra, "--out", folder("train", n))
        return Job(f"train {n}", (command,), purpose="Train the policy from this cache.")

    jobs = [build(0, vlm), train(0, (), config.extra("train"))]
    for n in range(1, config.rounds + 1):
        tuned = ("finetune", "--vlm-mode", "lora", folder("train", n - 1), *options(source=config.sources))
        compared = ("cache", "diff", folder("cache", n - 1), folder("cache", n))
        jobs += [
            Job(
                f"finetune {n}",
                ((*tuned, *config.extra("finetune"), "--out", folder("lora", n)),),
                purpose="Fine-tune policy and VLM together with LoRA.",
            ),
            build(n, ("--adapter", folder("lora", n))),
            Job(
                f"cache diff {n}",
                ((*compared, "--json", str(config.out / f"drift-{n}.json")),),
                purpose="Measure how much the features changed.",
            ),
            train(n, ("--init", folder("lora", n)), later),
        ]
    return jobs


def cotrain(config: CotrainConfig, run: Callable[[list[str]], None], say: Callable[..., None]) -> dict[str, Any]:
    """Run every command (`run` runs one in this process), then print and write `summary.json`.

    Raises:
        UserError: when `out` holds something else.
    """

    def perform(command: list[str]) -> None:
        try:
            run(command)
        except SystemExit as stop:
            if stop.code != 1 or command[:2] != [
                "cache",
                "diff",
            ]:  # its 1 says that the features differ, as they should
                raise

    seconds = run_in_order(config.out, steps(config), perform, say, "cotraining")
    summary = summarize(config, seconds)
    write_file(config.out / "summary.json", json_bytes(summary))
    say("")
    for n, drifts in enumerate(summary["drift"], 1):
        for drift in drifts:
            change = f"relative RMS {drift['relative']:.3g}, cosine {drift['cosine']:.5f}"
            say(f"round {n} changed the features of {drift['dataset']}: {change}", markup=False)
    found = [f"{name} {error:.4g}" for name, error in summary["held_out_mse"].items() if error is not None]
    say(f"Held-out action error (MSE, normalized): {' → '.join(found) or 'not measured'}", markup=False)
    say(f"{sum(seconds.values()):.0f} s in total. Checkpoint: {config.out}/train-{config.rounds}", markup=False)
    return summary


class DriftForm(Form, extra="ignore"):
    """What is read of the JSON of `dvla cache diff`."""

    drifts: list[dict[str, Any]]


def summarize(config: CotrainConfig, seconds: dict[str, float]) -> dict[str, Any]:
    """What the loop measured: held-out errors of every run in their order, and the feature changes of every round."""
    runs = ["train-0", *(f"{kind}-{n}" for n in range(1, config.rounds + 1) for kind in ("lora", "train"))]
    return {
        "seconds": seconds,
        "held_out_mse": {name: _held_out(config.out / name) for name in runs},
        "drift": [read_json(config.out / f"drift-{n}.json", DriftForm)["drifts"] for n in range(1, config.rounds + 1)],
    }


def _held_out(run: Path) -> float | None:
    """The newest held-out error of a run; None where none was measured."""
    found = evaluations(read_log(run))
    return found[-1]["eval/mse"] if found else None
