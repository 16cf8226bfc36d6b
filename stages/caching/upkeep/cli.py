"""`dvla cache verify | status | inspect | diff | repair | gc`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ....common.config import ANY_COUNT, COUNT
from ....common.console import console, errors, progress_bars, say
from ....common.options import Device, Json, VlmPath
from ....common.text import size
from ..cli import refusal

Moved = Annotated[
    list[str] | None,
    typer.Option("--source", help="Dataset folder, if moved since the build; may be given several times."),
]
CachePath = Annotated[Path, typer.Argument(help="Cache folder.", show_default=False)]


def cache_verify(
    path: CachePath,
    live: Annotated[int, typer.Option("--live", help="Frames to recompute with the live encoder."), ANY_COUNT] = 0,
    source: Moved = None,
    vlm_path: VlmPath = None,
    device: Device = "auto",
) -> None:
    """Check every byte against its checksum, and random features against the live encoder.

    Exit code 1 when something differs.

    Example: dvla cache verify cache --live 32
    """
    from .verify import verify

    with progress_bars() as show:
        problems, check = verify(path, live, tuple(source or ()), vlm_path, device, progress=show, say=say)
    for line in problems:
        errors.print(line, style="red", markup=False)
    if check is not None:
        say(f"{check.count} frames recomputed: relative RMS difference {check.relative:.2g}")
        say(f"  largest difference {check.largest:.2g}, RMS of the features {check.scale:.2g}")
    if problems:
        raise typer.Exit(1)
    say(f"{path}: all files are intact")


def cache_status(path: CachePath, json: Json = None) -> None:
    """Show what is finished of a cache and its generations, and whether a build is running.

    Reads no feature and needs no VLM.

    Example: dvla cache status cache
    """
    from ....common.console import write_json
    from .status import status
    from .tables import show_status

    found = status(path)
    write_json(json, found)
    show_status(found)


def cache_inspect(
    path: CachePath,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for an image of the token norms of each view; nothing there is overwritten."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Page to write: datasets, images, token norms, action ranges, masks, bytes."),
    ] = None,
    source: Moved = None,
) -> None:
    """Show what a finished cache was built with, its episodes, instructions and action slots.

    Example: dvla cache inspect cache --html cache.html
    """
    from .inspect import inspect, norm_images
    from .tables import show_facts, show_ranges

    facts = inspect(path)
    ranges = norm_images(path, out) if out else {}
    if html is not None:
        from .page import write_cache_page

        with progress_bars() as show:
            nbytes = write_cache_page(path, html, tuple(source or ()), show)
    show_facts(facts)
    show_ranges(ranges)
    if html is not None:
        say(f"{html}: {size(nbytes)}, one file that needs no network")


def cache_diff(
    a: Annotated[Path, typer.Argument(help="Cache folder A.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Cache folder B.", show_default=False)],
    samples: Annotated[
        int, typer.Option("--samples", help="Frames of each view whose features to compare."), COUNT
    ] = 256,
    json: Json = None,
) -> None:
    """Compare two finished caches: settings, datasets, episodes, tables, sampled features.

    Exit code 1 when they differ.

    Example: dvla cache diff cache cache.gen-1
    """
    from ....common.console import write_json
    from .diff import diff
    from .tables import show_diff

    with progress_bars() as show:
        found = diff(a, b, samples, progress=show)
    write_json(json, found)
    show_diff(found)
    if not found.same:
        raise typer.Exit(1)


def cache_repair(
    path: CachePath,
    source: Moved = None,
    vlm_path: VlmPath = None,
    device: Device = "auto",
    allow: Annotated[
        bool, typer.Option("--allow-quarantine", help="Finish an unfinished build however many episodes are unusable.")
    ] = False,
) -> None:
    """Check every file, and rebuild what is damaged or missing with the cache's own settings.

    Example: dvla cache repair cache
    """
    from .repair import repair

    with refusal(), progress_bars() as show:
        report = repair(path, tuple(source or ()), vlm_path, device, say, show, allow)
    if report.intact:
        say(f"{path}: all files are intact")
        return
    say(f"{path}: intact again; rebuilt {report.parts}")
    if report.other_bytes:
        names = f"{', '.join(report.other_bytes[:3])}{', …' if len(report.other_bytes) > 3 else ''}"
        count = f"{len(report.other_bytes)} files have other bytes than before, as from other hardware or batches:"
        console.print(f"{count}\n  {names}", style="yellow", markup=False)


def cache_gc(
    path: CachePath,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """List what can be removed: earlier generations, an unfinished next one, files of killed builds.

    Removes them with --yes, or after asking.

    Example: dvla cache gc cache --yes
    """
    from .garbage import garbage, remove, require_no_builder
    from .tables import show_garbage

    items = garbage(path)
    require_no_builder(path)
    if not items:
        say(f"{path}: nothing to remove")
        return
    show_garbage(items)
    items = [item for item in items if not item.stays]
    if not items:
        say(f"{path}: nothing to remove but what is in use; stop what reads it, or rerun this later")
        return
    if not yes:
        if not console.is_terminal:
            console.print("nothing was removed; give --yes to remove all of these")
            return
        if typer.prompt("type 'remove' to remove all of these", default="", show_default=False).strip() != "remove":
            console.print("nothing was removed")
            return
    say(f"{path}: {len(items)} removed, {size(remove(path, items))} freed")
