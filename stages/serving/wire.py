"""Messages as bytes: the format is `dvla_client.wire`'s; here what it refuses is a `UserError`."""

from __future__ import annotations

from typing import Any

from ...common.packages import missing_package
from ...errors import UserError

try:
    import websockets  # noqa: F401  # server and client, which import this file first

    import dvla_client.wire
    from dvla_client import ClientError
except ImportError as error:
    raise missing_package(error.name or "websockets", "serving", "serve") from None


class Refused(UserError, ClientError):
    """A `UserError` that code for `dvla_client` catches, too."""


def pack(value: Any) -> bytes:
    """Maps, lists, text, numbers and NumPy arrays → bytes. `UserError` for anything else."""
    try:
        return dvla_client.wire.pack(value)
    except ClientError as error:
        raise Refused(str(error)) from None


def unpack(data: bytes) -> Any:
    """Inverse of `pack`; arrays are read-only. `UserError` for bytes that are not such a message."""
    try:
        return dvla_client.wire.unpack(data)
    except ClientError as error:
        raise Refused(str(error)) from None
