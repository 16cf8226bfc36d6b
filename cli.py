"""The `dvla` command: every command and the room it lives in. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from . import __version__
from .common.console import console
from .common.doctor.doctor import doctor_command
from .common.doctor.faults import ended
from .common.options import Command, run_command, with_options
from .stages.caching import cli as caching
from .stages.caching.transfer import cli as transfer
from .stages.caching.upkeep import cli as upkeep
from .stages.data import cli as data
from .stages.experiments import cli as experiments
from .stages.policy import cli as policy
from .stages.reports import cli as reports
from .stages.serving import cli as serving
from .stages.simulation import cli as simulation
from .stages.training import cli as training

app = typer.Typer(
    name="dvla",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run the frozen VLM **once** into a feature cache, train a one-step Drifting DiT on it, fine-tune.",
)
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "data": (
        "Record, describe, check and show datasets.",
        {
            "record": simulation.data_record,
            "list": data.data_list,
            "show": data.data_show,
            "check": data.data_check,
            "video": data.data_video,
            "stats": data.data_stats,
            "add": data.data_add,
            "export": data.data_export,
        },
    ),
    "vlm": ("Vision-language checkpoints for tests.", {"tiny": caching.vlm_tiny}),
    "cache": (
        "Stage one: the feature cache.",
        {
            "build": caching.cache_build,
            "plan": caching.cache_plan,
            "verify": upkeep.cache_verify,
            "status": upkeep.cache_status,
            "inspect": upkeep.cache_inspect,
            "diff": upkeep.cache_diff,
            "repair": upkeep.cache_repair,
            "gc": upkeep.cache_gc,
            "export": transfer.cache_export,
            "import": transfer.cache_import,
            "push": transfer.cache_push,
            "pull": transfer.cache_pull,
        },
    ),
    "bench": ("Measure speed on this machine.", {"latency": serving.latency_command}),
}
COMMANDS: dict[str, Callable[..., None]] = {
    "train": training.train_command,
    "finetune": training.finetune_command,
    "cotrain": experiments.cotrain_command,
    "export": policy.export_command,
    "report": reports.report_command,
    "compare": reports.compare_command,
    "rerun": reports.rerun_command,
    "push": policy.push_command,
    "launch": experiments.launch_command,
    "serve": serving.serve_command,
    "eval": simulation.eval_command,
    "ablate": experiments.ablate_command,
    "demo": experiments.demo_command,
    "toy": experiments.toy_command,
    "doctor": doctor_command,
}
for group, (text, commands) in GROUPS.items():
    room = typer.Typer(no_args_is_help=True, help=text)
    for name, command in commands.items():
        room.command(name, cls=Command)(with_options(command))
    app.add_typer(room, name=group)
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(with_options(command))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        console.print(f"dvla {__version__}")
        raise typer.Exit()


def run(arguments: list[str]) -> None:
    """Run one command line in this process. Raises `UserError`; usage errors exit 2 by themselves."""
    run_command(typer.main.get_command(app), arguments)


def main() -> None:
    """Entry point: whatever `run` raises is one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if code := ended(lambda: run(sys.argv[1:])):
        sys.exit(code)


if __name__ == "__main__":
    main()
