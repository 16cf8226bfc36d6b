"""What LeRobot imports to know dvla's policies: its commands look for installed distributions `lerobot_policy_…`."""

from __future__ import annotations

import sys
from types import TracebackType

from dvla.errors import UserError
from dvla.stages.policy.lerobot import DvlaConfig, DvlaPolicy, make_dvla_pre_post_processors

__all__ = ["DvlaConfig", "DvlaPolicy", "make_dvla_pre_post_processors"]

_before = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a user can mend is one line here as in dvla's own commands, not a traceback of LeRobot's."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        _before(kind, error, trace)


sys.excepthook = _one_line
