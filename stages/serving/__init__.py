"""`dvla serve`: a policy behind a WebSocket, and the client for it."""
