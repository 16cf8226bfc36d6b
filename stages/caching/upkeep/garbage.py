"""What can be removed beside a cache: earlier generations and leftovers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ....cache.store.manifest import is_finished, read_fingerprint
from ....common.files import lock_folder
from ....errors import UserError
from ..generations import generations, next_generation
from .status import TEMPORARY


@dataclass(frozen=True)
class Garbage:
    """Something in or beside a cache that it does not need."""

    path: Path
    kind: str  # earlier generation, unfinished generation, temporary file, pilot's folder
    bytes: int
    frees: int  # bytes that no file outside the list shares (hard links)


def garbage(path: Path) -> list[Garbage]:
    """What `gc` may remove, never the current generation. `UserError` when there is no cache, or half an exchange."""
    following = next_generation(path)
    if not path.exists() and is_finished(following):
        raise UserError(
            f"rerun the same `dvla cache build` first: {path} was interrupted while it took in its next generation"
        )
    read_fingerprint(path)
    found = [(p, "earlier generation") for p in generations(path)]
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
        out.append(Garbage(p, kind, sum(e.st_size for e in files[p]), frees))
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
    """Delete what `garbage` listed; returns the bytes freed. `UserError` while a builder runs."""
    with no_builder(path):
        for item in items:
            try:
                if item.path.is_dir() and not item.path.is_symlink():
                    shutil.rmtree(item.path)
                else:
                    item.path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {item.path}: {error.strerror}") from None
    return sum(item.frees for item in items)
