"""`dvla push`, `dvla cache push` and `dvla cache pull`: policies and caches to the hub and object stores, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .cli_cache import VlmPath, cache_app
from .stages.console import console, progress_bars, size

Public = Annotated[bool, typer.Option("--public", help="A new repository is public; default: private.")]


def push_command(
    policy: Annotated[str, typer.Argument(help="Run, checkpoint or exported policy folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Model repository, owner/name; made if it is not there.", show_default=False)],
    evaluation: Annotated[Optional[list[Path]], typer.Option("--eval", help="Folder that `dvla eval --out` wrote, for the card; may be given several times.")] = None,
    format: Annotated[Optional[list[str]], typer.Option("--format", help="Besides the policy: torch-export or onnx, its network as one graph.")] = None,
    public: Public = False,
    vlm_path: VlmPath = None,
) -> None:
    """Upload a policy to the Hugging Face hub with a card: data and licences, results, limits. Log in with `hf auth login` or HF_TOKEN.

    Example: dvla push runs/lora owner/push-policy --eval eval/lora
    """
    from .stages.hub import push_policy

    url = push_policy(policy, repo, not public, tuple(evaluation or ()), vlm_path, tuple(format or ()), lambda line: console.print(line, style="yellow", markup=False))
    console.print(f'{url}; Policy.from_pretrained("{repo}") fetches it', markup=False)


@cache_app.command("push")
def cache_push(
    path: Annotated[Path, typer.Argument(help="Finished cache.", show_default=False)],
    url: Annotated[str, typer.Argument(help="s3://bucket/cache, gs://…, or hf://datasets/owner/name.", show_default=False)],
    public: Public = False,
) -> None:
    """Copy a finished cache to an object store or the hub, the manifest last. Run again to finish an interrupted one.

    Example: dvla cache push caches/droid s3://bucket/droid
    """
    from .stages.transfer import push_cache

    with progress_bars() as show:
        done = push_cache(path, url, not public, lambda sent, total: show("push", sent, total))
    console.print(f"{done.where}: {done.files} files, {size(done.nbytes)}, {done.found} found there; train from it with "
                  f"`dvla train --from-cache {done.where} --local-cache FOLDER`, or fetch it with `dvla cache pull`", markup=False)


@cache_app.command("pull")
def cache_pull(
    url: Annotated[str, typer.Argument(help="URL of a cache: s3://, gs://, https://, hf://datasets/owner/name.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Cache folder to make; an unfinished one is resumed.")],
) -> None:
    """Copy a cache from an object store or the hub; every file is checked against the manifest. Run again to finish an interrupted one.

    Example: dvla cache pull s3://bucket/droid --out caches/droid
    """
    from .stages.transfer import pull_cache

    with progress_bars() as show:
        done = pull_cache(url, out, lambda got, total: show("pull", got, total))
    console.print(f"{out}: {done.files} files, {size(done.nbytes)}, {done.found} found there; all as they were written", markup=False)
