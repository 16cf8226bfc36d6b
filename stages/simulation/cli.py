"""`dvla eval` and `dvla data record`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...common.console import console, progress_bars
from ...common.options import VlmPath
from ...errors import UserError
from .tables import success_table


def eval_command(
    policy: Annotated[
        str, typer.Argument(help="Run, checkpoint or exported policy folder, or expert or random.", show_default=False)
    ],
    env: Annotated[list[str], typer.Option("--env", help="Simulated task; may be given several times.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to create with summary.json, table.md and videos.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare", help="A further policy, on the same starts and in the same table; may be given several times."
        ),
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", help="Unseen starts per task.")] = 20,
    baselines: Annotated[
        str,
        typer.Option(
            "--baselines", help="What runs beside, separated by commas: of expert, random and blind; or none."
        ),
    ] = "expert,random,blind",
    blind: Annotated[
        str | None, typer.Option("--blind", help="Run trained with --blind; default: each policy shown black pictures.")
    ] = None,
    replan: Annotated[int, typer.Option("--replan", help="Steps of each chunk to execute.")] = 4,
    sample_steps: Annotated[
        int | None,
        typer.Option(
            "--sample-steps", help="Forward passes per action of a flow or diffusion policy; default: its own."
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Step limit; default: the task's own.")] = None,
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the rendered pictures, as recorded.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the starts and the policies' noise.")] = 0,
    workers: Annotated[int, typer.Option("--workers", help="Simulating processes.")] = 1,
    videos: Annotated[int, typer.Option("--videos", help="Episodes filmed per task.")] = 10,
    vlm_path: VlmPath = None,
) -> None:
    """Closed-loop success on unseen starts, beside the expert, a random and a blind policy.

    Examples: dvla eval runs/base --env metaworld/push-v3 --episodes 50 --out eval/base

    dvla eval runs/base --compare runs/mse --compare policies/exported --env metaworld/push-v3 --out eval/three
    """
    from .evaluate import EvalConfig, evaluate_policies

    beside = tuple(name.strip() for name in baselines.split(",")) if baselines != "none" else ()
    if blind is not None and "blind" not in beside:
        raise UserError(
            f"--blind {blind}: the baselines asked for are {baselines}; add blind to them, or leave --blind out"
        )
    config = EvalConfig(
        (policy, *(compare or ())),
        tuple(env),
        episodes,
        out,
        beside,
        blind,
        seed,
        replan,
        max_steps,
        image_size,
        workers,
        videos,
        vlm_path,
        sample_steps,
    )
    with progress_bars() as show:
        summaries = evaluate_policies(config, show)
    console.print(success_table(summaries))
    said = f" blind: {next(iter(summaries.values()))['blind_is']}." if "blind" in beside else ""
    console.print(f"The same {episodes} starts for all, none of which was trained on.{said}", markup=False)


def data_record(
    env: Annotated[str, typer.Option("--env", help="Simulated task, e.g. metaworld/push-v3.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    episodes: Annotated[int, typer.Option("--episodes", help="Demonstrations to keep.")] = 50,
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the square pictures, pixels (even).")] = 128,
    noise: Annotated[
        float,
        typer.Option(
            "--noise",
            help="Standard deviation of noise on executed actions, × the environment's own scale; labels stay clean.",
        ),
    ] = 0.1,
    observation_noise: Annotated[
        float,
        typer.Option(
            "--observation-noise",
            help="The same on recorded states, × the spread of each number over its episode; actions stay clean.",
        ),
    ] = 0.0,
    pixel_noise: Annotated[
        float, typer.Option("--pixel-noise", help="The same on recorded pictures, in grey levels of 255.")
    ] = 0.0,
    extra_steps: Annotated[int, typer.Option("--extra-steps", help="Steps recorded after success.")] = 10,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Step limit of an attempt; default: the task's own.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the starts and the noise.")] = 0,
    workers: Annotated[
        int, typer.Option("--workers", help="Simulating processes; the dataset does not depend on it.")
    ] = 1,
) -> None:
    """Record a scripted expert as a LeRobot v3.0 dataset (mp4, two cameras).

    Example: dvla data record --env metaworld/push-v3 --episodes 50 --out data/push
    """
    from .record import RecordConfig, record

    config = RecordConfig(
        env,
        episodes,
        out,
        image_size,
        seed,
        noise=noise,
        observation_noise=observation_noise,
        pixel_noise=pixel_noise,
        max_steps=max_steps,
        extra_steps=extra_steps,
        workers=workers,
    )
    with progress_bars() as show:
        result = record(config, lambda done, total: show(f"recording {env}", done, total))
    console.print(
        f"{result.out}: {result.episodes} episodes, {result.frames} frames; the expert solved {result.succeeded} of "
        f"{result.attempted} starts tried, failures were left out"
    )
