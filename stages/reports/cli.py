"""`dvla report`, `dvla compare` and `dvla rerun`: looking at runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from annotated_types import Ge

from ...common.config import COUNT
from ...common.console import progress_bars, say
from ...common.options import DatasetConfig, Device, VlmPath
from ...common.text import size

RunPath = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]


def report_command(
    run: RunPath,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Page to write; one that this command made before is replaced.")
    ] = Path("report.html"),
    evaluation: Annotated[
        list[Path] | None, typer.Option("--eval", help="Folder of `dvla eval --out`; may be given several times.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Most steps whose panels the page holds."), COUNT] = 12,
) -> None:
    """Write a run as one page that opens from disk.

    Summary, curves, panels with a step slider, datasets, rollouts, settings.

    Example: dvla report runs/base --eval eval/base -o report.html
    """
    from .report import ReportConfig, report

    nbytes = report(ReportConfig(run, out, tuple(evaluation or ()), steps))
    say(f"{out}: {size(nbytes)}, one file that needs no network")


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, at least two.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Page to write, which also has curves.")] = None,
) -> None:
    """Compare runs: settings that differ, and results, also by dataset.

    Example: dvla compare runs/a runs/b -o compare.html
    """
    from .compare import compare, show_comparison, write_comparison
    from .html import require_page

    if out is not None:
        require_page(out)
    found = compare(tuple(runs))
    show_comparison(found)
    if out is not None:
        say(f"{out}: {size(write_comparison(found, out))}, one file that needs no network")


def rerun_command(
    run: Annotated[Path, typer.Argument(help="Run or checkpoint folder.", show_default=False)],
    source: Annotated[str, typer.Option("--source", help="Dataset folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, ending in .rrd.")],
    episode: Annotated[int, typer.Option("--episode", help="Number of the episode."), Ge(0)] = 0,
    every: Annotated[int, typer.Option("--every", help="Predict at every n-th frame."), COUNT] = 1,
    dataset_config: DatasetConfig = None,
    vlm_path: VlmPath = None,
    device: Device = "auto",
) -> None:
    """Write a recorded episode and what the policy predicts at each frame for the Rerun viewer.

    Needs dvla\\[rerun]; open the file with `rerun FILE`.

    Example: dvla rerun runs/base --source data/push --episode 0 -o episode.rrd
    """
    from .rerun import write_rerun

    with progress_bars() as show:
        done = write_rerun(
            str(run),
            source,
            episode,
            out,
            every=every,
            dataset_config=dataset_config,
            vlm_path=vlm_path,
            device=device,
            progress=show,
        )
    say(
        f"{done.path}: {done.frames} frames, predictions at {done.predicted} of them, with a mean distance of "
        f"{done.error:.2f} σ from the expert's actions"
    )
