"""`dvla cache export | import | push | pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ....common.console import progress_bars, say
from ....common.hub import DATASETS
from ....common.options import Public
from ....common.text import in_megabytes, size


def cache_push(
    path: Annotated[Path, typer.Argument(help="Finished cache.", show_default=False)],
    url: Annotated[
        str,
        typer.Argument(
            help="URL to copy to, s3://bucket/cache or gs://…; or owner/name of the hub.", show_default=False
        ),
    ],
    public: Public = False,
) -> None:
    """Copy a finished cache to an object store or the hub. Rerun to resume.

    Example: dvla cache push caches/droid s3://bucket/droid
    """
    from .object_store import push_cache

    with progress_bars() as show:
        done = push_cache(path, url, not public, in_megabytes(show, "push"))
    say(f"{done.where}: {done.files} files, {size(done.nbytes)}, {done.found} reused")
    named = done.where.removeprefix(DATASETS)
    copies = "" if named != done.where else " --local-cache FOLDER"
    say(f"next: dvla train --from-cache {named}{copies} --out runs/base, or dvla cache pull")


def cache_pull(
    url: Annotated[
        str,
        typer.Argument(
            help="URL of a cache, s3://, gs:// or https://; or owner/name[@revision] of the hub.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Cache folder to create; an unfinished one is resumed.")],
) -> None:
    """Copy a cache from an object store or the hub. Rerun to resume.

    Every file is checked against the manifest.

    Example: dvla cache pull s3://bucket/droid --out caches/droid
    """
    from .object_store import pull_cache

    with progress_bars() as show:
        done = pull_cache(url, out, in_megabytes(show, "pull"))
    say(f"{out}: {done.files} files, {size(done.nbytes)}, {done.found} reused; all intact")


def cache_export(
    path: Annotated[Path, typer.Argument(help="Cache folder.", show_default=False)],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            help="Folder, fsspec URL (s3://bucket/cache), or 'pipe:COMMAND' with {name} for the name of each file.",
        ),
    ],
    format: Annotated[str, typer.Option("--format", help="Format: webdataset.")] = "webdataset",
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Largest size of a tar, e.g. 1GiB or 500MB.")
    ] = "1GiB",
) -> None:
    """Write a finished cache as WebDataset tars, which other tools can train from. Rerun to resume.

    Example: dvla cache export cache --out s3://bucket/cache --shard-size 1GiB
    """
    from ....common.text import parse_size
    from .webdataset import export

    with progress_bars() as show:
        report = export(path, out, format, parse_size(shard_size), show)
    say(
        f"{report.where}: {report.samples} observations in {report.parts} tars, {size(report.bytes)}, "
        f"{report.found} reused; {report.seconds:.1f} s"
    )


def cache_import(
    source: Annotated[
        str,
        typer.Argument(help="Export to read: folder, fsspec URL, or 'pipe:COMMAND' with {name}.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="Cache folder to create; an unfinished one is resumed.")],
) -> None:
    """Rebuild a cache from its export, byte for byte.

    Every tar is checked against its checksum first.

    Example: dvla cache import s3://bucket/cache --out cache
    """
    from .webdataset import import_cache

    with progress_bars() as show:
        report = import_cache(source, out, show)
    same = "every file is the exported cache's, byte for byte"
    if report.found == report.parts:
        same = "already complete"
    elif report.rewritten:
        same = (
            f"{report.rewritten} files have other bytes than in the exported cache, with equal content "
            "(compressed again, or metadata)"
        )
    say(
        f"{out}: {report.samples} observations, {report.parts} shards, {size(report.bytes)}, {report.found} reused; "
        f"{same}; {report.seconds:.1f} s"
    )
