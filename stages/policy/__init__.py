"""A trained policy: checkpoint, loading, inference, export, hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .policy import Policy

__all__ = ["Policy"]


def __getattr__(name: str) -> Any:
    """`from dvla.stages.policy import Policy` is in earlier model cards. Other files of this room load without it."""
    if name == "Policy":
        from .policy import Policy

        return Policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
