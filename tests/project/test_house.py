"""The house stays one that can be walked through: its limits.

`python tests/project/measure_house.py [CHECKOUT …]` prints the numbers. Arrows, fences and circles: `test_imports.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from support.repository import ROOT

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure_house import MOST_FILES, crowds  # noqa: E402


def test_no_folder_is_a_crowd() -> None:
    assert not crowds(ROOT), f"more than {MOST_FILES} files in one folder"
