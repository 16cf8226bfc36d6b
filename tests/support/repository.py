"""Where the repository is, and the versions that its tests run with."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ("constraints.txt", "constraints-py312.txt")  # Python 3.11; 3.12 and 3.13


def pins(file: str = CONSTRAINTS[sys.version_info >= (3, 12)]) -> dict[str, str]:
    """Version of each package in a file of constraints, that of this Python by default."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE))
