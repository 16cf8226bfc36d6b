"""The house in numbers: `python tests/project/measure_house.py [CHECKOUT …]`, a column for each checkout (before, after).

Lines and functions are those of every tracked Python file (package, tests, benchmarks), rooms and circles those of the package. A function's lines run
from its `def` to its last line, docstring and comments included.
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


def wide_lines(files: list[Path]) -> int:
    """Lines of more than `WIDE` columns."""
    return sum(len(line) > WIDE for file in files for line in file.read_text().splitlines())


def measure(root: Path) -> dict[str, str]:
    """The table of one checkout."""
    files, package = tracked(root), list(package_files(root))
    rooms = Counter(file.parent.relative_to(root).as_posix() for file in package if file.name != "__init__.py")
    largest, count = rooms.most_common(1)[0]
    rings = sorted(circles(arrows_between(root)), key=len)
    room_rings = circles(arrows_between(root, by_room=True))
    longest = sorted(
        ((lines, f"{file.relative_to(root)}:{name}") for file in package for lines, name in functions(file)),
        reverse=True,
    )
    lines = {"package": package, "tests": [f for f in files if f.relative_to(root).parts[0] == "tests"], "all": files}
    return {
        "folders of the package": str(len(rooms)),
        "most files in one folder": f"{count} ({largest})",
        "Python files at the root": str(len(list(root.glob("*.py")))),
        "import circles between files": f"{len(rings)} (largest: {len(rings[-1])} files)" if rings else "0",
        "import circles between rooms": str(len(room_rings)),
        **{
            f"lines, {name}": f"{sum(len(f.read_text().splitlines()) for f in found):,}"
            for name, found in lines.items()
        },
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
