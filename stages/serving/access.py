"""Who may ask: the token, and which interfaces need one. A token comes from the environment or a file, where `ps` does not show it."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from ...errors import UserError

TOKEN_VARIABLE = "DVLA_TOKEN"
SHORTEST = 16  # characters of a token
SCHEME = "Api-Key"  # of the Authorization header, as openpi's client sends it


def read_token(file: Path | None) -> str | None:
    """The token in `file`, or in the environment; None where there is neither. `UserError` for one that is too short or not one word."""
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        try:
            token, where = file.read_text().strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the token in {file}: {getattr(error, 'strerror', None) or 'it is not text'}"
            ) from None
    if not re.fullmatch(r"[!-~]+", token) or len(token) < SHORTEST:  # what is wrong is not shown: it may be the token
        raise UserError(
            f"the token in {where} must be one word of at least {SHORTEST} ASCII characters; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """(family, address) of the interfaces that `host` names, IPv4 first. `UserError` where it names none."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"host '{host}' is no interface of this machine: {getattr(error, 'strerror', None) or error}"
        ) from None
    return sorted({(family, address) for family, _, _, _, address in found}, key=lambda f: f[0] != socket.AF_INET)


def require_token(host: str, port: int, token: str | None) -> None:
    """`UserError` where others than this machine could ask, and there is no token."""
    if token is None and not all(
        ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in addresses(host, port)
    ):
        raise UserError(
            f"host '{host}' can be reached by other machines: a token is needed, in the environment variable {TOKEN_VARIABLE} or "
            "in a file (--token-file); or leave out --host, and only this machine can ask"
        )


def allowed(headers: Iterable[str], token: str | None) -> bool:
    """Whether one of the request's Authorization headers holds the token. The comparison takes as long wherever they differ."""
    if token is None:
        return True
    wanted = f"{SCHEME} {token}".encode()
    return any([hmac.compare_digest(header.encode("utf-8", "surrogateescape"), wanted) for header in headers])
