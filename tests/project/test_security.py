"""docs/security.md holds in the source: one restricted unpickler, no model code, no shell, no unsafe YAML."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.package_source import name_of, package_files

UNPICKLERS = {"cache/readers/rlbench/unpickle.py"}
CALLS = {  # what a call must say to be allowed; None: never
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "joblib.load": None,
    "dill.load": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "os.system": None,
    "os.popen": None,
    "eval": None,
    "exec": None,
    "marshal.loads": None,
    "torch.load": ("weights_only", True),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


def complaints(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name, given = (
                ast.unparse(node.func),
                {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)},
            )
            if name in CALLS and (CALLS[name] is None or given.get(CALLS[name][0]) is not CALLS[name][1]):
                found.append(f"line {node.lineno}: {name}")
            found += [
                f"line {node.lineno}: {word}=True" for word in ("shell", "trust_remote_code") if given.get(word) is True
            ]
        elif isinstance(node, ast.Import):
            found += [
                f"line {node.lineno}: import {a.name}"
                for a in node.names
                if a.name in ("pickle", "cPickle", "dill", "joblib", "marshal", "shelve")
            ]
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib", "marshal", "shelve"):
            found.append(f"line {node.lineno}: from {node.module}")
    return found


@pytest.mark.parametrize("file", package_files(), ids=name_of)
def test_nothing_unsafe_is_called(file: Path) -> None:
    found = complaints(file.read_text())
    assert found == [] or name_of(file) in UNPICKLERS, found


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(p)",
        "import pickle",
        "from pickle import loads",
    ],
)
def test_what_is_unsafe_would_be_found(line: str) -> None:
    assert complaints(line)


def test_what_is_safe_is_not() -> None:
    assert not complaints(
        "torch.load(f, weights_only=True); np.load(f, allow_pickle=False); yaml.safe_load(f); subprocess.run(['ls'])"
    )


def test_the_exception_is_needed() -> None:
    assert all(complaints(file.read_text()) for file in package_files() if name_of(file) in UNPICKLERS)
