"""The package's source as its imports: which file imports what, read without running anything."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .repository import ROOT


class Import(NamedTuple):
    """One imported thing."""

    module: str  # of a third party, or "" for one of this package
    file: str  # of this package, relative to the repository; "" for a third party
    on_load: bool  # when the importing file is loaded, or for type checking; not inside a function


@cache
def package_files(root: Path = ROOT) -> tuple[Path, ...]:
    """Every Python file of the package, from the list of packages in pyproject.toml."""
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [root.joinpath(*name.split(".")[1:]) for name in packages if name.split(".")[0] == "dvla"]
    return tuple(p for folder in folders for p in sorted(folder.glob("*.py")))


def name_of(file: Path, root: Path = ROOT) -> str:
    """Path relative to the repository."""
    return file.relative_to(root).as_posix()


def room_of(name: str) -> str:
    """The room of a file: "cache/store", "stages/training", "drifting", "common"; at the root its name, as "cli.py"."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] in ("cache", "stages") and len(parts) > 2 else parts[0]


@cache
def imports(file: Path, root: Path = ROOT) -> tuple[Import, ...]:
    """Every import of a file, also inside functions and for type checking."""
    tree, found = ast.parse(file.read_text()), []
    inside = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(f)
    }
    for node in ast.walk(tree):
        on_load = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [Import(alias.name, "", on_load) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append(Import(node.module or "", "", on_load))
        elif isinstance(node, ast.ImportFrom):
            found += [Import("", target, on_load) for target in _targets(file, node, root)]
    return tuple(dict.fromkeys(found))


def _targets(file: Path, node: ast.ImportFrom, root: Path) -> list[str]:
    """The files behind a relative import: a module itself, or the modules that are taken out of a package."""
    here = file.relative_to(root).parent.parts
    assert node.level <= len(here) + 1, f"{name_of(file, root)}:{node.lineno} leaves the package"
    base = root.joinpath(*here[: len(here) + 1 - node.level], *(node.module.split(".") if node.module else ()))
    if base.with_suffix(".py").is_file():
        return [name_of(base.with_suffix(".py"), root)]
    names = [base / f"{alias.name}.py" for alias in node.names]
    packages = [base / alias.name / "__init__.py" for alias in node.names]
    chosen = [
        name if name.is_file() else package if package.is_file() else base / "__init__.py"
        for name, package in zip(names, packages)
    ]
    return [name_of(path, root) for path in chosen]


def arrows_between(root: Path = ROOT, by_room: bool = False) -> dict[str, set[str]]:
    """Name → names it imports when loaded or for type checking; between rooms, inside functions too."""
    found: dict[str, set[str]] = {}
    for file in package_files(root):
        for one in imports(file, root):
            if one.file and (by_room or one.on_load):
                a, b = (room_of(name_of(file, root)), room_of(one.file)) if by_room else (name_of(file, root), one.file)
                if a != b:
                    found.setdefault(a, set()).add(b)
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other along the arrows: Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(arrows.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return found
