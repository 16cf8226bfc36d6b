"""What a file can make a reader raise, as the one thing that it costs: an episode, or one line about the dataset.

With `DVLA_DEBUG=1` in the environment, what was not foreseen is raised as it is, to see where it comes from.
"""

from __future__ import annotations

import contextlib
import errno
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ...common.text import first_line
from ...errors import Kind, UserError
from .episode import CorruptEpisode, View

# Of the machine, not of a file: they end the command, since the next episode would be lost to them, too.
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)
_OURS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)  # rather a fault of the reader
_PACKAGE = Path(__file__).parents[2]
_MOST = 160  # characters of an error's message


@contextlib.contextmanager
def one_episode(where: str, root: Path | None = None) -> Iterator[None]:
    """Any error in the block is a `CorruptEpisode` whose message begins with `where`.

    `UserError`, which ends the command: for errors of the machine (no file handles, no space, a network that is
    away), and when the dataset's folder or file `root` is gone.
    """
    try:
        with np.errstate(all="ignore"):  # what values are allowed is checked, in words
            yield
    except UserError:
        raise
    except Exception as error:
        if os.environ.get("DVLA_DEBUG") and not isinstance(error, CorruptEpisode):
            raise
        _require_machine(error, where)
        if root is not None and not _is_here(root):
            raise UserError(f"{root} is no longer there; rerun the same command when it is") from None
        if isinstance(error, CorruptEpisode):
            raise
        kind: Kind = "unexpected-error" if isinstance(error, _OURS) else "unreadable-file"
        raise CorruptEpisode(f"{where}: {described(error)}", kind) from error


@contextlib.contextmanager
def whole_dataset(given: object) -> Iterator[None]:
    """Any error in the block is a `UserError` about the dataset `given`."""
    try:
        yield
    except UserError:
        raise
    except CorruptEpisode as error:
        raise UserError(str(error)) from None
    except Exception as error:
        if os.environ.get("DVLA_DEBUG"):
            raise
        _require_machine(error, str(given))
        raise UserError(f"{given} cannot be read: {described(error)}") from error


def described(error: Exception) -> str:
    """Type, first line, and the place in this package where it was raised: what a report of it needs."""
    text, kind = first_line(error)[:_MOST], type(error).__name__.removeprefix("_Array")
    places = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    ours = [f" ({file.relative_to(_PACKAGE)}:{line})" for file, line in places if file.is_relative_to(_PACKAGE)]
    at = "".join(ours[-1:])
    named = f"{kind}{at}" if text == type(error).__name__ else f"{kind}: {text}{at}"
    return f"unexpected {named}; please report it" if isinstance(error, _OURS) else named


def guarded_frames(
    open: Callable[[int, int], Iterator[np.ndarray]], view: View, where: str, root: Path, start: int, stop: int
) -> Iterator[np.ndarray]:
    """Yield the frames start..stop-1 of `open`, all of the size of `view`; else, and for any error, raise as
    `one_episode` does, naming the view and the frame."""
    size, index = (view.height, view.width, 3), start
    try:  # around the loop, for thousands of frames pass a second
        frames = open(start, stop)
        while index < stop:
            frame = next(frames, None)
            if frame is None:
                raise CorruptEpisode(f"{where}: view '{view.name}', frame {index} is missing", "row-count")
            if frame.shape != size:
                found = f"frame {index} is {list(frame.shape)}, expected {list(size)}"
                raise CorruptEpisode(f"{where}: view '{view.name}', {found}", "unreadable-file")
            yield frame
            index += 1
    except Exception as error:
        with one_episode(f"{where}: view '{view.name}', frame {index}", root):
            raise error


def _require_machine(error: BaseException | None, where: str) -> None:
    """`UserError` when the error, or one that it was raised for, is the machine's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise UserError(f"{where}: {first_line(error)}; rerun the same command when the machine is well") from None
        error = error.__cause__ or error.__context__


def _is_here(root: Path) -> bool:
    """Whether there is a file, or something in a folder: a mount point stays when what was mounted goes."""
    try:
        return root.is_file() or next(os.scandir(root), None) is not None
    except OSError:
        return False
