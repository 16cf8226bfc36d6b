"""Licenses of all that the two sets of versions install: those of docs/licenses.md, permissive or with a reason.

`make licenses` runs this file and rewrites the page from the metadata of what is installed; rows of packages that only
the other set, or another extra, installs stay.
"""

from __future__ import annotations

import re
import sys
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `make licenses` runs it as a script
from support.repository import CONSTRAINTS, ROOT, pins

PAGE = ROOT / "docs" / "licenses.md"
ALLOWED = {"0BSD", "Apache-2.0", "BSD", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Zlib"}
ALLOWED |= {"MPL-2.0"}  # not permissive, but for changed files alone
NVIDIA = "CUDA libraries of torch's wheels: redistribution under NVIDIA's terms; a CPU build of torch needs none"
EXCEPTIONS = {  # neither, by name: why it may be a dependency all the same
    "pynput": "loaded by lerobot for its keyboard control, never by dvla; a library that can be replaced",
    "qpsolvers": "loaded by mink, robosuite's inverse kinematics, never by dvla; a library that can be replaced",
    "python-xlib": "loaded by pynput, as above",
    "pyyaml-include": "loaded by draccus 0.10, lerobot 0.4.4's reader of configs, never by dvla; not in today's set",
}
BUNDLED = {  # what the metadata of a wheel does not say of the libraries inside
    "av": "FFmpeg (LGPL-3.0) with libx264 and libx265 (GPL-2.0-or-later)",
    "imageio-ffmpeg": "an ffmpeg program (GPL)",
    "opencv-python": "FFmpeg and Qt 5 (LGPL)",
    "opencv-python-headless": "FFmpeg (LGPL)",
    "numpy, scipy": "OpenBLAS (BSD), libgfortran (GPL-3.0 with the runtime exception)",
    "mani-skill": "assets it downloads are CC BY-NC 4.0",
}
WORDS = {  # that licenses are known by where SPDX does not name them; of two that fit, the first
    r"apache": "Apache-2.0",
    r"lgplv3|lesser general public license v3": "LGPL-3.0",
    r"lgpl|lesser general": "LGPL-2.1",
    r"gpl|general public": "GPL-3.0",
    r"mpl|mozilla": "MPL-2.0",
    r"psf|python software foundation": "PSF-2.0",
    r"nvidia|proprietary": "proprietary",
    r"bsd": "BSD",  # of two or three clauses
    r"isc\b": "ISC",
    r"mit\b": "MIT",
}
UNSAID = {  # by their metadata; what the license file in the wheel is
    "cuda-toolkit": "proprietary",
    "hf-transfer": "Apache-2.0",
    "mani-skill": "Apache-2.0",
    "robosuite": "MIT",
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def license_of(metadata: Message) -> str:
    """As SPDX: its expression, else the first line of its field, else its classifiers; `?` where it names none."""
    field = metadata.get("License", "").strip().partition("\n")[0]
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License :: ")]
    for text in (metadata.get("License-Expression", ""), field, " OR ".join(classifiers)):
        words = re.split(r" (AND|OR) ", re.sub(r"[()]| WITH \S+", "", text))
        names = [spdx(word) for word in words[::2]]
        if all(names):
            kept = dict.fromkeys(zip(names, ["", *words[1::2]])) if len(set(names)) > 1 else {(names[0], ""): None}
            return " ".join(f"{word} {name}".strip() for name, word in kept)
    return UNSAID.get(canonical(metadata["Name"]), "?")


def spdx(text: str) -> str | None:
    if text in ALLOWED or text.lower().startswith("copyright"):
        return text if text in ALLOWED else None
    return next((name for words, name in WORDS.items() if re.search(words, text, re.IGNORECASE)), None)


def pinned() -> set[str]:
    return {canonical(name) for file in CONSTRAINTS for name in pins(file)}


def installed() -> set[tuple[str, str]]:
    """(package, license) of what is pinned and here."""
    here = ((canonical(d.name), license_of(d.metadata)) for d in distributions())
    return {(name, license) for name, license in here if name in pinned()}


def listed() -> set[tuple[str, str]]:
    """Those of the page; a package has two where the metadata of its two versions say differently."""
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE) if PAGE.exists() else []
    return {(name, license) for license, names in rows for name in names.split(", ")}


def reason(name: str, license: str) -> str | None:
    """Why a package with this license may be a dependency; None where it may not."""
    if any(set(part.split(" AND ")) <= ALLOWED for part in license.split(" OR ")):
        return ""
    if license == "proprietary" and re.match("nvidia-|cuda-", name):
        return NVIDIA
    return EXCEPTIONS.get(name)


def page(licenses: set[tuple[str, str]]) -> str:
    groups: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for name, license in sorted(licenses):
        groups.setdefault(license, []).append(name)
        if why := reason(name, license):
            others.setdefault(f"{license} | {why}", []).append(name)
    rows = [f"| {license} | {len(names)} | {', '.join(names)} |" for license, names in sorted(groups.items())]
    return "\n".join(
        [
            "# Licenses",
            "",
            "dvla is Apache-2.0. It ships no other package: pip and uv fetch them, each under its own license.",
            "Below is every package that `constraints.txt` or `constraints-py312.txt` pins, as its metadata says.",
            "`make licenses` writes this page, and a test refuses a package whose license is neither permissive",
            "nor MPL-2.0, nor named with a reason. `deepspeed` and `flash-attn` are not pinned: they are compiled",
            "against the torch that is there.",
            "",
            "| license | packages | names |",
            "|---|---|---|",
            *rows,
            "",
            "## With a reason",
            "",
            "| package | license | why it may be a dependency |",
            "|---|---|---|",
            *(f"| {', '.join(names)} | {text} |" for text, names in sorted(others.items(), key=lambda item: item[1])),
            "",
            "## Inside wheels",
            "",
            "What a wheel bundles besides its own code matters to whoever passes on an environment or image with it:",
            "",
            "| package | bundles |",
            "|---|---|",
            *(f"| {name} | {what} |" for name, what in sorted(BUNDLED.items())),
            "",
        ]
    )


def test_every_pinned_package_is_listed_with_a_license_that_may_be() -> None:
    assert {name for name, _ in listed()} == pinned(), "docs/licenses.md is not of these versions: make licenses"
    wrong = [f"{name}: {license}" for name, license in listed() if reason(name, license) is None]
    assert not wrong, f"{wrong}: another package, or a reason in EXCEPTIONS"
    assert set(EXCEPTIONS) <= pinned()


def test_the_page_is_as_written() -> None:
    assert PAGE.read_text() == page(listed())


def test_what_is_installed_says_what_is_listed() -> None:
    assert len(installed()) > 50
    assert installed() - listed() == set(), "make licenses"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License-Expression": "Apache-2.0 OR BSD-3-Clause", "License": "x"}, "Apache-2.0 OR BSD"),
        ({"License": "BSD 3-Clause License\n\nCopyright MIT"}, "BSD"),
        ({"License": "Dual License", "Classifier": "License :: OSI Approved :: BSD License"}, "BSD"),
        ({"License": "GPLv3+"}, "GPL-3.0"),
        ({"License": "LGPLv3"}, "LGPL-3.0"),
        ({"License": "Copyright (c) MIT"}, "?"),
        ({"License": "NVIDIA Proprietary Software"}, "proprietary"),
        ({}, "?"),
    ],
)
def test_licenses_of_metadata(fields: dict[str, str], expected: str) -> None:
    metadata = Message()
    for name, value in {"Name": "a", **fields}.items():
        metadata[name] = value
    assert license_of(metadata) == expected
    assert (reason("a", expected) is None) == (expected in ("?", "GPL-3.0", "LGPL-3.0", "proprietary"))


if __name__ == "__main__":
    twice = {name for name in pinned() if len({pins(file).get(name) for file in CONSTRAINTS} - {None}) > 1}
    here = {name for name, _ in installed()} - twice
    licenses = installed() | {(name, license) for name, license in listed() if name in pinned() - here}
    if missing := sorted(pinned() - {name for name, _ in licenses}):
        sys.exit(f"error: the licenses of {', '.join(missing)} are not known; run it where they are installed")
    PAGE.write_text(page(licenses))
    print(f"{PAGE.relative_to(ROOT)}: {len(licenses)} packages")
