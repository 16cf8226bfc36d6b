"""Checksums of a finished cache's files against its manifest."""

from __future__ import annotations

from pathlib import Path

from ...common.files import file_crc32c
from ...common.progress import Count
from .manifest import Files, read_manifest


def verify_checksums(path: Path | str, progress: Count | None = None) -> list[str]:
    """Reread every file of a finished cache; one line per file that is missing, truncated or altered.

    `progress(done bytes, all bytes)` is called after each file. `UserError` as `Cache.open`.
    """
    problems = damaged_files(Path(path), read_manifest(Path(path))["files"], progress)
    return [f"{name}: {problem}" for name, problem in problems.items()]


def damaged_files(path: Path, files: Files, progress: Count | None = None) -> dict[str, str]:
    """Name → problem, of those of `files` that are not as they were written."""
    problems, done, total = {}, 0, sum(entry["bytes"] for entry in files.values())
    for name, entry in sorted(files.items()):
        try:
            nbytes, crc = file_crc32c(path / name)
        except OSError as error:
            problems[name] = f"cannot be read ({error.strerror})"
        else:
            if nbytes != entry["bytes"]:
                problems[name] = f"{nbytes} bytes, {entry['bytes']} were written"
            elif crc != entry["crc32c"]:
                problems[name] = f"altered (crc32c {crc:08x}, {entry['crc32c']:08x} was written)"
        done += entry["bytes"]
        if progress:
            progress(done, total)
    return problems
