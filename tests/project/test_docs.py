"""The documentation: its commands exist, its links lead somewhere, the quick start runs, the site builds."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from dvla.cli import app
from support.repository import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))))
GENERATED = "docs/cli.md"
RUN = ("docs/quickstart.md",)  # by `test_the_quick_start` below
LANDING = ROOT / "tests" / "fixtures" / "landing_16"  # has what the quick start leaves behind, and smaller


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    before: str  # the line above it


def blocks(page: str) -> list[Block]:
    """Fenced blocks of a page."""
    found, lines, begun = [], (ROOT / page).read_text().splitlines(), None
    for i, line in enumerate(lines):
        if line.startswith("```") and begun is None:
            begun = i
        elif line.startswith("```"):
            found.append(
                Block(page, begun + 1, lines[begun][3:].strip(), "\n".join(lines[begun + 1 : i]), lines[begun - 1])
            )
            begun = None
    assert begun is None, f"{page}: a block is not closed"
    return found


def commands(block: Block) -> list[list[str]]:
    """Its dvla commands as words, without `dvla` and comments; continued lines joined."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        if line.startswith("dvla "):
            words = shlex.split(line, comments=True)
            found.append([w for w in words[1:] if w not in ("&", "…")])
    return found


def understood(words: list[str]) -> None:
    """Raises what click raises for a command line that is none. Nothing is run."""
    command, arguments, context = typer.main.get_command(app), words, None
    name = "dvla"
    while True:
        if hasattr(command, "resolve_command"):  # a group: its own options, then the rest
            context = command.make_context(name, list(arguments), parent=context)
            rest = [*getattr(context, "_protected_args", getattr(context, "protected_args", [])), *context.args]
            if not rest:
                return
            name, command, arguments = command.resolve_command(context, rest)
        else:
            command.make_context(name, list(arguments), parent=context)
            return


ALL = [block for page in PAGES if page != GENERATED for block in blocks(page)]


@pytest.mark.parametrize("page", [p for p in PAGES if p != GENERATED])
def test_every_command_is_one(page: str) -> None:
    for block in blocks(page):
        for words in commands(block):
            try:
                understood(words)
            except Exception as error:
                raise AssertionError(
                    f"{page}:{block.line}: dvla {shlex.join(words)}: {getattr(error, 'message', error)}"
                ) from None
            if words[:1] == ["launch"] and "--" in words:  # what it starts is a command as well
                understood(words[words.index("--") + 1 :])


def test_what_is_not_one_would_be_found() -> None:
    for words in (
        ["trian"],
        ["train"],
        ["cache", "build", "--no-such-option"],
        ["train", "--from-cache", "c", "--steps", "many"],
    ):
        with pytest.raises(typer.BadParameter.__mro__[2]):  # click's ClickException, or that of newer typers
            understood(words)
    understood(["train", "--from-cache", "c", "--steps", "3"])


@pytest.mark.parametrize(
    "block", [b for b in ALL if commands(b) and b.page not in RUN], ids=lambda b: f"{b.page}:{b.line}"
)
def test_commands_that_are_not_run_say_why(block: Block) -> None:
    found = re.fullmatch(r"<!-- not run: (.{8,}) -->", block.before)
    assert found, f"{block.page}:{block.line}: write <!-- not run: REASON --> above this block, or run it in a test"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    images = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in [*re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text), *images]:
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def cells(page: str, first: str) -> list[str]:
    """The cells of the table row of a page that begins with `first`, without emphasis."""
    row = next(line for line in (ROOT / page).read_text().splitlines() if line.replace("*", "").startswith(first))
    return [cell.strip() for cell in row.replace("*", "").strip("|").split("|")]


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("| drifting |", "| drifting |"),
        ("| regression (MSE) |", "| MSE |"),
        ("| flow matching |", "| flow, 10 passes |"),
        ("| diffusion |", "| diffusion, 100 passes |"),
    ],
)
def test_the_numbers_of_the_readme_are_those_of_the_results(here: str, there: str) -> None:
    (_, passes, wall, mean, ms), found = cells("README.md", here), cells("docs/results.md", there)
    success, low, high = re.fullmatch(r"(\d+) % \((\d+)–(\d+)\)", wall).groups()
    assert found[3].startswith(f"{success}% ({low} – {high};")
    assert found[4] == mean.replace(" ", "") and ms == f"{float(found[6]):.1f}"
    assert passes == (re.search(r"(\d+) passes", there) or re.match("(1)", "1")).group(1)


def test_the_readme_is_short_and_its_images_are_light() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
    assert max(path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()) < 2 * 2**20


def test_ci_runs_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"- run: make ([a-z-]+)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert {"lint", "test", "site"} <= set(named) <= targets


@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("material") is None, reason="needs dvla[docs]")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Offline; every page is in the navigation, every link and anchor leads somewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "index.html").exists() and (tmp_path / "site" / "cli" / "index.html").exists()
    fetched = re.findall(r'(?:src|<link[^>]* href)="(https?://[^"]+)', (tmp_path / "site" / "index.html").read_text())
    assert not fetched, "the site loads something from another host"


def test_benchmarks_have_the_options_that_pages_name() -> None:
    found = 0
    for block in ALL:
        for name, options in re.findall(r"^python (benchmarks/\w+\.py)(.*)$", block.text, re.M):
            source = (ROOT / name).read_text()
            for option in re.findall(r"--[\w-]+", options.split("#")[0]):
                assert f'"{option}"' in source, f"{block.page}:{block.line}: {name} has no {option}"
            found += 1
    assert found > 5


def test_benchmarks_can_be_imported() -> None:
    """What they use of the package is where they look for it; their numbers come from runs by hand."""
    names = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    names += [f"gpu_check.{path.stem}" for path in sorted((ROOT / "benchmarks" / "gpu_check").glob("*.py"))]
    code = f"import importlib, sys; sys.path.insert(0, 'benchmarks'); [importlib.import_module(n) for n in {names!r}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", [p for p in PAGES if p != GENERATED])
def test_files_that_pages_name_are_there(page: str) -> None:
    rooms = "cache|common|stages|drifting|tests|benchmarks|configs|docker|examples"
    text = (ROOT / page).read_text()
    for path in re.findall(rf"(?<![\w./-])(?:{rooms})/[\w./-]+\.(?:py|yaml|sh|html)\b", text):
        assert "NAME" in path or (ROOT / path).exists(), f"{page} names {path}, which is not there"


def leaves(command: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [found for name, inner in command.commands.items() for found in leaves(inner, (*path, name))]


def test_the_reference_has_every_command_and_option() -> None:
    """`make docs` makes it, with every help text; the rest of its wording follows the version of typer."""
    text = (ROOT / GENERATED).read_text()
    sections = dict(
        zip(re.findall(r"^#+ `dvla ([^`]+)`$", text, re.M), re.split(r"^#+ `dvla [^`]+`$", text, flags=re.M)[1:])
    )
    found = leaves(typer.main.get_command(app))
    assert len(found) > 20
    for path, command in found:
        section = sections.get(" ".join(path))
        assert section is not None, f"docs/cli.md lacks dvla {' '.join(path)}; run make docs"
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option in section, f"docs/cli.md lacks {option} of dvla {' '.join(path)}; run make docs"
            text = " ".join((getattr(parameter, "help", None) or "").replace("\\[", "[").split())
            assert text in section.replace("\\[", "["), (
                f"docs/cli.md has another help for {parameter.name}; run make docs"
            )
    assert {name for name in sections if not any(name == " ".join(path[:1]) for path, _ in found)} <= {
        " ".join(path) for path, _ in found
    }


def test_the_python_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python blocks one after another, in a folder like that of the quick start."""
    for name, here in (("cache_fp16", "cache"), ("vlm", "vlm"), ("policy", "policy")):
        shutil.copytree(LANDING / name, tmp_path / here)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    found = [b for b in blocks("docs/python-api.md") if b.language == "python"]
    for block in found:
        if not block.before.startswith("<!-- not run: "):
            exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
    assert len(found) > 6 and names["native"].shape[1:] == (8, 4)


@pytest.mark.slow
def test_the_quick_start(tmp_path: Path) -> None:
    """Every block of it in its order, as a user would."""
    for library in ("metaworld", "lerobot"):
        if find_spec(library) is None:
            pytest.skip(f"needs {library}")
    script = "set -euo pipefail\nshopt -s expand_aliases\nalias dvla='python -m dvla.cli'\n"
    for block in blocks("docs/quickstart.md"):
        script += (
            block.text + "\n"
            if block.language != "python"
            else f"python - <<'END'\n{block.text}\nassert actions.ndim == 2\nEND\n"
        )
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        env={"PATH": path, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert (tmp_path / "eval" / "summary.json").exists() and (tmp_path / "policy" / "policy.json").exists()


def test_what_shows_how_files_are_read_exists() -> None:
    """The last column of the tables in docs/datasets.md names tests, `file::test` or `::test` of the file before."""
    rows = [line for line in (ROOT / "docs/datasets.md").read_text().splitlines() if "::test_" in line]
    assert len(rows) > 150
    missing = []
    for row in rows:
        file = ""
        for named in re.findall(r"`([\w/.]*)::(test_\w+)`", row):
            file = named[0] or file
            path = ROOT / file
            if not path.is_file() or f"def {named[1]}(" not in path.read_text():
                missing.append(f"{file}::{named[1]}")
    assert not missing
