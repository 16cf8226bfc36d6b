"""`dvla bench latency`: the time of an action, end to end, part by part, and through a policy server.

Letters: n observations of a call, V views, K tokens of an image, D feature width, Lt text tokens, T action steps, H, W
image size.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ...batch import UNIFIED_DIM, random_batch
from ...cache.actions.action_map import ActionMap, FieldSpec
from ...cache.actions.statistics import Statistics
from ...cache.vlm.load import load_encoder
from ...cache.vlm.spec import encoder_spec
from ...common.console import table
from ...common.device import pick_device
from ...common.progress import Progress
from ...drifting.config import LossConfig
from ...drifting.dit import dit_config
from ...drifting.heads import generate, sample_steps
from ...drifting.policy_net import PolicyNet, PolicyNetConfig
from ...errors import UserError
from ..policy.compile import compile_blocks
from ..policy.observation import Observation
from ..policy.policy import Policy
from ..policy.robot import RobotInterface
from ..policy.stopwatch import Stopwatch
from .config import LatencyConfig, ServeConfig

INSTRUCTION = "pick up the red cube and put it into the bowl"
WORDS = 16  # Lt without a tokenizer
TOKENS = 196  # K without a VLM: Qwen3-VL's of a 448 × 448 image
PERCENTILES = (50, 90, 99)
PATIENCE = 3600.0  # seconds for an answer: a full-size VLM on a CPU takes minutes
WHOLE, SERVED, NEW_TEXT = "total, Policy.act_batch", "through the server", "a new instruction's text"
NAMES = {  # marks → rows, in the order of the table; images of an encoder without `preprocessing` are one row
    "preprocessing": "images: preprocessing",
    "tower": "images: vision tower",
    "pictures": "images: the rest",
    "text": "text (cached)",
    "state": "state, batch",
    "dit": "DiT",
    "actions": "inverse map, units",
}


def measure(config: LatencyConfig, show: Progress = lambda name, done, total: None) -> dict[str, Any]:
    """Milliseconds of every part: {"policy", "device", …, "rows": [{"batch", "part", "p50", "p90", "p99"}]}."""
    device = pick_device(config.device)
    about = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiled": config.compile,
        "repeats": config.repeats,
    }
    if config.checkpoint is None and config.vlm_path is None:
        net = _random_net(config, PolicyNetConfig().feature_width, None, device)
        about |= _about(net, config.views, 1) | {
            "policy": f"{config.model_size} DiT alone, random weights; {config.views} × {TOKENS} image tokens"
        }
        return about | {"rows": [row for n in config.batches for row in _time_net(net, config, n, device, show)]}
    policy = _policy(config, device)
    about |= _about(policy.net, len(policy.robot.views), sample_steps(policy.loss)) | {
        "policy": config.checkpoint or f"{config.model_size} DiT with random weights behind {config.vlm_path}",
        "vlm": policy.encoder.spec.path,
        "dtype": str(policy.encoder.dtype).removeprefix("torch."),
        "picture": list(config.camera),
    }
    rows = [row for n in config.batches for row in _time_policy(policy, config, n, show)]
    if config.server:
        try:
            rows += _time_server(policy, config, show)
        except (UserError, OSError) as error:  # what was measured is shown all the same
            about["server_failed"] = str(error)
    return about | {"rows": rows}


def latency_table(report: dict[str, Any]) -> Table:
    """One row per batch size and part."""
    rows = [
        (row["part"], str(row["batch"]), *(f"{row[f'p{p}']:.2f}" for p in PERCENTILES))
        for row in sorted(report["rows"], key=lambda row: row["batch"])
    ]
    return table(("part, ms", "batch", *(f"p{p}" for p in PERCENTILES)), rows)


def _about(net: PolicyNet, views: int, passes: int) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "views": views,
        "horizon": net.config.dit.horizon,
        "passes": passes,
    }


def _random_net(config: LatencyConfig, width: int, text_width: int | None, device: torch.device) -> PolicyNet:
    torch.manual_seed(0)
    net = PolicyNet(
        PolicyNetConfig(
            feature_width=width,
            text_width=text_width,
            dit=dit_config(config.model_size),
            max_views=max(8, config.views),
        )
    )
    if config.compile:
        compile_blocks(net)
    return net.to(device).eval()


def _policy(config: LatencyConfig, device: torch.device) -> Policy:
    if config.checkpoint is not None:
        policy = Policy.from_pretrained(
            config.checkpoint, dataset=config.dataset, device=device, vlm_path=config.vlm_path, steps=config.steps
        )
        if config.compile:
            compile_blocks(policy.net)
        return policy
    encoder = load_encoder(encoder_spec(config.vlm, path=config.vlm_path), device)
    joints = ActionMap(
        [FieldSpec(field=f"right_arm_joint_{i}_pos") for i in range(7)] + [FieldSpec(field="right_gripper_open")], 20.0
    ).to_dict()
    mean, std, low, high = (np.full(UNIFIED_DIM, x) for x in (0.0, 1.0, -1.0, 1.0))
    flat = Statistics(mean, std, low, high, count=1).to_dict()
    robot = RobotInterface(
        {
            "name": "random",
            "views": [f"view {i}" for i in range(config.views)],
            "environment": None,
            "starts": [],
            "embodiment": 0,
            "control_hz": 20.0,
            "action_map": joints,
            "state_map": joints,
            "action_stats": flat,
            "proprio_stats": flat,
        }
    )
    text_width = None if encoder.text_width == encoder.width else encoder.text_width
    return Policy(_random_net(config, encoder.width, text_width, device), encoder, robot)


def _observations(policy: Policy, config: LatencyConfig, n: int) -> list[Observation]:
    rng, state = np.random.default_rng(0), policy.robot.state_map.to_native(np.zeros(UNIFIED_DIM))
    return [
        Observation(
            {view: rng.integers(0, 255, (*config.camera, 3), np.uint8) for view in policy.robot.views},
            INSTRUCTION,
            state,
        )
        for _ in range(n)
    ]


def _repeated(config: LatencyConfig, name: str, show: Progress) -> Iterator[bool]:
    """Whether each call counts: those of the warm-up do not."""
    total = config.warm_up + config.repeats
    for i in range(total):
        yield i >= config.warm_up
        show(name, i + 1, total)


def _rows(n: int, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"batch": n, "part": part, **{f"p{p}": float(np.percentile(values, p)) * 1e3 for p in PERCENTILES}}
        for part, values in seconds.items()
    ]


@torch.inference_mode()
def _time_net(
    net: PolicyNet, config: LatencyConfig, n: int, device: torch.device, show: Progress
) -> list[dict[str, Any]]:
    """The DiT's part of an action only: `PolicyNet.encode` and the forward pass, on random features."""
    c = net.config
    batch = random_batch(n, config.views, TOKENS, c.feature_width, c.dit.horizon, WORDS, torch.float32).to(device)
    noise, alpha = torch.randn(n, 1, c.dit.horizon, c.dit.noise_dim, device=device), torch.ones(n, device=device)
    seconds: list[float] = []
    for counts in _repeated(config, f"DiT, batch {n}", show):
        watch = Stopwatch(device)
        generate(net, net.encode(batch), noise, alpha, LossConfig())
        watch.mark("dit")
        if counts:
            seconds.append(watch.seconds()["dit"])
    return _rows(n, {NAMES["dit"]: seconds})


def _time_policy(policy: Policy, config: LatencyConfig, n: int, show: Progress) -> list[dict[str, Any]]:
    """Every part of `Policy.act_batch`, their total, and the time that a new instruction adds."""
    device, seen = policy.encoder.device, _observations(policy, config, n)
    seconds: dict[str, list[float]] = {}
    for counts in _repeated(config, f"policy, batch {n}", show):
        began, watch = time.perf_counter(), Stopwatch(device)
        with _marking_tower(policy, watch):
            policy.act_batch(seen, watch.mark)
        took = time.perf_counter() - began
        parts = watch.seconds()
        began = time.perf_counter()
        policy.encoder.encode_text([INSTRUCTION] * n)[0].cpu()
        new_text = time.perf_counter() - began
        if counts:
            for name, label in NAMES.items():
                if name in parts:
                    label = "images" if name == "pictures" and "tower" not in parts else label
                    seconds.setdefault(label, []).append(parts[name])
            seconds.setdefault(WHOLE, []).append(took)
            seconds.setdefault(NEW_TEXT, []).append(new_text)
    return _rows(n, seconds)


@contextlib.contextmanager
def _marking_tower(policy: Policy, watch: Stopwatch) -> Iterator[None]:
    """Mark the encoder's forward pass, before which preprocessing ends; encoders of entire observations have none."""
    hooks = [
        policy.encoder.register_forward_pre_hook(lambda *_: watch.mark("preprocessing")),
        policy.encoder.register_forward_hook(lambda *_: watch.mark("tower")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _time_server(policy: Policy, config: LatencyConfig, show: Progress) -> list[dict[str, Any]]:
    """Round trips of `PolicyClient.infer` on this machine; n clients, each sending its next request once answered."""
    from .client import PolicyClient
    from .server import PolicyServer, in_background

    server = PolicyServer(
        policy,
        ServeConfig(
            port=0,
            max_batch=max(config.batches),
            max_clients=max(config.batches),
            max_message_mib=1024.0,
            answer_timeout=PATIENCE,
        ),
    )
    server.warm_up()

    def client(seen: Observation, name: str, shown: Progress) -> list[float]:
        seconds = []
        with PolicyClient(port=port, timeout=PATIENCE) as connection:
            for counts in _repeated(config, name, shown):
                began = time.perf_counter()
                connection.infer({"images": seen.images, "state": seen.state, "prompt": seen.instruction})
                if counts:
                    seconds.append(time.perf_counter() - began)
        return seconds

    rows = []
    with in_background(server) as port, ThreadPoolExecutor(max(config.batches)) as pool:
        for n in config.batches:
            shown = [show, *[lambda *_: None] * (n - 1)]  # one progress bar, of the first client
            each = pool.map(client, _observations(policy, config, n), [f"server, {n} clients"] * n, shown)
            rows += _rows(n, {SERVED: [one for seconds in each for one in seconds]})
    return rows
