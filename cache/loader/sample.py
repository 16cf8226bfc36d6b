"""What the loader gives: a batch, what was drawn for it, and where it lies in the run. Letters: B observations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...batch import FeatureBatch


@dataclass(frozen=True)
class Draws:
    """What is drawn for the observations of a batch, [B] each."""

    dataset: np.ndarray  # int64, index into the cache's datasets
    row: np.ndarray  # int64, frame on the dataset's time axis
    no_text: np.ndarray  # bool: condition dropout, the null embedding takes the place of this condition
    no_images: np.ndarray  # bool
    no_proprio: np.ndarray  # bool
    variant: np.ndarray  # int64: augmented variant of the images, 0 = the images themselves

    def __getitem__(self, where: np.ndarray | slice) -> Draws:
        return Draws(*(getattr(self, name)[where] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Sample:
    """One batch of a `Loader`: what the model sees, what was drawn for it, and where a run resumes after it.

    Offsets count observations over the whole run and all ranks: ranks share the `offset` of a global batch.
    """

    batch: FeatureBatch  # B observations of this rank
    drawn: Draws  # [B] each, already applied to `batch` (without features: except to the images)
    offset: int  # of the first observation of the global batch
    next_offset: int  # of the first one after it: a checkpoint stores it, and `Loader(start=…)` resumes there exactly
    ahead: Any = None  # what `Loader(ahead=…)` has made of `drawn`
