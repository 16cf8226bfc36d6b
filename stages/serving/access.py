"""Access to a server: its address, the token, and which addresses need one.

A token comes from the environment or a file, where `ps` does not show it.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from ...common.documents import read_file
from ...errors import UserError

TOKEN_VARIABLE = "DVLA_TOKEN"
SHORTEST = 16  # characters of a token
SCHEME = "Api-Key"  # of the Authorization header, as openpi's client sends it


def read_token(file: Path | None) -> str | None:
    """The token in `file`, else in the environment, else None. `UserError` if it is too short or not one word."""
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        try:
            token, where = read_file(file, most=2**16).decode().strip(), str(file)
        except UnicodeDecodeError:
            raise UserError(f"cannot read {file}: the token in it is not text") from None
    if not re.fullmatch(r"[!-~]+", token) or len(token) < SHORTEST:  # the value is not shown: it may be the token
        raise UserError(
            f"the token in {where} must be one word of at least {SHORTEST} ASCII characters; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """(family, address) of the interfaces that `host` names, IPv4 first. `UserError` if it names none."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"host '{host}' is not an interface of this machine: {reason}") from None
    return sorted({(family, address) for family, _, _, _, address in found}, key=lambda f: f[0] != socket.AF_INET)


def require_token(host: str, port: int, token: str | None) -> None:
    """`UserError` if other machines can connect and there is no token."""
    if token is None and not all(
        ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in addresses(host, port)
    ):
        raise UserError(
            f"set {TOKEN_VARIABLE} or --token-file: other machines can reach host '{host}', so clients must send a "
            "token; or leave out --host, and only this machine can connect"
        )


def listen(host: str, port: int, token: str | None = None) -> socket.socket:
    """A socket with its port, to be opened before the long work: it accepts no connections yet.

    `UserError` when the port is taken, or where other machines can connect and there is no token.
    """
    require_token(host, port, token)
    family, address = addresses(host, port)[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another --port (0: any free one) "
            "or --host"
        ) from None
    return sock


def names_this_machine(header: str | None, host: str) -> bool:
    """Whether a request's Host header names this server: by an address, as localhost, or by the `host` it was started
    with. Any other name may be a web page's own that its owner has pointed at this machine (DNS rebinding)."""
    name = re.sub(r":\d*$", "", header or "").strip("[]").lower().rstrip(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == host.lower() or name == "localhost" or name.endswith(".localhost")
    return True


def allowed(headers: Iterable[str], token: str | None) -> bool:
    """Whether one of the request's Authorization headers holds the token, compared in constant time."""
    if token is None:
        return True
    wanted = f"{SCHEME} {token}".encode()
    return any([hmac.compare_digest(header.encode("utf-8", "surrogateescape"), wanted) for header in headers])
