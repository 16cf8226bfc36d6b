"""`dvla serve` and `dvla bench`: a policy for robots on other machines, and how long its actions take."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from ...common.console import console, errors, progress_bars
from ...common.options import Device, Json, VlmPath
from ...errors import UserError

Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Whose robot, of a policy that was trained on several datasets.")
]
Denoising = Annotated[
    int | None,
    typer.Option("--sample-steps", help="Forward passes of a flow or diffusion head; default: as it was trained for."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the DiT's blocks with torch.compile.")]


def serve_command(
    policy: Annotated[Path, typer.Argument(help="Run, checkpoint or exported folder.", show_default=False)],
    host: Annotated[
        str, typer.Option("--host", help="Interface to listen on; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the token that clients must send; or set DVLA_TOKEN.")
    ] = None,
    execute: Annotated[
        int | None,
        typer.Option(
            "--execute",
            help="Answer with one action of the chunk, and plan again after so many; default: whole chunks.",
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            "--field", help="Another name of a field, e.g. images/front=observation/image; may be given several times."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Requests of one forward pass.")] = 8,
    max_wait_ms: Annotated[
        float, typer.Option("--max-wait-ms", help="How long a request waits for others, milliseconds.")
    ] = 2.0,
    max_clients: Annotated[int, typer.Option("--max-clients", help="Connections at a time.")] = 16,
    max_message_mib: Annotated[float, typer.Option("--max-message-mib", help="Largest message, MiB.")] = 32.0,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds before a request is given up.")] = 30.0,
    dataset: Dataset = None,
    denoising: Denoising = None,
    compile_: Compile = False,
    blind: Annotated[bool, typer.Option("--blind", help="Show it black pictures only.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise.")] = 0,
    vlm_path: VlmPath = None,
    device: Device = "auto",
) -> None:
    """Policy server for robots: WebSocket and msgpack, as openpi's client speaks. Ctrl-C ends it.

    Example: dvla serve runs/lora --port 8000
    """
    from .access import read_token
    from .server import PolicyServer, ServeConfig, load_policy

    config = ServeConfig(
        host,
        port,
        max_batch,
        max_wait_ms / 1e3,
        max_clients,
        int(max_message_mib * 2**20),
        execute,
        tuple(field or ()),
        timeout,
    )
    say = lambda line: errors.print(line, markup=False)  # noqa: E731
    with config.listen(token := read_token(token_file)) as sock:
        server = PolicyServer(
            load_policy(
                policy, device, compile_, dataset=dataset, blind=blind, seed=seed, vlm_path=vlm_path, steps=denoising
            ),
            config,
            token,
            say,
        )
        about = server.metadata
        console.print(
            f"{policy}: {about['robot']}, pictures of {', '.join(about['views']) or 'nothing'}, {len(about['state'])} numbers of state → "
            f"{about['horizon']} × {len(about['actions'])} at {about['control_hz']:g} Hz",
            markup=False,
        )
        seconds = server.warm_up(compile_)
        address, its_port = sock.getsockname()[:2]
        where = f"[{address}]" if ":" in address else address

        def ready() -> None:
            console.print(
                f"ready: a forward pass takes {seconds * 1e3:.1f} ms; listening on ws://{where}:{its_port}"
                f"{', token required' if token else ''}; GET /healthz and /metrics; Ctrl-C ends it",
                markup=False,
            )

        number = server.run(sock, ready)
    answers = server.metrics.counts["requests"] + server.metrics.counts["queued"]
    console.print(f"ended: {answers} answer{'s' * (answers != 1)}", markup=False)
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def latency_command(
    policy: Annotated[
        Path | None,
        typer.Argument(help="Run, checkpoint or exported folder; none: random weights.", show_default=False),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size", help="Observations per call; through the server: clients. May be given several times."
        ),
    ] = None,
    model_size: Annotated[
        str | None, typer.Option("--model-size", help="Random weights: tiny, small, base (the default) or large.")
    ] = None,
    views: Annotated[int | None, typer.Option("--views", help="Random weights: cameras; default 2.")] = None,
    vlm: Annotated[
        str | None,
        typer.Option(
            "--vlm",
            help="Random weights of the DiT behind the VLM in --vlm-path: its model, qwen3vl (the default) or paligemma2.",
        ),
    ] = None,
    vlm_path: VlmPath = None,
    image_size: Annotated[str, typer.Option("--image-size", help="Height x width of the cameras.")] = "480x640",
    repeats: Annotated[int, typer.Option("--repeats", help="Calls that count.")] = 50,
    warm_up: Annotated[int, typer.Option("--warm-up", help="Calls before them.")] = 5,
    server: Annotated[
        bool, typer.Option("--server/--no-server", help="Also round trips through a server on this machine.")
    ] = True,
    dataset: Dataset = None,
    denoising: Denoising = None,
    compile_: Compile = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """How long an action takes: whole, part by part, and through a policy server; p50, p90, p99 in milliseconds.

    Example: dvla bench latency runs/lora --batch-size 1 --batch-size 8. Without a checkpoint: dvla bench latency --model-size base --views 2
    """
    from ...common.console import write_json
    from .latency import LatencyConfig, measure, table

    if policy is not None and (model_size, views, vlm) != (None, None, None):
        raise UserError("--model-size, --views and --vlm are for random weights; a checkpoint has its own")
    if vlm is not None and vlm_path is None:
        raise UserError(
            "--vlm needs the folder or hub id of its weights: --vlm-path; without it the DiT alone is timed"
        )
    height, _, width = image_size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UserError(f"--image-size {image_size}: give height x width in pixels, e.g. 480x640")
    config = LatencyConfig(
        None if policy is None else str(policy),
        dataset,
        vlm_path,
        vlm or "qwen3vl",
        model_size or "base",
        2 if views is None else views,
        denoising,
        tuple(batch_size or (1,)),
        (int(height), int(width)),
        warm_up,
        repeats,
        device,
        compile_,
        server,
    )
    with progress_bars() as show:
        report = measure(config, show)
    passes = f"{report['passes']} forward passes an action, " if report["passes"] > 1 else ""
    console.print(
        f"{report['policy']}: {report['parameters'] / 1e6:.1f} M parameters, {report['views']} views, chunk of {report['horizon']} steps, {passes}"
        f"{report['device']}{', compiled' if report['compiled'] else ''}, torch {report['torch']}, {report['repeats']} calls",
        markup=False,
    )
    console.print(table(report))
    write_json(json, report)
