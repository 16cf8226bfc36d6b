"""What can be removed beside a cache: earlier generations and leftovers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ....cache.store.manifest import is_finished, read_fingerprint
from ....cache.store.shard_reader import unread
from ....common.files import lock_folder
from ....errors import UserError
from ..generations import generations, next_generation
from .status import TEMPORARY

IN_USE = "earlier generation in use"


@dataclass(frozen=True)
class Garbage:
    """Something in or beside a cache that it does not need."""

    path: Path
    kind: (
        str  # earlier generation, the same in use (which stays), unfinished generation, temporary file, pilot's folder
    )
    bytes: int
    frees: int  # bytes that no file outside the list shares (hard links)

    @property
    def stays(self) -> bool:
        """Whether a training or another reader still needs it."""
        return self.kind == IN_USE


def garbage(path: Path) -> list[Garbage]:
    """What `gc` may remove, never the current generation. `UserError` when there is no cache, or half an exchange."""
    following = next_generation(path)
    if not path.exists() and is_finished(following):
        raise UserError(
            f"rerun the same `dvla cache build` first: {path} was interrupted while it took in its next generation"
        )
    read_fingerprint(path)
    found = []
    for folder in generations(path):
        with unread(folder) as free:
            found.append((folder, "earlier generation" if free else IN_USE))
    found += [(following, "unfinished generation")] if following.exists() else []
    found += [(p, "temporary file") for p in sorted(path.rglob(TEMPORARY))]
    found += [(p, "pilot's folder") for p in sorted(path.parent.glob(f".{path.name}.pilot-*"))]
    files = {
        p: [f.lstat() for f in ([p] if not p.is_dir() else p.rglob("*")) if not f.is_dir() or f.is_symlink()]
        for p, _ in found
    }
    seen = Counter((e.st_dev, e.st_ino) for entries in files.values() for e in entries)
    out = []
    counted: set[tuple[int, int]] = set()
    for p, kind in found:
        alone = {(e.st_dev, e.st_ino): e.st_size for e in files[p] if seen[e.st_dev, e.st_ino] >= e.st_nlink}
        frees = sum(n for key, n in alone.items() if key not in counted)
        out.append(Garbage(p, kind, sum(e.st_size for e in files[p]), 0 if kind == IN_USE else frees))
        counted |= alone.keys()
    return out


@contextmanager
def no_builder(path: Path) -> Iterator[None]:
    """Hold the locks of a cache and of its next generation, so that none can start; `UserError` while one runs."""
    with ExitStack() as stack:
        for folder in (path, next_generation(path)):
            if folder.is_dir():
                stack.enter_context(lock_folder(folder))
        yield


def require_no_builder(path: Path) -> None:
    """`UserError` while a builder of the cache or of its next generation runs."""
    with no_builder(path):
        pass


def remove(path: Path, items: Sequence[Garbage]) -> int:
    """Delete what `garbage` listed, but what is in use; returns the bytes freed. `UserError` while a builder runs."""
    freed = 0
    with no_builder(path):
        for item in items:
            try:
                freed += item.frees if _removed(item.path) else 0
            except OSError as error:
                raise UserError(f"cannot remove {item.path}: {error.strerror}") from None
    return freed


def _removed(path: Path) -> bool:
    """Remove a file, or a directory that nobody reads."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return True
    with unread(path) as free:
        if free:
            shutil.rmtree(path)
        return free
