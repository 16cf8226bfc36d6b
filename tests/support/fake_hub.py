"""A Hugging Face hub on this machine that holds dataset repositories: as much of its API as reading files takes.

A command line that reads from it runs in a process of its own, with `environment(hub)`: the hub's client looks at its
variables once, when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

SHA = "0123456789abcdef0123456789abcdef01234567"
GATED = "me/gated"  # whose files are listed, and given to nobody


class Hub(ThreadingHTTPServer):
    """Repositories are folders; `read` are the files that were asked for."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories, self.read = repositories, set[str]()


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _send(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        found = re.fullmatch(r"(?:/api)?/datasets/([\w.-]+/[\w.-]+)(?:/(\w[\w-]*))?(?:/([^/]+))?(?:/(.*))?", path)
        repo, verb, revision, name = found.groups() if found else ("", "", "", "")
        root = self.server.repositories.get(repo)
        if root is None:
            return self._send(401, X_Error_Code="RepoNotFound")
        if revision not in (None, "main", "v1", SHA):
            return self._send(404, X_Error_Code="RevisionNotFound")
        if verb == "resolve":
            return self._send(403, X_Error_Code="GatedRepo") if repo == GATED else self._file(root, name)
        if verb == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self._json([self._entry(root, one) for one in asked if (root / one).exists()])
        if verb == "tree":
            folder = root / (name or "")
            entries = [self._entry(root, p.relative_to(root).as_posix()) for p in sorted(folder.iterdir())]
            return self._json(entries)
        return self._json({"id": repo, "sha": SHA, "private": False, "siblings": [], "tags": [], "downloads": 0})

    def _entry(self, root: Path, name: str) -> dict[str, Any]:
        file = root / name
        if file.is_dir():
            return {"type": "directory", "oid": SHA, "size": 0, "path": name}
        return {"type": "file", "oid": SHA, "size": file.stat().st_size, "path": name}

    def _file(self, root: Path, name: str) -> None:
        if not (root / name).is_file():
            return self._send(404, X_Error_Code="EntryNotFound")
        self.server.read.add(name)
        data, status = (root / name).read_bytes(), 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            data, status = data[int(found[1]) : int(found[2]) + 1 if found[2] else None], 206
        self._send(status, data, ETag=f'"{SHA}"')

    do_GET = do_HEAD = do_POST = _answer  # noqa: N815


@contextmanager
def hub(**repositories: Path) -> Iterator[Hub]:
    """A hub of "me/<name>" repositories."""
    server = Hub({f"me/{name}": folder for name, folder in repositories.items()})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def environment(server: Hub, home: Path) -> dict[str, str]:
    """Variables of a process that reads from `server`, without a token; its caches are in `home`."""
    own = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    address = f"http://127.0.0.1:{server.server_port}"
    return own | {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home), "COLUMNS": "500"}
