"""dvla: cache a frozen VLM once, train a one-step Drifting DiT from the cache, then bring the VLM back with LoRA.

Importing the package is cheap: each of these names loads its module, and torch with it, when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import FeatureBatch
    from .cache.loader.loader import Loader
    from .cache.store.cache import Cache
    from .stages.policy.policy import Policy
    from .stages.serving.client import PolicyClient

__version__ = "0.1.0"

__all__ = ["Cache", "FeatureBatch", "Loader", "Policy", "PolicyClient", "__version__"]

_MODULES = {
    "Cache": "cache.store.cache",
    "FeatureBatch": "batch",
    "Loader": "cache.loader.loader",
    "Policy": "stages.policy.policy",
    "PolicyClient": "stages.serving.client",
}


if not TYPE_CHECKING:  # which would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
