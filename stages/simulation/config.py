"""Settings of `dvla eval` and `dvla data record`. Imports no simulator: the command line's help is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from ...common.config import (
    ANY_COUNT,
    COUNT,
    DEVICE,
    SAMPLE_STEPS,
    SEED,
    STEPS,
    THREADS,
    VLM_PATH,
    Option,
    require_ranges,
)
from ...errors import UserError, unknown

BASELINES = ("expert", "random", "blind")
NOISE = Interval(ge=0, le=1000)
IMAGE_SIDE = Interval(ge=16, le=2048)  # pixels


@dataclass(frozen=True)
class EvalConfig:
    """What `dvla eval` needs."""

    policies: tuple[str, ...]  # run, checkpoint or exported folders, or "expert" or "random"
    environments: Annotated[tuple[str, ...], Option("--env", help="Simulated task; may be given several times.")]
    episodes: Annotated[  # 0 … episodes-1 of the eval split
        int, Option("--episodes", help="Held-out initial states per task."), COUNT
    ] = 20
    out: Annotated[Path | None, Option("--out", help="Folder to create with summary.json, table.md and videos.")] = (
        None  # None: print only
    )
    baselines: tuple[str, ...] = BASELINES  # run beside the policies, from the same initial states
    blind: Annotated[
        str | None,
        Option("--blind", help="Run trained with --blind; default: each policy itself, with images blanked."),
    ] = None
    seed: Annotated[
        int, Option("--seed", help="Random seed of the initial states and of the policies' noise."), SEED
    ] = 0
    replan: Annotated[int, Option("--replan", help="Steps of each chunk to execute."), COUNT] = 4
    max_steps: Annotated[int | None, Option("--max-steps", help="Step limit; default: the task's own."), COUNT] = None
    image_size: Annotated[
        int, Option("--image-size", help="Side of the rendered images in pixels, as recorded."), IMAGE_SIDE
    ] = 128
    workers: Annotated[int, Option("--workers", help="Simulation processes."), THREADS] = 1
    videos: Annotated[int, Option("--videos", help="Episodes recorded as videos per task."), ANY_COUNT] = 10
    vlm_path: Annotated[str | None, VLM_PATH] = None
    sample_steps: Annotated[int | None, SAMPLE_STEPS, STEPS] = None
    device: Annotated[str, DEVICE] = "auto"  # of the policies

    def __post_init__(self) -> None:
        from .envs import check_environment

        require_ranges(self)
        if not self.policies or not self.environments:
            raise UserError(
                f"{len(self.policies)} policies in {len(self.environments)} environments; at least 1 of each is needed"
            )
        for kind, given in (("environment", self.environments), ("policy", self.policies)):
            if again := [one for one in given if given.count(one) > 1]:
                raise UserError(f"{kind} {again[0]} is given twice")
        for name in self.baselines:
            if name not in BASELINES:
                raise unknown("baseline", name, (*BASELINES, "none"))
        for name in self.environments:
            check_environment(name, seed=self.seed, image_size=self.image_size, max_steps=self.max_steps)
        if self.out is not None and self.out.exists():
            raise UserError(f"{self.out} exists; choose another --out")


@dataclass(frozen=True)
class RecordConfig:
    """What to record."""

    env: Annotated[str, Option("--env", help="Simulated task, e.g. metaworld/push-v3.")]
    episodes: Annotated[int, COUNT]  # to keep
    out: Annotated[Path, Option("--out", help="Folder to create.")]
    # even: the video format halves its color planes
    image_size: Annotated[
        int, Option("--image-size", help="Side of the square images in pixels (even)."), IMAGE_SIDE
    ] = 128
    seed: Annotated[int, Option("--seed", help="Random seed of the initial states and of the noise."), SEED] = 0
    split: Literal["train", "eval"] = "train"  # "eval" initial states are kept for evaluation
    noise: Annotated[
        float,
        Option(
            "--noise",
            help="Standard deviation of noise on executed actions, × the environment's own scale; labels stay clean.",
        ),
        NOISE,
    ] = 0.1
    observation_noise: Annotated[
        float,
        Option(
            "--observation-noise",
            help="Standard deviation of noise on recorded states, × the spread of each number over its episode.",
        ),
        NOISE,
    ] = 0.0
    pixel_noise: Annotated[
        float,
        Option("--pixel-noise", help="Standard deviation of noise on recorded images, in gray levels of 255."),
        NOISE,
    ] = 0.0
    max_steps: Annotated[
        int | None, Option("--max-steps", help="Step limit of an attempt; default: the task's own."), COUNT
    ] = None
    extra_steps: Annotated[  # so that staying at the goal is shown too
        int, Option("--extra-steps", help="Steps recorded after success."), ANY_COUNT
    ] = 10
    keep_failures: bool = False  # keep attempts that did not reach success
    workers: Annotated[
        int,
        Option("--workers", help="Simulation processes; the dataset does not depend on their number."),
        THREADS,
    ] = 1

    def __post_init__(self) -> None:
        require_ranges(self)
