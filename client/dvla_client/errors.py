"""The one exception of this package."""

from __future__ import annotations


class ClientError(Exception):
    """What a user can mend; the message is one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.split())[:1000])
