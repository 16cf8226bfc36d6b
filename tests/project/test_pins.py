"""Both sets of versions hold what pyproject.toml asks for, for every Python it names; `make audit` leaves none out."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.repository import CONSTRAINTS, ROOT, pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = {  # besides what is built against the torch that is there
    "constraints.txt": {"gpu", "deepspeed", "trackio"},  # trackio for Python 3.11 holds Pillow and pandas back
    "constraints-py312.txt": {"gpu", "deepspeed", "maniskill"},  # whose planner has no wheel for Python 3.13
}
PYTHONS = {"constraints.txt": ("3.11",), "constraints-py312.txt": ("3.12", "3.13")}


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_every_requirement_has_a_version_that_fits(file: str) -> None:
    pinned = {canonicalize_name(name): version for name, version in pins(file).items()}
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(r for name in extras.keys() - LEFT_OUT[file] for r in extras[name])]
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{file} lacks {requirement.name}: make pins"
        assert requirement.specifier.contains(version, prereleases=True), f"{file}: {requirement.name} {version}"


def test_upper_bounds_have_a_reason() -> None:
    above = ""
    for line in (ROOT / "pyproject.toml").read_text().partition("[project.urls]")[0].splitlines():
        if re.search(r'"[A-Za-z][\w\[\],.-]*[^"]*(<|==)[^"]*"', line):
            assert "#" in line or above.startswith("#"), line
        above = line


def test_the_pythons_are_those_of_the_workflow() -> None:
    named = sorted(c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == named == [p for file in CONSTRAINTS for p in PYTHONS[file]]
    assert PROJECT["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize(
    ("answer", "code", "expected"),
    [
        ("No known vulnerabilities found", 0, 0),
        ("Found 2 known vulnerabilities in 1 package", 1, 2),
        ("zarr   Dependency not found on PyPI and could not be audited: zarr (3)", 0, 2),  # pip-audit passes it over
        ("ConnectionError: no route", 1, 2),
    ],
)
def test_an_audit_without_advisories_is_no_pass(tmp_path: Path, answer: str, code: int, expected: int) -> None:
    tool = tmp_path / "uvx"
    tool.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    tool.chmod(0o755)
    done = subprocess.run(
        ["make", "audit", f"UV={tmp_path / 'uv'}", "STAMP="], cwd=ROOT, capture_output=True, text=True
    )  # make itself ends with 2 whatever a recipe's code is
    assert done.returncode == expected
    refused = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(refused) == (0 if "known" in answer else 1)
    assert ("constraints-py312.txt: " in done.stdout) == ("known" in answer)
