"""Settings of `dvla serve` and `dvla bench latency`. Imports no torch: the command line's help is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from ...common.config import COUNT, DEVICE, SAMPLE_STEPS, STEPS, VLM_PATH, Option, require_ranges
from ...errors import UserError

DATASET = Option("--dataset", help="Dataset whose robot and normalization to use, of a policy trained on several.")
COMPILE = Option("--compile", help="Compile the DiT's blocks with torch.compile.")


@dataclass(frozen=True)
class PolicyOptions:
    """How a policy is opened for a server: arguments of `load_policy`."""

    dataset: Annotated[str | None, DATASET] = None
    steps: Annotated[int | None, SAMPLE_STEPS, STEPS] = None
    compile: Annotated[bool, COMPILE] = False
    blind: Annotated[bool, Option("--blind", help="Act with images blanked.")] = False
    seed: Annotated[int, Option("--seed", help="Random seed of the noise."), Ge(0)] = 0
    vlm_path: Annotated[str | None, VLM_PATH] = None
    device: Annotated[str, DEVICE] = "auto"


@dataclass(frozen=True)
class ServeConfig:
    """Where to listen, and the limits. `UserError` for values out of range."""

    host: Annotated[
        str, Option("--host", help="Interface to listen on; any address other than localhost needs a token.")
    ] = "127.0.0.1"
    port: Annotated[int, Option("--port", help="Port; 0: any free one."), Interval(ge=0, le=65535)] = 8000
    max_batch: Annotated[
        int, Option("--max-batch", help="Most requests in one forward pass."), Interval(ge=1, le=4096)
    ] = 8
    max_wait_ms: Annotated[
        float,
        Option("--max-wait-ms", help="Milliseconds that a request waits for others."),
        Interval(ge=0, le=60_000),
    ] = 2.0
    max_clients: Annotated[
        int, Option("--max-clients", help="Most connections at a time."), Interval(ge=1, le=2**16)
    ] = 16
    max_message_mib: Annotated[
        float, Option("--max-message-mib", help="Largest message in MiB."), Interval(ge=1 / 1024, le=2048)
    ] = 32.0
    execute: Annotated[
        int | None,
        Option(
            "--execute", help="Answer with one action at a time and replan after n of a chunk; default: whole chunks."
        ),
        COUNT,
    ] = None
    fields: Annotated[
        tuple[str, ...],
        Option(
            "--field", help="Another name of a field, e.g. images/front=observation/image; may be given several times."
        ),
    ] = ()
    limits: Annotated[
        Literal["off", "clip", "stop"],
        Option(
            "--limits",
            help="Actions beyond the range or largest step of the data: clip them, or stop: refuse; either refuses "
            "states far outside the data. Default: off.",
        ),
    ] = "off"
    answer_timeout: Annotated[
        float, Option("--timeout", help="Seconds before a request is given up."), Interval(ge=0.001, le=86_400)
    ] = 30.0
    # seconds after which a client that does not read is disconnected
    send_timeout: Annotated[float, Interval(gt=0, le=86_400)] = 10.0
    # seconds between pings of a silent client, which has as long to answer
    ping_interval: Annotated[float, Interval(gt=0, le=86_400)] = 20.0

    def __post_init__(self) -> None:
        require_ranges(self)

    @property
    def max_message(self) -> int:
        """Bytes of one message."""
        return int(self.max_message_mib * 2**20)


@dataclass(frozen=True)
class LatencyConfig:
    """What is timed. `UserError` for values out of range."""

    checkpoint: str | None = None  # run, checkpoint or exported folder; None: random weights
    dataset: Annotated[str | None, DATASET] = None
    vlm_path: Annotated[str | None, VLM_PATH] = None  # with random weights: this VLM's, else the DiT alone
    vlm: Annotated[
        str,
        Option(
            "--vlm", help="With random weights: model of the VLM in --vlm-path, qwen3vl (the default) or paligemma2."
        ),
    ] = "qwen3vl"
    model_size: Annotated[
        str, Option("--model-size", help="With random weights: tiny, small, base (the default) or large.")
    ] = "base"
    views: Annotated[
        int, Option("--views", help="With random weights: number of cameras; default 2."), Interval(ge=1, le=64)
    ] = 2
    steps: Annotated[int | None, SAMPLE_STEPS, STEPS] = None
    batches: Annotated[
        tuple[int, ...],
        Option(
            "--batch-size",
            help="Observations per call; through the server: clients. May be given several times; default 1.",
        ),
        Interval(ge=1, le=2**16),
    ] = (1,)
    camera: Annotated[tuple[int, int], Interval(ge=1, le=2**14)] = (480, 640)  # H, W of its images
    warm_up: Annotated[
        int, Option("--warm-up", help="Untimed calls before the timed ones."), Interval(ge=0, le=10**6)
    ] = 5
    repeats: Annotated[int, Option("--repeats", help="Timed calls."), Interval(ge=1, le=10**6)] = 50
    device: Annotated[str, DEVICE] = "auto"
    compile: Annotated[bool, COMPILE] = False
    server: Annotated[
        bool, Option("--server/--no-server", help="Also time round trips through a server on this machine.")
    ] = True

    def __post_init__(self) -> None:
        require_ranges(self)
        if not self.batches:
            raise UserError("no --batch-size is given; give at least one")
