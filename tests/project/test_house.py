"""The house stays one that can be walked through: the limits of files, functions and lines.

`python tests/project/measure_house.py [CHECKOUT …]` prints the numbers. Arrows, fences and circles: `test_imports.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.package_source import package_files
from support.repository import ROOT

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure_house import LONG, MOST_FILES, MOST_LINES, WIDE, crowds, functions, lines_of, tracked  # noqa: E402

FILES = tracked(ROOT)


def test_no_line_is_wide() -> None:
    """Strings and comments too, which the formatter cannot break."""
    wide = [
        f"{file.relative_to(ROOT)}:{number}: {len(line)} columns"
        for file in FILES
        for number, line in enumerate(lines_of(file), 1)
        if len(line) > WIDE
    ]
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize("part", ["package", "tests and benchmarks"])
def test_no_function_is_long(part: str) -> None:
    package = set(package_files(ROOT))
    found = [
        f"{file.relative_to(ROOT)}: {name} has {lines} lines"
        for file in FILES
        if (file in package) == (part == "package")
        for lines, name in functions(file)
        if lines > LONG
    ]
    assert not found, "\n".join(found)


def test_no_folder_is_a_crowd() -> None:
    assert not crowds(ROOT), f"more than {MOST_FILES} files in one folder"


def test_the_package_is_no_longer_than_it_was() -> None:
    """Formatted lines. What is added takes the place of something, or the limit is raised on purpose."""
    assert sum(len(lines_of(file)) for file in package_files(ROOT)) <= MOST_LINES
