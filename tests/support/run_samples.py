"""A run with one checkpoint of random weights, made without training, and observations for its robot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvla.cache.actions.action_map import ActionMap, FieldSpec
from dvla.cache.actions.history import NO_HISTORY, History
from dvla.cache.actions.statistics import RunningStatistics
from dvla.cache.readers.search import load_config
from dvla.cache.vlm.adapter import save_adapter, tower_parameters
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, lora_parameters
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec
from dvla.drifting.dit import dit_config
from dvla.drifting.heads import head_dit
from dvla.drifting.policy_net import PolicyNet, PolicyNetConfig
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.document import FORMATS
from dvla.stages.simulation.envs import Observation
from support import vlm_samples

TINY = dataclasses.replace(vlm_samples.TINY, vision_depth=2)
VIEWS = ("front", "wrist")
# Settings of a training of four steps, without evaluation or panels.
FOUR_STEPS: dict[str, Any] = {
    "model_size": "tiny",
    "dit": {"width": 16, "blocks": 1, "heads": 2, "horizon": 4},
    "steps": 4,
    "batch_size": 4,
    "draws": 2,
    "holdout": 0.3,
    "threads": 1,
    "cpu_threads": 1,
    "device": "cpu",
    "eval_every": 0,
    "log_every": 1,
    "panels": {"every": 0},
}


# Of a training of four steps with evaluation and several checkpoints.
EVALUATED: dict[str, Any] = {
    "model_size": "tiny",
    "dit": {"width": 32, "blocks": 1, "heads": 2, "horizon": 4},
    "steps": 4,
    "batch_size": 4,
    "draws": 2,
    "holdout": 0.3,
    "eval_every": 2,
    "eval_batches": 2,
    "save_every": 2,
    "log_every": 1,
    "threads": 1,
    "device": "cpu",
    "optimizer": {"lr": 1e-3, "warmup": 2},
}


def make_document(
    datasets: list[dict[str, Any]],
    net: PolicyNetConfig | None = None,
    encoder: dict[str, Any] | None = None,
    kind: str = "hybrid",
    blind: bool = False,
    history: History = NO_HISTORY,
) -> dict[str, Any]:
    """policy.json."""
    return {
        "format": FORMATS[-1 if history else 0],
        "net": dataclasses.asdict(net or PolicyNetConfig()),
        "encoder": encoder or {"spec": {"path": "vlm"}, "fingerprint": {}},
        "datasets": datasets,
        "loss": {"kind": kind, "sample_steps": 0},
        "conditions": {"blind": blind, "masking": {}, "alpha_max": 1.0},
        **history.to_document(),
    }


def make_robot() -> dict[str, Any]:
    """A dataset of the policy's document: two views, three action dimensions."""
    actions = ActionMap(
        [FieldSpec(field="right_eef_pos_x"), FieldSpec(field="right_eef_pos_y"), FieldSpec(field="right_gripper_open")],
        20.0,
    )
    statistics = RunningStatistics()
    statistics.update(np.random.default_rng(0).normal(0, 0.3, (50, 128)).astype(np.float32))
    stats = statistics.result().to_dict()
    return {
        "name": "toy",
        "views": list(VIEWS),
        "action_map": actions.to_dict(),
        "state_map": actions.to_dict(),
        "action_stats": stats,
        "proprio_stats": stats,
        "environment": None,
        "starts": [],
        "embodiment": 1,
        "control_hz": 20.0,
        "license": "mit",
        "dataset_config": "toy",
    }


def so101() -> dict[str, object]:
    """A dataset of an SO-101 arm with two cameras, as its config describes it."""
    config, rng = load_config("so100"), np.random.default_rng(0)
    fields, joints = ActionMap(config.action, 30.0), rng.uniform(-60, 60, (50, 6))
    statistics = RunningStatistics()
    statistics.update(fields.to_unified(joints))
    stats, described = statistics.result().to_dict(), fields.to_dict()
    return {
        **make_robot(),
        **{"name": "pick", "action_map": described, "state_map": described, "control_hz": 30.0},
        **{"action_stats": stats, "proprio_stats": stats, "view_sizes": {view: [48, 64] for view in VIEWS}},
        "source": "someone/pick",
    }


def make_run(
    run: Path,
    vlm: Path,
    arch: str = "qwen3vl",
    lora: LoraSpec | None = None,
    blind: bool = False,
    kind: str = "hybrid",
    tower: bool = False,
    below: tuple[str, ...] = (),
    robot: dict[str, object] | None = None,
    history: History = NO_HISTORY,
    resolution: int | None = None,
) -> Path:
    """A run with one checkpoint whose raw weights are not the averaged ones, on an encoder with the adapters `below`.

    With LoRA, or with a vision tower that was trained as a whole (`tower`).
    """
    resolution = resolution or {"qwen3vl": 64, "paligemma2": 56}[arch]
    encoder = load_encoder(EncoderSpec(str(vlm), vlm=arch, resolution=resolution, dtype="float32", adapters=below))
    fingerprint, spec = encoder.fingerprint(), dataclasses.asdict(encoder.spec)
    torch.manual_seed(0)
    dit = head_dit(dit_config("tiny", width=32, blocks=2, heads=2, horizon=4), kind)
    net = PolicyNet(PolicyNetConfig(feature_width=encoder.width, dit=dit, past_states=len(history.states)))
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = dict(net.state_dict())
    encoded = {"spec": spec, "fingerprint": fingerprint}
    document = make_document([robot or make_robot()], net.config, encoded, kind, blind, history)
    if lora is not None:
        add_lora(encoder, lora)
        for name, parameter in lora_parameters(encoder):
            parameter.data += 0.2 * torch.randn_like(parameter)
            tensors[f"adapter.{name}"] = parameter.data
    if tower:
        for _, parameter in tower_parameters(encoder):
            parameter.data += 0.02 * torch.randn_like(parameter)
    raw = {name: tensor + 1 for name, tensor in tensors.items()}
    ck.save_checkpoint(
        run,
        7,
        {"model": raw, "ema": tensors, "optimizer": {"exp_avg/x": torch.ones(3)}},
        {"policy": document, "state": {"step": 7, "metrics": {"mse": 0.5}, "offset": 28}},
        1,
        (lambda folder: save_adapter(encoder, folder)) if lora or tower else None,
    )
    return run


def observations(count: int = 3) -> list[Observation]:
    rng = np.random.default_rng(3)
    return [
        Observation(
            {view: rng.integers(0, 255, (70, 90, 3), np.uint8) for view in VIEWS},
            ("push the puck", "", "open the drawer")[i % 3],
            rng.normal(0, 0.3, 3).astype(np.float32),
            step=i,
        )
        for i in range(count)
    ]
