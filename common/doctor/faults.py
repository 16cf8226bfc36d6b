"""How a command ends: what it raised as one line and an exit code; the traceback of a fault is kept for a report."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from ...errors import UserError
from ..console import errors
from ..text import first_line, printable, public

INTERRUPTED, REFUSED, FAULT = 130, 2, 70  # exit codes; 70: EX_SOFTWARE, since 1 is what `verify` or `diff` found
VARIABLE = "DVLA_TRACEBACK"  # set: the traceback of a fault is printed, as Python does
PREFIX = "dvla-fault-"  # of files in the temporary folder
REMEDIES = {
    errno.ENOSPC: "free some space, then rerun",
    errno.EDQUOT: "free some space, then rerun",
    errno.EFBIG: "raise the limit of one file's size (`ulimit -f`), then rerun",
    errno.EROFS: "choose another folder",
    errno.EACCES: "change its permissions, or choose another",
    errno.EPERM: "change its permissions, or choose another",
    errno.EISDIR: "give a file",
    errno.EEXIST: "remove it, or choose another",
    errno.ENOTDIR: "a part of its path is a file; choose another",
    errno.ELOOP: "links point at each other; choose another",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.EMFILE: "raise the limit of open files (`ulimit -n 4096`), or use fewer workers",
    errno.ENFILE: "close other programs, or use fewer workers",
    errno.ENOMEM: "close other programs, or use fewer workers or a smaller batch",
    errno.EIO: "check the disk or the network",
}


def ended(work: Callable[[], None]) -> int:
    """The exit code of a command: 0, or after one line on standard error that of what `work` raised."""
    try:
        os.getcwd()  # where it was removed, libraries end the process in their own words
        work()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        _tell("interrupted; rerun the same command to resume", "yellow")
        return INTERRUPTED
    except BrokenPipeError:  # whatever read the output has enough, as `head` does
        return 128 + 13
    except UserError as error:
        _tell(f"error: {public(str(error))}")
        return REFUSED
    except OSError as error:  # of the output
        _tell(f"error: {explained(error)}")
        return REFUSED
    except Exception as error:
        if os.environ.get(VARIABLE):
            raise
        _tell(f"error: {_fault(error)}")
        return FAULT
    finally:
        _release_output()


def explained(error: Exception) -> str | None:
    """What a machine refused, in words, and what to do; None for any other error."""
    said = printable(public(first_line(error)))[:200]
    if isinstance(error, MemoryError) or any(x in str(error) for x in ("allocate memory", "out of memory")):
        return f"not enough memory ({said[:80]}); use a smaller batch or fewer workers, or close other programs"
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of a library in Rust
        error = OSError(int(found[1]), os.strerror(int(found[1])))
    if not isinstance(error, OSError):
        return None
    remedy = REMEDIES.get(error.errno or 0, "")
    if error.errno == errno.ENOENT and error.filename is None:
        remedy = "the working directory was removed: change to another"
    what = error.strerror or said
    if isinstance(error.filename, (str, bytes, os.PathLike)):
        what = f"{public(os.fsdecode(error.filename))}: {what}"
    return f"{what}; {remedy}" if remedy else what


def _fault(error: Exception) -> str:
    """The line for an error that nobody foresaw, after its traceback was kept."""
    what = f"unexpected {type(error).__name__}: {printable(public(first_line(error)))[:120]}"
    text = f"dvla {public(' '.join(sys.argv[1:]))}\n\n{public(''.join(traceback.format_exception(error)))}"
    try:
        handle, name = tempfile.mkstemp(".txt", PREFIX)
        with open(handle, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError as reason:
        return f"{what}; its traceback cannot be kept ({first_line(reason)}): set {VARIABLE}=1 to see it"
    return f"{what}; please report it with `dvla doctor --report`, which takes {name} in"


def last_fault() -> Path | None:
    """The newest kept traceback of this user."""
    with contextlib.suppress(OSError):
        found = [
            path for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*.txt") if path.stat().st_uid == os.getuid()
        ]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    return None


def _tell(line: str, style: str = "red") -> None:
    """A line on standard error, which may be closed or full."""
    with contextlib.suppress(OSError, MemoryError):
        errors.print(line, style=style, markup=False)


def _release_output() -> None:
    """Nothing is raised at exit where standard output is closed or full: what is left of it goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
