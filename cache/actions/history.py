"""What a policy sees of its episode besides the current frame and state: earlier ones, at fixed offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from annotated_types import Interval

from ...common.config import require
from ...common.documents import shown
from ...errors import UserError

MOST = 8  # frames, or states, that the network can tell apart: `PolicyNetConfig.max_frames`
OFFSET = Interval(ge=-10_000, le=0)  # frames
ALONE = (0,)


@dataclass(frozen=True)
class History:
    """Offsets in frames from the current one: 0, and then falling ones."""

    frames: tuple[int, ...] = ALONE  # H, of the images
    proprio: tuple[int, ...] = ALONE  # of the state; those besides 0 are the Hp past ones

    def __post_init__(self) -> None:
        for name, offsets in (("history", self.frames), ("proprio_history", self.proprio)):
            require(name, offsets, OFFSET)
            if (
                offsets[:1] != ALONE
                or len(offsets) > MOST
                or any(later <= earlier for later, earlier in pairwise(offsets))
            ):
                raise UserError(
                    f"{name} is {_listed(offsets)}; give at most {MOST} offsets in frames that begin with 0 and fall, "
                    f"as in --{name.replace('_', '-')} 0,-4,-8"
                )

    def __bool__(self) -> bool:
        """Whether it reaches back at all."""
        return self.depth > 0

    @property
    def depth(self) -> int:
        """Frames that it reaches back."""
        return -min(*self.frames, *self.proprio)

    @property
    def states(self) -> tuple[int, ...]:
        """Offsets of the past states."""
        return self.proprio[1:]

    def to_document(self) -> dict[str, list[int]]:
        """What policy.json says of it: nothing where it does not reach back."""
        both = {"history": self.frames, "proprio_history": self.proprio}
        return {name: list(offsets) for name, offsets in both.items() if offsets != ALONE}


NO_HISTORY = History()


def history_of(document: Mapping[str, Any]) -> History:
    """What `History.to_document` gave; earlier releases know the current frame only."""
    return History(*(tuple(document.get(name, ALONE)) for name in ("history", "proprio_history")))


def parse_offsets(given: Any, name: str) -> Any:
    """`"0,-4"` → [0, -4], as a command line or a recipe gives them; a list stays as it is."""
    if not isinstance(given, (str, int)):
        return given
    try:
        return [int(word) for word in str(given).split(",")]
    except ValueError:
        raise UserError(f"{name} is {shown(given)}; give offsets in frames, as in 0,-4,-8") from None


def _listed(offsets: tuple[int, ...]) -> str:
    return ",".join(map(str, offsets[: MOST + 1])) + "…" * (len(offsets) > MOST + 1) or "empty"
