"""Where exported files are: a local folder or any fsspec URL. (Pipes are in webdataset/tars.py.)"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ...common.documents import MOST_BYTES, open_regular
from ...common.files import crc32c, hold, publish, temporary_name
from ...common.text import public
from ...errors import UserError

BLOCK = 1 << 20  # bytes copied at a time
PATIENCE = 60.0  # seconds
OBJECT_STORES = {"s3", "gs", "abfs", "oss"}  # their folders are names only; making one would create a missing bucket
T = TypeVar("T")


class Place:
    """Named files somewhere. Use `creating` and `fetch`, which turn whatever a place raises into `UserError`."""

    where: str  # as the user gave it
    resumable = True  # whether existing files can be listed

    def url(self, name: str) -> str:
        """The file's name in messages."""
        return f"{self.where}/{name}"

    def begin(self, name: str) -> Any:
        """A binary file to write."""
        raise NotImplementedError

    def end(self, name: str, file: Any) -> None:
        """Close it and make it visible."""
        file.close()

    def drop(self, name: str, file: Any) -> None:
        """Close it and discard it, as far as the place can."""
        raise NotImplementedError

    def open(self, name: str) -> Any:
        """A binary file to read from its beginning."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """The existing files."""
        return []

    def size(self, name: str) -> int | None:
        """Bytes, or None when it does not exist."""
        return None

    def remove(self, name: str) -> None:
        """Delete one file."""
        raise NotImplementedError

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Be the only writer, where the place has locks."""
        return contextlib.nullcontext()


class Folder(Place):
    """A local folder. Files appear atomically."""

    def __init__(self, where: str) -> None:
        self.where, self.path = where, Path(where.removeprefix("file://")).expanduser()

    def url(self, name: str) -> str:
        return str(self.path / name)

    def begin(self, name: str) -> Any:
        return open(temporary_name(self.path / name), "wb", buffering=BLOCK)

    def end(self, name: str, file: Any) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        publish(temporary_name(self.path / name), self.path / name)

    def drop(self, name: str, file: Any) -> None:
        temporary_name(self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk, which has no space for the buffer either
            file.close()

    def open(self, name: str) -> Any:
        return open(open_regular(self.path / name), "rb")

    def names(self) -> list[str]:
        return os.listdir(self.path)

    def size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.exists() else None

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and be its only writer; temporary files of a killed writer are removed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; choose another --out") from None
        try:
            hold(handle, f"another process is writing to {self.path}")
            for left in self.path.glob(".*.tmp-*"):
                left.unlink()
            yield
        finally:
            os.close(handle)


class Url(Place):
    """A folder or prefix of an fsspec file system. Objects of object stores appear when they are closed.

    A server that does not answer for `PATIENCE` seconds is given up. Messages show the address without passwords.
    """

    def __init__(self, where: str) -> None:
        import fsspec

        self.where = public(where.rstrip("/"))
        try:
            self._fs, self._path = fsspec.core.url_to_fs(where.rstrip("/"))
        except Exception as error:  # unknown scheme, missing package, no credentials: whatever the package raises
            raise UserError(
                f"{self.where}: {_reason(error)}; give a folder, an fsspec URL whose package is installed "
                "(s3fs for s3://, gcsfs for gs://), or pipe:COMMAND with {name}"
            ) from None
        protocol = self._fs.protocol
        self._has_folders = OBJECT_STORES.isdisjoint({protocol} if isinstance(protocol, str) else protocol)
        logger = logging.getLogger(type(self._fs).__module__.partition(".")[0])
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())  # gcsfs logs what it raises with its traceback

    def begin(self, name: str) -> Any:
        path = f"{self._path}/{name}"
        if self._has_folders:
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        return self._fs.open(path, "wb")

    def drop(self, name: str, file: Any) -> None:
        with contextlib.suppress(Exception):  # of the package; the error that led here is the one to report
            file.discard()
            with contextlib.suppress(AttributeError):  # memory://
                file.closed = True  # or it would be flushed once more when it is collected

    def open(self, name: str) -> Any:
        return _Patient(self._within(lambda: self._fs.open(f"{self._path}/{name}", "rb")), self)

    def names(self) -> list[str]:
        self._fs.invalidate_cache()
        with errors("list", self.where):
            found = self._within(lambda: self._fs.ls(self._path, detail=False) if self._fs.isdir(self._path) else [])
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def size(self, name: str) -> int | None:
        path = f"{self._path}/{name}"
        with errors("look up", self.url(name)):
            return self._within(lambda: self._fs.size(path) if self._fs.exists(path) else None)

    def _within(self, call: Callable[[], T]) -> T:
        """`call()`; `UserError` when that takes longer than `PATIENCE`. A stalled one stays behind in its thread."""
        outcome: list[tuple[bool, Any]] = []

        def work() -> None:
            try:
                outcome.append((True, call()))
            except BaseException as error:  # raised again in the thread that waits
                outcome.append((False, error))

        thread = threading.Thread(target=work, daemon=True, name="dvla-url")
        thread.start()
        thread.join(PATIENCE)
        if not outcome:
            raise UserError(f"{self.where} has not answered for {PATIENCE:g} s; check the network, then rerun")
        done, value = outcome[0]
        if not done and isinstance(value, Exception) and not isinstance(value, (UserError, OSError)):
            raise UserError(f"{self.where}: {_reason(value)}; check its name and your credentials") from value
        if not done:
            raise value
        return value

    def remove(self, name: str) -> None:
        # not rm(): s3fs has it delete lists of objects, which needs a header that some servers miss (Content-MD5)
        with errors("delete", self.url(name)):
            self._within(lambda: self._fs.rm_file(f"{self._path}/{name}"))


class _Patient(contextlib.AbstractContextManager[Any]):
    """A remote file whose reads do not wait for ever."""

    def __init__(self, file: Any, place: Url) -> None:
        self._file, self._place = file, place

    def read(self, size: int = -1) -> bytes:
        return self._place._within(lambda: self._file.read(size))

    def __exit__(self, *exc: object) -> None:
        self._file.close()


class Sink:
    """A file being written, with its size and crc32c so far; errors of the place become `UserError`."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url, self._closed = file, url, False
        self.nbytes = self.crc = 0

    def write(self, data: bytes) -> int:
        if self._closed:  # tarfile flushes once more when dropped after an error
            return len(data)
        with errors("write", self._url):
            self._file.write(data)
        self.nbytes, self.crc = self.nbytes + len(data), crc32c(bytes(data), self.crc)
        return len(data)

    def close(self) -> None:
        """Ignore later writes."""
        self._closed = True


@contextlib.contextmanager
def creating(place: Place, name: str) -> Iterator[Sink]:
    """Write one file, which becomes visible when the block succeeds."""
    url = place.url(name)
    with errors("write", url):
        file = place.begin(name)
    sink = Sink(file, url)
    try:
        yield sink
    except BaseException:
        sink.close()
        place.drop(name, file)
        raise
    with errors("write", url):
        place.end(name, file)


def fetch(
    place: Place, name: str, scratch: Path, missing: str | None = None, most: int = MOST_BYTES
) -> tuple[BinaryIO, int, int | None]:
    """(seekable file, nbytes, crc32c or None) of a local file, or of an unnamed copy of a remote one in `scratch`.

    `most`: the largest size in bytes; a remote one may go on for ever.
    `missing`: the message of the error when it cannot be read.
    """
    try:
        with errors("read", place.url(name)):
            file = place.open(name)
            if isinstance(place, Folder):
                return file, os.fstat(file.fileno()).st_size, None
            nbytes = crc = 0
            copy = tempfile.TemporaryFile(dir=scratch)
            with file:
                while block := file.read(BLOCK):
                    copy.write(block)
                    nbytes, crc = nbytes + len(block), crc32c(block, crc)
                    if nbytes > most:
                        raise UserError(f"{place.url(name)} has more than the {most} bytes that are expected")
            copy.flush()
            copy.seek(0)
            return copy, nbytes, crc
    except UserError as error:
        raise (UserError(f"{missing} ({error})") if missing else error) from None


@contextlib.contextmanager
def errors(verb: str, url: str) -> Iterator[None]:
    """Turn whatever a place raises into a `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, and each fsspec package has its own
        remedy = (
            "; check your credentials, and that they may list the bucket"
            if isinstance(error, PermissionError) and "://" in url
            else ""
        )
        reason = _reason(error)
        if isinstance(error, FileNotFoundError) and url.endswith(reason):
            reason = "it does not exist"
        raise UserError(f"cannot {verb} {url}: {reason}{remedy}") from None


def _reason(error: Exception) -> str:
    if failed := re.search(r"\): exit (-?\d+) \((?:read|write)\)", str(error)):  # as WebDataset reports a pipe
        return f"the command ended with exit code {failed[1]}"
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
