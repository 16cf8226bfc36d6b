"""`dvla data …`: record demonstrations and look at datasets, whatever their format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from annotated_types import Ge, Interval

from ...common.config import COUNT, from_dotted
from ...common.console import console, errors, progress_bars, say
from ...common.options import DatasetConfig, Given, Options
from ...errors import UserError
from .config import AddConfig

if TYPE_CHECKING:
    from .add.dataset import Dataset
    from .add.draft import Request

Source = Annotated[str, typer.Argument(help="Dataset folder or file, or hub id.", show_default=False)]


def data_list(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders to search for datasets; default: list the shipped families.", show_default=False),
    ] = None,
) -> None:
    """List the dataset configs that are shipped or registered or, with folders, the datasets in them.

    Example: dvla data list

    Example: dvla data list data ~/recordings
    """
    from ...cache.readers.faults import whole_dataset
    from ...cache.readers.search import config_names, load_config, registered
    from .summary import find_datasets, misfit, summarize
    from .tables import show_datasets, show_families

    if not folders:
        show_families([load_config(name) for name in config_names()])
        for name, path in registered().items():
            try:
                say(f"registered: {name} ({load_config(path).format}, {path})")
            except UserError as error:
                errors.print(f"{path}: {error}", style="red", markup=False)
        return
    found, broken = [], []
    with progress_bars() as show:
        paths = list(find_datasets(folders))
        for done, path in enumerate(paths, start=1):
            try:
                with whole_dataset(path):
                    found.append(summarize(path))
            except UserError as error:
                broken.append(f"{path}: {error}")
            show("datasets", done, len(paths))
    if found:
        show_datasets(found)
    broken += [f"{s.path}: {s.source.problem}" for s in found if misfit(s)]
    for line in broken:
        errors.print(line, style="red", markup=False)
    broken_words = f", {len(broken)} of which cannot be opened" if broken else ""
    say(f"{len(paths)} dataset{'s' * (len(paths) != 1)}{broken_words}")


def data_show(
    source: Source,
    episode: Annotated[int | None, typer.Option("--episode", help="Also show this episode."), Ge(0)] = None,
    dataset_config: DatasetConfig = None,
) -> None:
    """Show what a dataset is, what each of its dimensions means, and one episode.

    Example: dvla data show lerobot/droid_1.0.1

    Example: dvla data show data/push --episode 3
    """
    from ...cache.readers.faults import whole_dataset
    from .summary import instructions, load_episode, native_names, ranges, summarize
    from .tables import columns_table, field_table, show_episode, show_summary, values_table

    with whole_dataset(source), progress_bars() as show:
        summary = summarize(source, dataset_config)
        counts = instructions(summary, show)
        opened = summary.source
        shown = load_episode(opened, episode) if episode is not None else None
        seen = ({}, 0) if opened.config.mapped else ranges(opened, show)
    show_summary(summary, counts)
    if shown:
        show_episode(shown)
    if not opened.config.mapped:
        console.print(columns_table(opened, *seen, shown))
        errors.print(str(opened.problem), style="yellow", markup=False)
        return
    vectors = [
        ("action", opened.action_map, shown.action if shown else None),
        ("state", opened.state_map, shown.state if shown else None),
    ]
    for (name, mapping, values), named in zip(vectors, native_names(opened)):
        if mapping.native_dim:
            console.print(
                field_table(name, mapping, named) if values is None else values_table(name, mapping, named, values)
            )


def data_check(
    source: Source,
    episodes: Annotated[
        int | None,
        typer.Option(
            "--episodes",
            help="Episodes whose frames are decoded, evenly spread; the tables of all are read. Default: 64.",
        ),
        Ge(0),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Decode every frame of every episode.")] = False,
    frames: Annotated[int, typer.Option("--frames", help="Frames to decode of each view of an episode."), COUNT] = 8,
    out: Annotated[Path | None, typer.Option("--out", help="JSON report to write.")] = None,
    dataset_config: DatasetConfig = None,
) -> None:
    """Check a dataset: files, counts, time, cameras, units, rotations, jumps, text.

    Exit code 1 when something must be fixed.

    Example: dvla data check data/push

    Example: dvla data check data/push --all --out push.json
    """
    from .check.check import CheckConfig, check, findings_table

    with progress_bars() as show:
        report = check(CheckConfig(source, episodes, frames, everything, out, dataset_config), show)
    if report.findings:
        console.print(findings_table(report))
    say(report.summary)
    if report.must_fix:
        raise typer.Exit(1)


def data_video(
    source: Source,
    episode: Annotated[int, typer.Option("--episode", help="Number of the episode."), Ge(0)],
    out: Annotated[Path, typer.Option("--out", "-o", help="mp4 file to write.")],
    fps: Annotated[
        float | None, typer.Option("--fps", help="Frames per second; default: as recorded."), Interval(gt=0, le=1000)
    ] = None,
    dataset_config: DatasetConfig = None,
) -> None:
    """Render an episode as a video: all views with instruction, time and action curves.

    Example: dvla data video data/push --episode 3 -o push-3.mp4
    """
    from .episode_video import write_episode

    with progress_bars() as show:
        written = write_episode(source, episode, out, fps, dataset_config, show)
    say(f"{written.path}: {written.frames} frames of {written.width}x{written.height}, {written.fps:g} per second")


def data_stats(
    source: Annotated[
        str | None,
        typer.Argument(help="Dataset folder or file, or hub id; none: only merge reports.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON report to write.")] = None,
    dataset_config: DatasetConfig = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option("--merge", help="Report of other datasets to merge in; may be given several times."),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Also show the native dimensions; a report always has them.")
    ] = False,
) -> None:
    """Measure mean, std, min, max and quantiles of every action and state field.

    Reads the tables alone, no image.

    Example: dvla data stats data/push --out push.json

    Example: dvla data stats --merge push.json --merge button.json --out all.json
    """
    from ...cache.readers import open_source
    from .statistics import measure, merge_reports, read_report, refuse_existing, write_report
    from .tables import show_report

    if source is None and not merge:
        raise UserError("give a dataset to measure, or reports to --merge")
    refuse_existing(out)
    reports = [read_report(path) for path in merge or ()]
    if source is not None:
        opened = open_source(source, dataset_config, unmapped=True)
        if opened.problem:
            errors.print(str(opened.problem), style="yellow", markup=False)
        with progress_bars() as show:
            reports.insert(0, measure(opened, show))
    report = merge_reports(reports)
    if out is not None:
        write_report(report, out)
    show_report(report, out, native)


ANSWERS = """embodiment action_kind joint_unit finger_unit position_unit delta_scale base_unit gripper state_gripper
    rotation control_hz"""


def data_add(
    source: Source,
    given: Annotated[Given, Options(AddConfig, f"out name license action_column state_column field {ANSWERS} yes")],
) -> None:
    """Write a dataset config for a new dataset, and register it: the dataset then opens without an option.

    Proposes each answer from names and values, and asks at a terminal; elsewhere it takes what is certain.

    Example: dvla data add data/cubes

    Example: dvla data add data/cubes --embodiment gripper_joint --action-kind absolute --joint-unit deg --gripper 100,0
    """
    from ...cache.readers.search import config_names, registered_folder
    from .add.dataset import Dataset
    from .add.draft import Request, write

    config = from_dotted(AddConfig, given)
    answers = {f"--{name.replace('_', '-')}": given[name] for name in ANSWERS.split() if name in given}
    columns = config.action_column, config.state_column
    with console.status("reading names and ranges"):
        dataset = Dataset(source)
    name = config.name or dataset.source.name
    if not config.out and name in config_names():
        raise UserError(f"'{name}' is a shipped family; choose another --name")
    path = config.out or registered_folder() / f"{name}.yaml"
    if path.exists():
        raise UserError(f"{path} exists; choose another --{'out' if config.out else 'name'}")
    certain = config.yes or not sys.stdin.isatty()
    request = Request(source, answers, config.field, *columns, config.name, config.license, certain, config.yes)
    request, text = _answered(dataset, request)
    write(request, text, path)
    say(text)
    option = f" --dataset-config {path}" if config.out else ""
    say(f"{path}: written, and the dataset opens with it. Look at every line marked 'guessed', then:")
    say(f"dvla data show {source}{option} --episode N")
    say(f"dvla cache build {source}{option} --out cache")


def _answered(dataset: Dataset, request: Request) -> tuple[Request, str]:
    """The request with its questions answered at the terminal, and the YAML text. `UserError` off a terminal."""
    from .add.draft import draft

    text, missing = draft(dataset, request)
    while missing:
        question, asked = missing[0], missing[0].proposal
        if not sys.stdin.isatty() or request.take_all:
            usage = "; ".join(question.usage for question in missing)
            yes = " (--yes takes what is proposed)" if any(q.proposal for q in missing) else ""
            raise UserError(f"{request.source}: the files do not say everything; add {usage}{yes}")
        try:
            shown = f"{question.text} ({asked.why})" if asked else question.text
            candidate = request.answered(question, typer.prompt(shown, default=asked.answer if asked else None))
            text, missing = draft(dataset, candidate)
            request = candidate
        except UserError as error:
            errors.print(str(error), style="red", markup=False)
    return request, text


def data_export(
    source: Source,
    out: Annotated[Path, typer.Option("--out", help="Folder to create; an unfinished one is resumed.")],
    to: Annotated[
        str, typer.Option("--to", help="Format: episode_hdf5 (one HDF5 file per episode, unified 128-d actions).")
    ] = "episode_hdf5",
    compression: Annotated[
        str, typer.Option("--compression", help="Compression of the images: none or gzip.")
    ] = "none",
    dataset_config: DatasetConfig = None,
) -> None:
    """Write every episode of a dataset, in the unified action space, to another format.

    Rerun the same command to resume.

    Example: dvla data export data/push --to episode_hdf5 --out data/push_hdf5
    """
    from ...cache.readers import open_source
    from ...common.text import size
    from .export import check_options, export

    check_options(to, compression)
    with progress_bars() as show:
        opened = open_source(source, dataset_config)
        report = export(opened, out, show, to=to, compression=compression)
    for note in opened.notes():
        say(f"{opened.name}: {note.text}")
    say(
        f"{report.path}: {report.episodes} episodes ({report.kept} reused), {report.frames} frames, "
        f"{size(report.bytes)}; {report.quarantined} episodes in quarantine; {report.seconds:.1f} s"
    )
