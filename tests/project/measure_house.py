"""The house in numbers: `python tests/project/measure_house.py [CHECKOUT …]`, a column for each checkout.

Lines and functions are those of every tracked Python file (package, tests, benchmarks), rooms and circles those of the
package. A function's lines run from its `def` to its last line, docstring and comments included.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.package_source import arrows_between, circles, package_files  # noqa: E402

WIDE = 120  # columns
LONG = 60  # lines of a function
MOST_FILES = 16  # of one folder
MOST_LINES = 50_100  # of the package, formatted; 47,800 before the language layers, the history of frames, GPU work


def tracked(root: Path) -> list[Path]:
    """Python files that git knows, and new ones it does not ignore."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "*.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [root / name for name in sorted(set(listed.stdout.split())) if (root / name).is_file()]


def functions(file: Path) -> list[tuple[int, str]]:
    """(lines, name) of every function and method of a file."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        ((node.end_lineno or 0) - node.lineno + 1, node.name)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, kinds)
    ]


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines()


def wide_lines(files: list[Path]) -> int:
    """Lines of more than `WIDE` columns."""
    return sum(len(line) > WIDE for file in files for line in lines_of(file))


def folder_sizes(root: Path) -> Counter[str]:
    """Python files of each folder of the package."""
    return Counter(f.parent.relative_to(root).as_posix() for f in package_files(root) if f.name != "__init__.py")


def crowds(root: Path) -> dict[str, int]:
    """Folders of the package with more than `MOST_FILES` files."""
    return {folder: size for folder, size in folder_sizes(root).items() if size > MOST_FILES}


def rings(root: Path, by_room: bool) -> list[list[str]]:
    """Import circles, the largest last. The root's own imports are lazy (`dvla.Policy`) and do not count."""
    arrows = arrows_between(root, by_room=by_room)
    arrows.pop("__init__.py", None)
    return sorted(circles(arrows), key=len)


def measure(root: Path) -> dict[str, str]:
    """The table of one checkout."""
    files, package = tracked(root), list(package_files(root))
    rooms = folder_sizes(root)
    largest, count = rooms.most_common(1)[0]
    of_files, of_rooms = rings(root, False), rings(root, True)
    longest = sorted(
        ((lines, f"{file.relative_to(root)}:{name}") for file in package for lines, name in functions(file)),
        reverse=True,
    )
    lines = {"package": package, "tests": [f for f in files if f.relative_to(root).parts[0] == "tests"], "all": files}
    return {
        "folders of the package": str(len(rooms)),
        "most files in one folder": f"{count} ({largest})",
        "Python files at the root": str(len(list(root.glob("*.py")))),
        "import circles between files": f"{len(of_files)} (largest: {len(of_files[-1])} files)" if of_files else "0",
        "import circles between rooms": str(len(of_rooms)),
        **{f"lines, {name}": f"{sum(len(lines_of(f)) for f in found):,}" for name, found in lines.items()},
        f"lines over {WIDE} columns, package": str(wide_lines(package)),
        f"lines over {WIDE} columns, all": str(wide_lines(files)),
        f"functions over {LONG} lines, package": str(sum(n > LONG for n, _ in longest)),
        "longest function, package": f"{longest[0][0]} ({longest[0][1]})",
    }


def main() -> None:
    roots = [Path(given).resolve() for given in sys.argv[1:]] or [Path(__file__).resolve().parents[2]]
    columns = [measure(root) for root in roots]
    print(f"| measure | {' | '.join(root.name for root in roots)} |\n|---|{'---|' * len(roots)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    main()
