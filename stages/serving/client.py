"""`dvla.PolicyClient`: the client of `dvla_client`, whose errors are dvla's, too."""

from __future__ import annotations

from .wire import Refused  # first: it says what to install where websockets is missing

# isort: split
import dvla_client


class PolicyClient(dvla_client.PolicyClient):
    __doc__ = dvla_client.PolicyClient.__doc__
    error = Refused
