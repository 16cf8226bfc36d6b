"""Condition dropout: how often text, images and state are replaced by their nulls. Imports no numpy before it draws: the command line's help is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ConditionMasking:
    """How often a condition is replaced by its null, for classifier-free guidance; each drawn on its own.

    Null text and images are the cache's features of an empty instruction and of black frames; null proprio is zeros.
    """

    text: float = 0.1  # probability
    images: float = 0.1  # probability, all views of a sample together; 1.0 trains a blind policy
    proprio: float = 0.1  # probability

    def __post_init__(self) -> None:
        for name in ("text", "images", "proprio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"condition masking of {name} is {getattr(self, name)}; a probability lies in 0…1")

    def draw(self, seed: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, images, proprio) bool [n]: what is masked at these global sample positions."""
        from ...common.hashing import uniform

        p = (self.text, self.images, self.proprio)
        text, images, proprio = (uniform(seed, 4, stream, position) < p[stream] for stream in range(3))
        return text, images, proprio
