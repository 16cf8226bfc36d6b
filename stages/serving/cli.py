"""`dvla serve` and `dvla bench`: a policy for robots on other machines, and how long its actions take."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...common.config import from_dotted
from ...common.console import console, errors, progress_bars, say, write_json
from ...common.options import Given, Json, Options
from ...errors import UserError
from .config import LatencyConfig, PolicyOptions, ServeConfig

if TYPE_CHECKING:
    import socket


SERVE = (
    """host port token_file execute fields max_batch max_wait_ms max_clients max_message_mib answer_timeout limits"""
)
OPENED = """dataset steps compile blind seed vlm_path device"""
LATENCY = """policy batches random.model_size random.views random.vlm vlm_path image_size repeats warm_up server dataset
    steps compile device"""


def serve_command(
    policy: Annotated[Path, typer.Argument(help="Run, checkpoint or exported folder.", show_default=False)],
    given: Annotated[Given, Options(ServeConfig, SERVE)],
    opened: Annotated[Given, Options(PolicyOptions, OPENED)],
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the token that clients must send; or set DVLA_TOKEN.")
    ] = None,
) -> None:
    """Serve a policy to robots: WebSocket and msgpack, as openpi's client speaks. Ctrl-C ends it.

    Example: dvla serve runs/lora --port 8000
    """
    from .access import listen, read_token
    from .server import PolicyServer, load_policy

    config = from_dotted(ServeConfig, given)
    options = from_dotted(PolicyOptions, opened)
    token = read_token(token_file)
    with listen(config.host, config.port, token) as sock:
        loaded = load_policy(policy, **vars(options))
        server = PolicyServer(loaded, config, token, lambda line: errors.print(line, markup=False))
        say(_interface(policy, server.metadata))
        seconds = server.warm_up(options.compile)
        number = server.run(sock, lambda: say(_ready(sock, seconds, token)))
    answers = server.metrics.counts["requests"] + server.metrics.counts["queued"]
    say(f"ended: {answers} answer{'s' * (answers != 1)}")
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def _interface(policy: Path, about: dict[str, Any]) -> str:
    """What a served policy takes and gives."""
    return (
        f"{policy}: {about['robot']}, images of {', '.join(about['views']) or 'nothing'}, {len(about['state'])} state "
        f"values → {about['horizon']} × {len(about['actions'])} at {about['control_hz']:g} Hz"
    )


def _ready(sock: socket.socket, seconds: float, token: str | None) -> str:
    """Where a server listens."""
    address, port = sock.getsockname()[:2]
    where = f"[{address}]" if ":" in address else address
    return (
        f"ready: a forward pass takes {seconds * 1e3:.1f} ms; listening on ws://{where}:{port}"
        f"{', token required' if token else ''}; GET /healthz and /metrics; Ctrl-C ends it"
    )


def latency_command(
    given: Annotated[Given, Options(LatencyConfig, LATENCY)],
    random: Annotated[Given, Options(LatencyConfig, defaults=False)],
    policy: Annotated[
        Path | None,
        typer.Argument(help="Run, checkpoint or exported folder; none: random weights.", show_default=False),
    ] = None,
    image_size: Annotated[str, typer.Option("--image-size", help="Height x width of the cameras.")] = "480x640",
    json: Json = None,
) -> None:
    """Time an action end to end, part by part, and through a policy server; p50, p90, p99 in milliseconds.

    Example: dvla bench latency runs/lora --batch-size 1 --batch-size 8. Without a checkpoint:
    dvla bench latency --model-size base --views 2
    """
    from .latency import latency_table, measure

    if policy is not None and random:
        raise UserError("--model-size, --views and --vlm are for random weights; a checkpoint has its own")
    if "vlm" in random and "vlm_path" not in given:
        raise UserError(
            "--vlm needs the folder or hub id of its weights: --vlm-path; without it the DiT alone is timed"
        )
    height, _, width = image_size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UserError(f"--image-size {image_size}: give height x width in pixels, e.g. 480x640")
    checkpoint = None if policy is None else str(policy)
    config = from_dotted(
        LatencyConfig, given | random | {"checkpoint": checkpoint, "camera": (int(height), int(width))}
    )
    with progress_bars() as show:
        report = measure(config, show)
    passes = f"{report['passes']} forward passes an action, " if report["passes"] > 1 else ""
    say(
        f"{report['policy']}: {report['parameters'] / 1e6:.1f} M parameters, {report['views']} views, chunk of "
        f"{report['horizon']} steps, {passes}{report['device']}{', compiled' if report['compiled'] else ''}, "
        f"torch {report['torch']}, {report['repeats']} calls"
    )
    console.print(latency_table(report))
    write_json(json, report)
    if "server_failed" in report:
        errors.print(f"the rows of the server are missing: {report['server_failed']}", style="red", markup=False)
        raise typer.Exit(1)
