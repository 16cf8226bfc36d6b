"""A cache at an fsspec URL, read through a folder on this machine.

    LOCAL/<digest>/…        the files of one generation of one cache, under their names in it
    LOCAL/.locks/<n>        lets one process at a time download a file

Tables are downloaded when the cache is opened, a shard when it is first used: under a temporary name, compared with the
size and crc32c in the manifest, then renamed. So every file under a final name is complete, and any number of processes
and caches may share LOCAL. With a limit, the least recently opened shards are removed to make room for new ones; an
open one keeps its data until it is closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...common import hub
from ...common.documents import MOST_BYTES
from ...common.files import crc32c, file_crc32c, open_lock, write_file
from ...errors import UserError
from .locations import BLOCK, Folder, Url, creating, errors
from .manifest import MANIFEST, Files, has_size, parse_manifest

SMALL = 1 << 20  # bytes that are read at every opening
LOCKS = 256  # files that all processes together can download at the same time
TABLE_THREADS = 8
ATTEMPTS = 3  # object stores fail now and then
STALE = 3600.0  # seconds after which a temporary file belongs to a killed process


def is_remote(path: Path | str) -> bool:
    """Whether it is a URL rather than a folder."""
    return "://" in str(path) and not str(path).startswith("file://")


class Mirror:
    """Read-through copies in `local` of the cache at a URL. `limit` bounds the bytes of its shards there.

    `UserError` when there is no finished cache at `url`, and naming a file that cannot be downloaded or is damaged.
    """

    def __init__(self, url: str, local: Path | str, limit: int | None = None) -> None:
        self.place, self._limit = Url(url), limit
        data = fetch_manifest(self.place)
        self._files: Files = parse_manifest(data, url)["files"]
        self._local = Path(local).expanduser()
        self.folder = self._local / f"{crc32c(data):08x}{len(data):08x}"
        try:
            (self._local / ".locks").mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            if not _is_copy(self.folder / MANIFEST, {"bytes": len(data), "crc32c": crc32c(data)}):
                write_file(self.folder / MANIFEST, data)
        except OSError as error:
            raise UserError(
                f"cannot keep copies of {url} in {local}: {error.strerror}; choose another local folder"
            ) from None
        for left in self.folder.rglob(".*.tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()
        with ThreadPoolExecutor(TABLE_THREADS) as pool:
            list(pool.map(self._fetch, [name for name in self._files if not _is_shard(name)]))

    def ensure(self, path: Path) -> None:
        """Download the file `path` below `folder`, unless it exists."""
        self._fetch(path.relative_to(self.folder).as_posix())

    def _fetch(self, name: str) -> None:
        path = self.folder / name
        if name not in self._files:
            raise UserError(f"{self.place.where} does not list {name} in its manifest")
        if _is_copy(path, self._files[name]):
            return
        with self._lock(str(crc32c(name.encode()) % LOCKS)):
            if _is_copy(path, self._files[name]):  # downloaded by another process meanwhile
                return
            with errors("write", str(path)):
                path.parent.mkdir(parents=True, exist_ok=True)
            fetch_checked(self.place, name, self._files[name], path)
        if self._limit is not None and _is_shard(name):
            self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        with self._lock("room"):
            shards = []
            for path in self.folder.glob("*/*/*/c/**/*"):
                shard = ".tmp-" not in path.name and _is_shard(path.relative_to(self.folder).as_posix())
                with contextlib.suppress(OSError):
                    if shard and path.is_file():
                        found = path.stat()
                        shards.append((found.st_mtime_ns, found.st_size, path))
            over = sum(size for _, size, _ in shards) - (self._limit or 0)
            for _, size, path in sorted(shards):
                if over <= 0:
                    break
                if path != newest:
                    path.unlink(missing_ok=True)
                    over -= size

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """A lock of one thread of one process."""
        with errors("lock", str(path := self._local / ".locks" / name)):
            file = open_lock(path)
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def fetch_manifest(place: Url) -> bytes:
    """The bytes of the manifest at `place`. `UserError` where there is none."""
    try:
        with errors("read", place.url(MANIFEST)), _repository(place), place.open(MANIFEST) as file:
            data = file.read(MOST_BYTES + 1)
    except _NoRepository as error:
        raise UserError(f"no cache at {place.where}: {error}") from None
    except UserError as error:
        raise UserError(
            f"no finished cache at {place.where}: it has no {MANIFEST}, which is written last ({error})"
        ) from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{place.url(MANIFEST)} has more than {MOST_BYTES} bytes, which no manifest has")
    return bytes(data)


class _NoRepository(UserError):
    """A repository of the hub that cannot be read, so that nothing is known of its files."""


@contextlib.contextmanager
def _repository(place: Url) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's fsspec class makes a FileNotFoundError of what its client raises
        causes = [found for found in (error, error.__cause__) if found and place.where.startswith(hub.DATASETS)]
        if not (meant := next(filter(None, map(hub.meaning, causes)), "")):
            raise
        raise _NoRepository(meant) from None


def fetch_checked(place: Url, name: str, entry: Mapping[str, int], path: Path) -> None:
    """Copy one file of a cache to `path`, atomically. `UserError` unless it has the size and crc32c of `entry`."""
    for attempt in range(ATTEMPTS):
        try:
            return _copy(place, name, entry, path)
        except UserError:
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(0.2 * 4**attempt)


def _copy(place: Url, name: str, entry: Mapping[str, int], path: Path) -> None:
    url = place.url(name)
    with errors("read", url):
        source = place.open(name)
    with source, creating(Folder(str(path.parent)), path.name) as sink:
        while True:
            with errors("read", url):
                block = source.read(8 * BLOCK)
            if not block:
                break
            sink.write(block)
            if sink.nbytes > entry["bytes"]:  # it may go on for ever
                break
        if sink.nbytes != entry["bytes"] or sink.crc != entry["crc32c"]:
            raise UserError(
                f"{url} is damaged: {sink.nbytes} bytes with crc32c {sink.crc:08x}, {entry['bytes']} with "
                f"{entry['crc32c']:08x} were written; run `dvla cache verify` on the original, then push it again"
            )


def _is_copy(path: Path, entry: Mapping[str, int]) -> bool:
    """Whether a file was downloaded, and a small one or a document has not been changed since."""
    if not has_size(path, entry):
        return False
    if entry["bytes"] > SMALL and path.suffix != ".json":
        return True
    try:
        return file_crc32c(path) == (entry["bytes"], entry["crc32c"])
    except OSError:
        return False


def _is_shard(name: str) -> bool:
    """Whether a file is downloaded only when used: shards of features and of their scales."""
    parts = name.split("/")
    return len(parts) > 4 and parts[1] in ("features", "scales") and parts[3] == "c"
