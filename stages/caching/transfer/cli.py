"""`dvla cache export | import | push | pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ....common.console import console, progress_bars
from ....common.options import Public
from ....common.text import in_megabytes, size


def cache_push(
    path: Annotated[Path, typer.Argument(help="Finished cache.", show_default=False)],
    url: Annotated[
        str, typer.Argument(help="s3://bucket/cache, gs://…, or hf://datasets/owner/name.", show_default=False)
    ],
    public: Public = False,
) -> None:
    """Copy a finished cache to an object store or the hub, the manifest last. Run again to finish an interrupted one.

    Example: dvla cache push caches/droid s3://bucket/droid
    """
    from .object_store import push_cache

    with progress_bars() as show:
        done = push_cache(path, url, not public, in_megabytes(show, "push"))
    console.print(
        f"{done.where}: {done.files} files, {size(done.nbytes)}, {done.found} found there; train from it with "
        f"`dvla train --from-cache {done.where} --local-cache FOLDER`, or fetch it with `dvla cache pull`",
        markup=False,
    )


def cache_pull(
    url: Annotated[
        str,
        typer.Argument(help="URL of a cache: s3://, gs://, https://, hf://datasets/owner/name.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="Cache folder to make; an unfinished one is resumed.")],
) -> None:
    """Copy a cache from an object store or the hub; every file is checked against the manifest. Run again to finish an interrupted one.

    Example: dvla cache pull s3://bucket/droid --out caches/droid
    """
    from .object_store import pull_cache

    with progress_bars() as show:
        done = pull_cache(url, out, in_megabytes(show, "pull"))
    console.print(
        f"{out}: {done.files} files, {size(done.nbytes)}, {done.found} found there; all as they were written",
        markup=False,
    )


def cache_export(
    path: Annotated[Path, typer.Argument(help="Cache folder.", show_default=False)],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            help="Folder, fsspec URL (s3://bucket/cache), or 'pipe:COMMAND' with {name} for the name of each file.",
        ),
    ],
    format: Annotated[str, typer.Option("--format", help="webdataset.")] = "webdataset",
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Largest size of a tar, as in 1GiB or 500MB.")
    ] = "1GiB",
) -> None:
    """Write a finished cache as WebDataset tars, which other tools can train from. Run again to finish an interrupted export.

    Example: dvla cache export cache --out s3://bucket/cache --shard-size 1GiB
    """
    from ....common.text import parse_size
    from .webdataset import export

    with progress_bars() as show:
        report = export(path, out, format, parse_size(shard_size), show)
    console.print(
        f"{report.where}: {report.samples} observations in {report.parts} tars, {size(report.bytes)}, {report.found} found finished; "
        f"{report.seconds:.1f} s",
        markup=False,
    )


def cache_import(
    source: Annotated[
        str,
        typer.Argument(
            help="What an export was written to: folder, fsspec URL, or 'pipe:COMMAND' with {name}.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Cache folder to make; an unfinished one is resumed.")],
) -> None:
    """Make a cache from its export again, byte for byte. Every tar is checked against its checksum first.

    Example: dvla cache import s3://bucket/cache --out cache
    """
    from .webdataset import import_cache

    with progress_bars() as show:
        report = import_cache(source, out, show)
    same = "every file is the exported cache's, byte for byte"
    if report.found == report.parts:
        same = "nothing was missing"
    elif report.rewritten:
        same = f"{report.rewritten} files have other bytes than the exported cache's, of the same content (compressed again, or metadata)"
    console.print(
        f"{out}: {report.samples} observations, {report.parts} shards, {size(report.bytes)}, {report.found} found finished; {same}; "
        f"{report.seconds:.1f} s",
        markup=False,
    )
