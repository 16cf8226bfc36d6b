"""Sizes, durations and first lines as text, and back."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

from ..errors import UserError

# Control characters but tab and newline, marks that reorder text, halves of surrogate pairs: names and texts of files
# may hold them, and a terminal obeys them or cannot print them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# Of an address in a text: scheme, then what is no user, password or query.
_URL = re.compile(r"(\w[\w+.-]*://)(?:[^/\s'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\",;)]+)?")


def printable(text: str) -> str:
    """The text with "\N{REPLACEMENT CHARACTER}" for each character that a terminal would obey or refuse.

    >>> printable("a\\x1b[2Jb")
    'a\N{REPLACEMENT CHARACTER}[2Jb'
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def markdown(text: str) -> str:
    r"""Text of a file as one line of plain words in Markdown, where it could otherwise be a link, HTML or a section.

    >>> markdown("MIT | <b>\n# [x](y)")
    'MIT \\| \\<b\\> # \\[x\\](y)'
    """
    return re.sub(r"([\\`\[\]<>|])", r"\\\1", " ".join(printable(text).split()))


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type where that is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def slurm_errors(text: str) -> str:
    """What Slurm's commands report as errors in their output, on one line; empty where they report none.

    >>> slurm_errors("sbatch: error: invalid partition specified: a\\nsbatch: error: Batch job submission failed")
    'invalid partition specified: a; Batch job submission failed'
    """
    return "; ".join(re.findall(r"(?m)^s\w+: (?:error|fatal): (.+?)\.?\s*$", text))


def wrapped(text: str, indent: str = "  ", width: int = 80) -> str:
    """The text in indented lines of at most `width` columns, broken between words."""
    wrapper = textwrap.TextWrapper(width, indent, indent, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text)


def duration(seconds: float) -> str:
    """Readable text for a number of seconds."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def size(nbytes: int) -> str:
    """Readable text for a number of bytes."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}"


def in_megabytes(show: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    """Progress in bytes (done, total) as `show(name, done, total)` in MB."""
    return lambda done, total: show(f"{name}: MB", done // 10**6, total // 10**6)


UNITS = {"": 1, "B": 1}
UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Bytes of "1GiB", "500 MB" or "65536"; `UserError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS or float(found[1]) * UNITS[found[2].upper()] < 1:
        raise UserError(
            f"'{text}' is not a size; give a number of bytes, or add KiB, MiB, GiB, TiB, KB, MB, GB or TB, as in 1GiB"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def public(value: Any) -> Any:
    """`value` without the possible secrets of a URL: `s3://key:password@host/a?token=x` → `s3://host/a`."""
    if isinstance(value, dict):
        return {k: public(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(v) for v in value]
    return _URL.sub(r"\1\2", value) if isinstance(value, str) and "://" in value else value
