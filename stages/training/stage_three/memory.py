"""What a training step keeps in memory: weights, gradients, AdamW's state, EMA, and what the backward pass needs.

Letters: B observations.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ....cache.loader.loader import gather
from ....cache.vlm.encoder import VisionLanguageEncoder
from ....common.text import size, wrapped
from ..context import Session
from ..step import batch_loss, noise_generator, unqueued


class SavedTensors:
    """Counts the bytes that autograd keeps for the backward pass, without the parameters themselves."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.nbytes, self._seen = 0, {storage(p) for p in parameters}

    def count(self, x: torch.Tensor) -> torch.Tensor:
        """A hook for `saved_tensors_hooks`; returns the tensor's values, outside the graph: a saved output that leads
        back to the function that saved it would keep the whole graph alive."""
        if storage(x) not in self._seen:
            self._seen.add(storage(x))
            self.nbytes += x.untyped_storage().nbytes()
        return x.detach()


def storage(x: torch.Tensor) -> int:
    """The address of a tensor's memory; views of one tensor share it."""
    return x.untyped_storage().data_ptr()


def nbytes(x: torch.Tensor) -> int:
    """Of this process's part of a tensor."""
    x = x.to_local() if hasattr(x, "to_local") else x
    return x.numel() * x.element_size()


def live_memory(session: Session, encoder: VisionLanguageEncoder, ids: np.ndarray, rows: np.ndarray) -> str:
    """A line on the memory of a stage-three step: weights of policy and VLM, then what only trained parts have.

    Activations are those that a forward pass keeps, counted on one and on two of the samples (`ids`, `rows` [≥2] int64)
    and extrapolated to the batch; of a block that is recomputed in the backward pass only the input is kept.
    """
    own, vlm = (sum(nbytes(p) for p in module.parameters()) for module in (session.net, encoder))
    trained = sum(map(nbytes, session.parameters().values()))
    one, two = (_activations(session, encoder, ids[:n], rows[:n]) for n in (1, 2))
    kept = one + (two - one) * (session.config.batch_size - 1)
    parts = {
        "weights": own + vlm,
        "gradients": trained,
        "AdamW": 2 * trained,
        "EMA": trained,
        "activations about": kept,
    }
    listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    return wrapped(
        f"Memory: {size(sum(parts.values()))} ({listed}); of the weights {size(vlm)} are the VLM's, "
        f"and {size(trained)} are trained"
    ).lstrip()


def _activations(session: Session, encoder: VisionLanguageEncoder, ids: np.ndarray, rows: np.ndarray) -> int:
    """Bytes that the forward pass of these samples keeps."""
    kept = SavedTensors([*session.net.parameters(), *encoder.parameters()])
    horizon, history = session.net.config.dit.horizon, session.config.past
    given = gather(session.cache, ids, rows, horizon, features=not session.live, history=history)
    with torch.autograd.graph.saved_tensors_hooks(kept.count, lambda x: x):
        batch = session.features(given.to(session.world.device))
        result = batch_loss(session.net, batch, unqueued(session.config), noise_generator(session.config.seed, 0, 2))
    del result
    return kept.nbytes
