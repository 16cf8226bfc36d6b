"""`dvla export` and `dvla push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...common.console import console, say
from ...common.options import Public, VlmPath
from ...common.text import size


def push_command(
    policy: Annotated[str, typer.Argument(help="Run, checkpoint or exported policy folder.", show_default=False)],
    repo: Annotated[
        str, typer.Argument(help="Model repository, owner/name; created if it does not exist.", show_default=False)
    ],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="Folder of `dvla eval --out` for the card; may be given several times."),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option("--format", help="Also upload the network as one graph: torch-export or onnx."),
    ] = None,
    public: Public = False,
    vlm_path: VlmPath = None,
) -> None:
    """Upload a policy to the Hugging Face hub with a card: data and licenses, results, limits.

    Log in with `hf auth login` or HF_TOKEN.

    Example: dvla push runs/lora owner/push-policy --eval eval/lora
    """
    from .hub import push_policy

    url = push_policy(policy, repo, not public, tuple(evaluation or ()), vlm_path, tuple(format or ()), _warn)
    say(f'{url}; Policy.from_pretrained("{repo}") fetches it')


def export_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run or checkpoint folder, or RUN/checkpoints/best.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Also write the network as one graph: torch-export, or onnx with dvla\\[onnx]; may be given several "
            "times. LeRobot loads every exported policy (lerobot is accepted and adds nothing).",
        ),
    ] = None,
    vlm_path: VlmPath = None,
) -> None:
    """Write a trained policy as a folder for deployment, which LeRobot loads with --policy.path, too.

    It holds averaged weights, those of the VLM with LoRA merged, statistics and field maps; nothing of training.

    Example: dvla export runs/lora --out policies/push --format onnx
    """
    from .export import export_policy

    done = export_policy(checkpoint, out, tuple(f for f in format or () if f != "policy"), vlm_path, _warn)
    merged = f", with {done.merged} fine-tuned weights of the vision tower" if done.merged else ""
    say(f"{done.path}: policy of step {done.step}, {size(done.nbytes)}{merged}; its VLM is {done.vlm}")
    for name, difference in done.differences.items():
        say(f"{name}: matches the network within a relative difference of {difference:.1e}")


def _warn(line: str) -> None:
    console.print(line, style="yellow", markup=False)
