"""What the training loop works on, and what a call of it reports: shared by stages two and three."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ...batch import FeatureBatch
from ...cache.loader.loader import Loader
from ...cache.loader.masking import ConditionMasking
from ...cache.store.cache import Cache
from ...drifting.config import LossConfig
from ...drifting.policy_net import PolicyNet
from ...drifting.queues import ChunkQueues
from .config import TrainConfig
from .parallel.world import ALONE, World


class Features(Protocol):
    """Turns a loader's batch into one with features: `masked` [B] bool says whose pictures are hidden, `variant` [B] int64 which
    augmented variant of them is seen."""

    def __call__(self, batch: FeatureBatch, masked: np.ndarray, variant: np.ndarray) -> FeatureBatch: ...


def cached_features(batch: FeatureBatch, masked: np.ndarray, variant: np.ndarray) -> FeatureBatch:
    """Stage two: the loader has put the features, or the null ones, in already."""
    return batch


class SharedQueues(ChunkQueues):
    """Queues of the chunks of all processes, the same in each: those that one process with the whole batch would fill."""

    def __init__(self, config: LossConfig, horizon: int, world: World) -> None:
        super().__init__(config, horizon, world.device)
        self.world = world

    def push(self, batch: FeatureBatch, pred: torch.Tensor) -> None:
        """Put in the batches of all processes, by rank. Every process must."""
        read = ("text", "text_mask", "action", "step_mask", "embodiment", "dataset")  # by `ChunkQueues`
        batch = dataclasses.replace(batch, **{name: self.world.join_batches(getattr(batch, name)) for name in read})
        super().push(batch, self.world.join_batches(pred.detach()[:, :1]))


@dataclass
class Session:
    """What the loop works on. Built by `train` and by `finetune`."""

    config: TrainConfig
    cache: Cache
    net: PolicyNet
    documents: dict[str, Any]  # policy.json's content
    features: Features = cached_features
    live: bool = False  # `features` computes them, so the loader skips them
    stage_three: dict[str, Any] | None = None  # settings besides `config` that must not change on resume
    save_adapter: Callable[[Path], None] | None = None
    learning: Callable[[int], contextlib.AbstractContextManager[None]] = lambda _: (
        contextlib.nullcontext()
    )  # around features and step of the batch at a position
    adapter: dict[str, torch.nn.Parameter] = field(default_factory=dict)  # trained VLM parameters by name
    first: dict[str, float] = field(default_factory=dict)  # what the log's first line says besides
    on_log: Callable[[dict[str, Any]], None] = lambda _: None
    say: Callable[[str], None] = print
    world: World = ALONE
    queues: ChunkQueues | None = field(init=False, default=None)  # where the loss wants them

    def __post_init__(self) -> None:
        if self.config.loss.queue != "none":
            self.queues = SharedQueues(self.config.loss, self.net.config.dit.horizon, self.world)
        if not self.world.main:
            self.on_log = lambda _: None
            self.say = lambda _: None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All trained parameters by their name in a checkpoint."""
        return {**dict(self.net.named_parameters()), **{f"adapter.{n}": p for n, p in self.adapter.items()}}


@dataclass
class TrainReport:
    """What a call of the loop did."""

    run: Path
    step: int  # steps of the run so far
    first_loss: float | None  # total loss of the run's first step
    loss: float | None  # total loss of the run's newest step
    eval_mse: float | None  # newest held-out MSE, normalised units
    samples_per_second: float  # observations of all processes, of this call
    wait_share: float  # share of the wall-clock spent waiting for the loader
    interrupted: bool  # stopped by a signal; run the same command again to go on


def open_loader(
    session: Session, split: Literal["train", "eval", "all"], start: int = 0, alone: bool = False
) -> Loader:
    """This process's batches; `alone`: those it would have if there were no other. Held-out ones, and those of "all" episodes, are not masked,
    except that a blind policy stays blind, not augmented, and each dataset comes as often as it is large."""
    config, training = session.config, split == "train"
    masking = config.masking if training else ConditionMasking(0.0, 0.0, 0.0)
    if config.blind:
        masking = dataclasses.replace(masking, images=1.0)
    return Loader(
        session.cache,
        batch_size=config.batch_size,
        horizon=session.net.config.dit.horizon,
        seed=config.seed,
        threads=config.threads,
        rank=0 if alone else session.world.rank,
        world_size=1 if alone else session.world.size,
        start=start,
        masking=masking,
        split=split,
        holdout=config.holdout,
        temperature=config.temperature if training else 1.0,
        weights=config.weights if training else {},
        features=not session.live,
        augment=config.image_aug and training,
        order=config.order if training else "global",
        device=session.world.device,
    )
