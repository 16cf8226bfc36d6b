"""`dvla data …`: record demonstrations and look at datasets, whatever their format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .stages.console import console, progress_bars

data_app = typer.Typer(no_args_is_help=True, help="Record, describe, check and show datasets.")


@data_app.command("record")
def data_record(
    env: Annotated[str, typer.Option("--env", help="Simulated task, e.g. metaworld/push-v3.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    episodes: Annotated[int, typer.Option("--episodes", help="Demonstrations to keep.")] = 50,
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the square pictures, pixels (even).")] = 128,
    noise: Annotated[float, typer.Option("--noise", help="Standard deviation of noise on executed actions; labels stay clean.")] = 0.1,
    extra_steps: Annotated[int, typer.Option("--extra-steps", help="Steps recorded after success.")] = 10,
    max_steps: Annotated[Optional[int], typer.Option("--max-steps", help="Step limit of an attempt; default: the task's own.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the starts and the noise.")] = 0,
    workers: Annotated[int, typer.Option("--workers", help="Simulating processes; the dataset does not depend on it.")] = 1,
) -> None:
    """Record a scripted expert as a LeRobot v3.0 dataset (mp4, two cameras).

    Example: dvla data record --env metaworld/push-v3 --episodes 50 --out data/push
    """
    from .stages.record import RecordConfig, record

    config = RecordConfig(env, episodes, out, image_size, seed, noise=noise, max_steps=max_steps, extra_steps=extra_steps, workers=workers)
    with progress_bars() as show:
        result = record(config, lambda done, total: show(f"recording {env}", done, total))
    console.print(f"{result.out}: {result.episodes} episodes, {result.frames} frames; the expert solved {result.succeeded} of "
                  f"{result.attempted} starts tried, failures were left out")
