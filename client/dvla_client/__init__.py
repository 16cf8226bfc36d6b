"""The robot's side of a dvla policy server: a client, a control loop, images on the wire, limits. Needs no torch."""

from __future__ import annotations

from .client import PolicyClient
from .errors import ClientError
from .limits import Limits
from .loop import ControlLoop, Report

__version__ = "0.1.0"  # that of dvla, which carries this package

__all__ = ["ClientError", "ControlLoop", "Limits", "PolicyClient", "Report", "__version__"]
