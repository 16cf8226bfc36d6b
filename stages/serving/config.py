"""Settings of `dvla serve` and `dvla bench latency`. Imports no torch: the command line's help is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...common.config import DEVICE, SAMPLE_STEPS, VLM_PATH, Option
from ...errors import UserError

DATASET = Option("--dataset", help="Dataset whose robot and normalization to use, of a policy trained on several.")
COMPILE = Option("--compile", help="Compile the DiT's blocks with torch.compile.")


@dataclass(frozen=True)
class PolicyOptions:
    """How a policy is opened for a server: arguments of `load_policy`."""

    dataset: Annotated[str | None, DATASET] = None
    steps: Annotated[int | None, SAMPLE_STEPS] = None
    compile: Annotated[bool, COMPILE] = False
    blind: Annotated[bool, Option("--blind", help="Act with images blanked.")] = False
    seed: Annotated[int, Option("--seed", help="Random seed of the noise.")] = 0
    vlm_path: Annotated[str | None, VLM_PATH] = None
    device: Annotated[str, DEVICE] = "auto"


@dataclass(frozen=True)
class ServeConfig:
    """Where to listen, and the limits. `UserError` for values out of range."""

    host: Annotated[
        str, Option("--host", help="Interface to listen on; any address other than localhost needs a token.")
    ] = "127.0.0.1"
    port: Annotated[int, Option("--port", help="Port; 0: any free one.")] = 8000
    max_batch: Annotated[int, Option("--max-batch", help="Most requests in one forward pass.")] = 8
    max_wait_ms: Annotated[float, Option("--max-wait-ms", help="Milliseconds that a request waits for others.")] = 2.0
    max_clients: Annotated[int, Option("--max-clients", help="Most connections at a time.")] = 16
    max_message_mib: Annotated[float, Option("--max-message-mib", help="Largest message in MiB.")] = 32.0
    execute: Annotated[
        int | None,
        Option(
            "--execute", help="Answer with one action at a time and replan after n of a chunk; default: whole chunks."
        ),
    ] = None
    fields: Annotated[
        tuple[str, ...],
        Option(
            "--field", help="Another name of a field, e.g. images/front=observation/image; may be given several times."
        ),
    ] = ()
    answer_timeout: Annotated[float, Option("--timeout", help="Seconds before a request is given up.")] = 30.0
    send_timeout: float = 10.0  # seconds after which a client that does not read is disconnected
    ping_interval: float = 20.0  # seconds between pings of a silent client, which has as long to answer

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"port {self.port}: must be 0 (any free one) to 65535")
        for name, least, most in (
            ("max_batch", 1, 4096),
            ("max_wait_ms", 0, 60_000),
            ("max_clients", 1, 65_536),
            ("max_message_mib", 1 / 1024, 2048),
            ("answer_timeout", 0.001, 86_400),
        ):
            if not least <= getattr(self, name) <= most:  # also where it is NaN
                raise UserError(f"{name.replace('_', ' ')} is {getattr(self, name)}; must be {least} to {most}")

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
    views: Annotated[int, Option("--views", help="With random weights: number of cameras; default 2.")] = 2
    steps: Annotated[int | None, SAMPLE_STEPS] = None
    batches: Annotated[
        tuple[int, ...],
        Option(
            "--batch-size",
            help="Observations per call; through the server: clients. May be given several times; default 1.",
        ),
    ] = (1,)
    camera: tuple[int, int] = (480, 640)  # H, W of its images
    warm_up: Annotated[int, Option("--warm-up", help="Untimed calls before the timed ones.")] = 5
    repeats: Annotated[int, Option("--repeats", help="Timed calls.")] = 50
    device: Annotated[str, DEVICE] = "auto"
    compile: Annotated[bool, COMPILE] = False
    server: Annotated[
        bool, Option("--server/--no-server", help="Also time round trips through a server on this machine.")
    ] = True

    def __post_init__(self) -> None:
        for name in ("views", "repeats", "warm_up"):
            if getattr(self, name) < (name != "warm_up"):
                raise UserError(
                    f"{name.replace('_', ' ')} is {getattr(self, name)}; must be at least {int(name != 'warm_up')}"
                )
        if not self.batches or min(self.batches) < 1 or min(self.camera) < 1:
            raise UserError("batch sizes and the sides of an image must be at least 1")
