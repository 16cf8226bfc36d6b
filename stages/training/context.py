"""What the training loop works on, and what a call of it reports: shared by stages two and three."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ...batch import FeatureBatch
from ...cache.loader.live import Images
from ...cache.loader.loader import Loader, Split
from ...cache.loader.sample import Draws, Sample
from ...cache.store.cache import Cache
from ...drifting.config import LossConfig
from ...drifting.policy_net import PolicyNet
from ...drifting.queues import ChunkQueues
from .config import TrainConfig
from .parallel.world import ALONE, World


class Features(Protocol):
    """A loader's batch → one with features: null ones where `no_images` [B] bool, else of the `variant` [B] int64;
    `images`: those that were decoded ahead."""

    def __call__(
        self,
        batch: FeatureBatch,
        no_images: np.ndarray | None = None,
        variant: np.ndarray | None = None,
        images: Images | None = None,
    ) -> FeatureBatch: ...


def cached_features(
    batch: FeatureBatch,
    no_images: np.ndarray | None = None,
    variant: np.ndarray | None = None,
    images: Images | None = None,
) -> FeatureBatch:
    """Stage two: the loader has read the features, or the null ones, already."""
    return batch


class SharedQueues(ChunkQueues):
    """Queues of the chunks of all processes, the same in each."""

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
    document: dict[str, Any]  # what policy.json holds
    features: Features = cached_features
    live: bool = False  # `features` computes them, so the loader skips them
    decode: Callable[[Draws], Images] | None = None  # images for `features`, by the loader's threads
    stage_three: dict[str, Any] | None = None  # settings besides `config` that must not change on resume
    save_adapter: Callable[[Path], None] | None = None
    # around features and loss of the sample at an offset
    learning: Callable[[int], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext()
    adapter: dict[str, torch.nn.Parameter] = field(default_factory=dict)  # trained VLM parameters by name
    first: dict[str, float] = field(default_factory=dict)  # further entries of the log's first line
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

    def batch(self, sample: Sample) -> FeatureBatch:
        """The sample's batch with features: the loader's own (stage two) or those of the live VLM (stage three)."""
        return self.features(sample.batch, sample.drawn.no_images, sample.drawn.variant, sample.ahead)

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
    eval_mse: float | None  # newest held-out MSE, normalized units
    samples_per_second: float  # observations of all processes, of this call
    wait_share: float  # share of the wall-clock spent waiting for the loader
    interrupted: bool  # stopped by a signal; rerun the same command to resume


def open_loader(session: Session, split: Split, start: int = 0, alone: bool = False) -> Loader:
    """This process's samples; `alone`: those it would have if there were no other.

    Only the training split has condition dropout and augmentation, and the mixture of datasets; the others have every
    observation equally often. What training always drops, and a blind policy's images, are dropped in all of them."""
    config, training = session.config, split == "train"
    dropout = config.masking if training else config.masking.always
    if config.blind:
        dropout = dataclasses.replace(dropout, images=1.0)
    return Loader(
        session.cache,
        batch_size=config.batch_size,
        horizon=session.net.config.dit.horizon,
        seed=config.seed,
        threads=config.threads,
        rank=0 if alone else session.world.rank,
        world_size=1 if alone else session.world.size,
        start=start,
        dropout=dropout,
        split=split,
        holdout=config.holdout,
        mixture_exponent=config.temperature if training else 1.0,
        weights=config.weights if training else {},
        features=not session.live,
        augment=config.image_aug and training,
        order=config.order if training else "global",
        device=session.world.device,
        history=config.history,
        proprio_history=config.proprio_history,
        ahead=session.decode,
    )
