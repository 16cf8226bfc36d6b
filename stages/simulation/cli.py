"""`dvla eval` and `dvla data record`."""

from __future__ import annotations

from typing import Annotated

import typer

from ...common.config import COUNT, from_dotted
from ...common.console import console, progress_bars, say
from ...common.options import Given, Options
from ...errors import UserError
from .config import EvalConfig, RecordConfig
from .tables import success_table

EVAL = """environments out compare episodes baselines blind replan sample_steps max_steps image_size seed workers videos
    device vlm_path"""
RECORD = """env out episodes image_size noise observation_noise pixel_noise extra_steps max_steps seed workers"""


def eval_command(
    policy: Annotated[
        str, typer.Argument(help="Run, checkpoint or exported policy folder, or expert or random.", show_default=False)
    ],
    given: Annotated[Given, Options(EvalConfig, EVAL)],
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="Further policy, from the same initial states and in the same table; may be given several times.",
        ),
    ] = None,
    baselines: Annotated[
        str,
        typer.Option("--baselines", help="Baselines, separated by commas: of expert, random and blind; or none."),
    ] = "expert,random,blind",
) -> None:
    """Measure closed-loop success from held-out initial states, beside the expert, a random and a blind policy.

    Examples: dvla eval runs/base --env metaworld/push-v3 --episodes 50 --out eval/base

    dvla eval runs/base --compare runs/mse --compare policies/exported --env metaworld/push-v3 --out eval/three
    """
    from .evaluate import evaluate_policies

    beside = tuple(name.strip() for name in baselines.split(",")) if baselines != "none" else ()
    if "blind" in given and "blind" not in beside:
        raise UserError(f"--baselines {baselines}: add blind to them, or leave --blind {given['blind']} out")
    config = from_dotted(EvalConfig, given | {"policies": (policy, *(compare or ())), "baselines": beside})
    with progress_bars() as show:
        summaries = evaluate_policies(config, show)
    console.print(success_table(summaries))
    blind = f" blind: {next(iter(summaries.values()))['blind_is']}." if "blind" in beside else ""
    say(f"The same {config.episodes} initial states for all; none was trained on.{blind}")


def data_record(
    given: Annotated[Given, Options(RecordConfig, RECORD)],
    episodes: Annotated[int, typer.Option("--episodes", help="Demonstrations to keep."), COUNT] = 50,
) -> None:
    """Record a scripted expert as a LeRobot v3.0 dataset (mp4, two cameras).

    Example: dvla data record --env metaworld/push-v3 --episodes 50 --out data/push
    """
    from .record import record

    config = from_dotted(RecordConfig, given | {"episodes": episodes})
    with progress_bars() as show:
        result = record(config, lambda done, total: show(f"recording {config.env}", done, total))
    say(
        f"{result.out}: {result.episodes} episodes, {result.frames} frames; the expert solved {result.succeeded} of "
        f"{result.attempted} initial states tried, failures were left out"
    )
