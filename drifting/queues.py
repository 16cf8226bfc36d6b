"""Queues of earlier chunks as further positives and negatives of the drift: an ablation.

A queue of a task holds chunks of other observations of that task: its positives describe p(a | task), not p(a | o), and
the global queue p(a). Drifting towards them spreads each observation's actions over everything the experts do anywhere
in the task.

Letters: B observations, G noise samples, T action steps, K queues, Q chunks in a queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import UNIFIED_DIM, FeatureBatch
from ..errors import UserError
from .config import LossConfig

_MIX = -7046029254386353131  # 2^64 / golden ratio as a signed number: consecutive multiples of it look random


class Drawn(NamedTuple):
    """Expert and generated chunks [B,Q,T,128] and the weight [B,Q] of both, 1 where filled, else 0."""

    positives: Tensor
    negatives: Tensor
    weight: Tensor


class ChunkQueues:
    """First in, first out, Q chunks each: experts' as positives, generated ones as negatives.

    `config.queue` "task": one queue for each (embodiment, dataset, instruction); "global": one for each (embodiment,
    dataset), since chunks of different action spaces are never compared. `head_loss(queues=…)` draws, then pushes.
    Queues are made as tasks appear, Q · T kibibytes each. With several processes the caller pushes the chunks of all,
    so that each holds the same queues."""

    def __init__(self, config: LossConfig, horizon: int, device: torch.device | str = "cpu") -> None:
        if config.queue == "none":
            raise ValueError("LossConfig.queue is none: there is nothing to queue")
        self.by_task, self.size = config.queue == "task", config.queue_size
        self.horizon, self.device = horizon, torch.device(device)
        self._pushed: dict[tuple[int, ...], int] = {}  # chunks pushed so far, by queue
        self._chunks: dict[tuple[int, ...], Tensor] = {}  # [2,Q,T,128]: expert, generated

    @torch.no_grad()
    def draw(self, batch: FeatureBatch) -> Drawn:
        """Everything in each observation's queue."""
        keys, none = self._keys(batch), torch.zeros(2, self.size, self.horizon, UNIFIED_DIM, device=self.device)
        filled = torch.tensor([min(self._pushed.get(key, 0), self.size) for key in keys], device=self.device)  # [B]
        weight = (torch.arange(self.size, device=self.device) < filled[:, None]).float()  # [B,Q]
        positives, negatives = torch.stack([self._chunks.get(key, none) for key in keys], dim=1)  # [B,Q,T,128] each
        return Drawn(positives, negatives, weight)

    @torch.no_grad()
    def push(self, batch: FeatureBatch, pred: Tensor) -> None:
        """Put in each observation's expert chunk and the first of its generated ones, `pred` [B,G,T,128].

        Chunks that run past their episode's end are left out: other observations count steps that they do not have.
        """
        pairs = torch.stack([batch.action, pred[:, 0]], dim=1).to(self.device, torch.float32)  # [B,2,T,128]
        for key, pair, whole in zip(self._keys(batch), pairs, batch.step_mask.all(1).tolist()):
            if whole:
                count = self._pushed.get(key, 0)
                if not count:
                    self._chunks[key] = pair.new_zeros(2, self.size, *pair.shape[1:])
                self._chunks[key][:, count % self.size] = pair
                self._pushed[key] = count + 1

    def state_dict(self) -> dict[str, Tensor]:
        """keys [K,3] and pushed [K] int64, chunks [K,2,Q,T,128] float32 (expert, generated), on the CPU."""
        empty = torch.zeros(0, 2, self.size, self.horizon, UNIFIED_DIM)
        return {
            "keys": torch.tensor(list(self._pushed), dtype=torch.int64).reshape(-1, 3),
            "pushed": torch.tensor(list(self._pushed.values()), dtype=torch.int64),
            "chunks": torch.stack([self._chunks[key].cpu() for key in self._pushed]) if self._pushed else empty,
        }

    def state_form(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `state_dict` gives of as many queues as `found` has keys, on the meta device: names, shapes, types."""
        count = len(found["keys"]) if "keys" in found and found["keys"].ndim else 0
        with torch.device("meta"):
            keys, pushed = torch.empty(count, 3, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
            return {
                "keys": keys,
                "pushed": pushed,
                "chunks": torch.empty(count, 2, self.size, self.horizon, UNIFIED_DIM),
            }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`; `UserError` for queues of another form, or a key or count that no queue has."""
        for name, wanted in self.state_form(state).items():
            if (state[name].shape, state[name].dtype) != (wanted.shape, wanted.dtype):
                raise UserError(f"queues: {name} is {list(state[name].shape)}, expected {list(wanted.shape)}")
        keys = [tuple(key) for key in state["keys"].tolist()]
        if len(set(keys)) < len(keys) or not bool((state["pushed"] >= 1).all()):
            raise UserError("queues: a key is given twice, or a queue is empty")
        self._pushed = dict(zip(keys, state["pushed"].tolist()))
        self._chunks = {
            key: chunks.to(self.device, torch.float32, copy=True) for key, chunks in zip(keys, state["chunks"])
        }

    def _keys(self, batch: FeatureBatch) -> list[tuple[int, ...]]:
        instruction = instruction_id(batch) if self.by_task else torch.zeros_like(batch.dataset)
        return [tuple(key) for key in torch.stack([batch.embodiment, batch.dataset, instruction], dim=1).tolist()]


def instruction_id(batch: FeatureBatch) -> Tensor:
    """A number [B] int64 for each instruction, computed from the bits of its visible embeddings (rounded to fp16):
    equal for equal instructions, whatever the padding, the batch or the device, and almost surely different for
    different ones."""
    bits = batch.text.to(torch.float16).contiguous().view(torch.int16).to(torch.int64)  # [B,Lt,Dt]
    _, length, width = bits.shape
    factor = torch.arange(1, length * width + 1, device=bits.device) * _MIX  # wraps around 2^64, as do sums
    factor = (factor ^ (factor >> 29)) * _MIX  # [Lt·Dt]
    return ((bits + 1) * factor.reshape(length, width)).masked_fill(~batch.text_mask[..., None], 0).sum((1, 2))
