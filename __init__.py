"""dvla: cache a frozen VLM once, train a one-step Drifting DiT from the cache, then bring the VLM back with LoRA.

Importing the package is cheap; torch and the rest load when a submodule is imported.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
