"""What a training step keeps in memory: weights, gradients, AdamW's state, the average, and what the backward pass needs.

Letters: B observations.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ....cache.loader.loader import gather
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....common.text import size
from ..context import Session
from ..step import noise_generator, training_step


class SavedTensors:
    """Counts what autograd keeps from the forward pass for the backward pass, without the parameters themselves."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.nbytes, self._seen = 0, {storage(p) for p in parameters}

    def count(self, x: torch.Tensor) -> torch.Tensor:
        """Of what autograd saves; gives it back as it is."""
        if storage(x) not in self._seen:
            self._seen.add(storage(x))
            self.nbytes += x.untyped_storage().nbytes()
        return x


def storage(x: torch.Tensor) -> int:
    """Which memory a tensor lies in; views of one tensor share it."""
    return x.untyped_storage().data_ptr()


def nbytes(x: torch.Tensor) -> int:
    """Of this process's part of a tensor."""
    x = x.to_local() if hasattr(x, "to_local") else x
    return x.numel() * x.element_size()


def live_memory(session: Session, encoder: VisionLanguageEncoder, ids: np.ndarray, rows: np.ndarray) -> str:
    """A line on the memory of a stage-three step, before the first: weights of policy and VLM, then what only trained parts have.

    Activations are those that a forward pass keeps, counted on one and on two of the samples (`ids`, `rows` [≥2] int64) and continued to
    the batch; of a block that is computed again in the backward pass only its input is kept.
    """
    trained = session.parameters().values()
    own, vlm = (sum(nbytes(p) for p in module.parameters()) for module in (session.net, encoder))
    learnt = sum(map(nbytes, trained))
    one, two = (_activations(session, encoder, ids[:n], rows[:n]) for n in (1, 2))
    kept = one + (two - one) * (session.config.batch_size - 1)
    parts = {"weights": own + vlm, "gradients": learnt, "AdamW": 2 * learnt, "EMA": learnt, "activations about": kept}
    return (
        f"Memory: {size(sum(parts.values()))} ({', '.join(f'{name} {size(value)}' for name, value in parts.items())}); of the weights "
        f"{size(vlm)} are the VLM's, and {size(learnt)} are trained"
    )


def _activations(session: Session, encoder: VisionLanguageEncoder, ids: np.ndarray, rows: np.ndarray) -> int:
    """Bytes that the forward pass of these samples keeps."""
    horizon, device, none = session.net.config.dit.horizon, session.world.device, np.zeros(len(rows), np.int64)
    kept = SavedTensors([*session.net.parameters(), *encoder.parameters()])
    given = gather(session.cache, ids, rows, horizon, features=not session.live).to(device)
    with torch.autograd.graph.saved_tensors_hooks(kept.count, lambda x: x):
        result = training_step(
            session.net,
            session.features(given, none.astype(bool), none),
            session.config,
            noise_generator(session.config.seed, 0, 2),
        )
    del result
    return kept.nbytes
