"""`dvla serve`: a policy behind a WebSocket, and the client for it. Importing it needs websockets and msgpack."""

from ...errors import UserError

try:
    import msgpack  # noqa: F401
    import websockets  # noqa: F401
except ImportError:
    raise UserError("serving needs websockets and msgpack; install them with: pip install 'dvla[serve]'") from None
