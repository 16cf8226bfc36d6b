"""Condition dropout: how often text, images and state give way to their null embeddings.

Imports no numpy before it draws: the command line's help is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ...common.config import SHARE, require_ranges

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ConditionDropout:
    """How often a condition gives way to its null embedding, for classifier-free guidance; each is drawn on its own.

    Null text and images are the cache's features of an empty instruction and of black frames; null proprio is zeros.
    """

    text: Annotated[float, SHARE] = 0.1  # probability
    images: Annotated[float, SHARE] = (
        0.1  # probability, all views of an observation together; 1.0 trains a blind policy
    )
    proprio: Annotated[float, SHARE] = 0.1  # probability

    def __post_init__(self) -> None:
        require_ranges(self)

    @property
    def always(self) -> ConditionDropout:
        """Of conditions that training always dropped alone: a policy never saw them, so it acts without them, too."""
        return ConditionDropout(float(self.text == 1), float(self.images == 1), float(self.proprio == 1))

    def draw(self, seed: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, images, proprio) bool [n]: what is dropped at these global positions."""
        from ...common.hashing import uniform

        p = (self.text, self.images, self.proprio)
        text, images, proprio = (uniform(seed, 4, stream, position) < p[stream] for stream in range(3))
        return text, images, proprio


NO_DROPOUT = ConditionDropout(0.0, 0.0, 0.0)
