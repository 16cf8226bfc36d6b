"""The images' files, read as text: what they copy and install exists and is pinned, nothing of data gets in, nobody is
root."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from support.package_source import name_of, package_files
from support.repository import ROOT, pins

DOCKER = ROOT / "docker"
IMAGES = ("base", "pretrain", "rlbench", "dexgrasp")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = pins("constraints.txt")  # that of the images' Python
OPTIONAL = "docker/IsaacGym_Preview_4_Package.tar.g[z]"  # the user brings it


def instructions(image: str) -> list[tuple[str, str]]:
    """(instruction, rest) per line of a Dockerfile: continued lines joined, no comments, its arguments filled in."""
    text = "\n".join(
        line for line in (DOCKER / f"Dockerfile.{image}").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    found, values = [], {}
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "ARG":
            name, _, value = rest.partition("=")
            values[name] = value.strip('"')
        if word:
            found.append((word, re.sub(r"\$\{(\w+)\}", lambda m: values.get(m[1], m[0]), rest.strip())))
    return found


def rests(image: str, word: str) -> list[str]:
    return [rest for name, rest in instructions(image) if name == word]


def copied(image: str) -> list[str]:
    return [source for rest in rests(image, "COPY") for source in shlex.split(rest)[:-1]]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps `path` out: the last rule that fits it or a folder above it decides."""
    out = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.lstrip("!")
            above = [path, *(str(p) for p in Path(path).parents if str(p) != ".")]
            fits = any(
                fnmatch(Path(p).name, pattern[3:])
                if pattern.startswith("**/")
                else p.count("/") == pattern.count("/") and fnmatch(p, pattern)
                for p in above
            )
            out = (not rule.startswith("!")) if fits else out
    return out


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_exists_and_passes_dockerignore(image: str) -> None:
    assert not rests(image, "ADD")
    for source in copied(image):
        assert source not in (".", "./", "*", "/")
        found = [p.relative_to(ROOT).as_posix() for p in ROOT.glob(source)]
        assert found or source == OPTIONAL, f"{source} does not exist"
        assert not [p for p in found if ignored(p)]
    assert not ignored(OPTIONAL.replace("[z]", "z"))


def test_the_base_image_has_the_whole_package() -> None:
    patterns = copied("base")
    left_out = [
        name
        for name in map(name_of, package_files())
        if not any(fnmatch(name, p) or name.startswith(p + "/") for p in patterns)
    ]
    assert not left_out
    wanted = {"pyproject.toml", "constraints.txt", PYPROJECT["project"]["readme"], "configs"}
    wanted |= set(PYPROJECT["build-system"]["backend-path"])
    assert wanted <= set(patterns)


@pytest.mark.parametrize(
    "path",
    [
        "data/push/meta/info.json",
        "runs/droid/log.jsonl",
        "caches/droid/zarr.json",
        ".git/config",
        ".venv/bin/python",
        "wandb/key",
        ".netrc",
        ".env",
        "shared/x",
        "tests/test_docker.py",
        "film.mp4",
        "stages/__pycache__/a.pyc",
    ],
)
def test_nothing_else_reaches_a_build(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize("image", IMAGES)
def test_nobody_is_root_at_the_end(image: str) -> None:
    assert rests(image, "USER")[-1] == "1000"
    assert image != "base" or any("useradd" in run and "--uid 1000" in run for run in rests(image, "RUN"))


@pytest.mark.parametrize("image", IMAGES)
def test_base_images_are_pinned(image: str) -> None:
    assert len(rests(image, "FROM")) == 1
    name, _, tag = rests(image, "FROM")[0].partition(":")
    if image == "base":
        assert re.search(r"\d+\.\d+\.\d+", tag)
    else:
        assert (name, tag) == ("dvla", "base")


def installs(image: str) -> list[list[str]]:
    """The words after `pip install` of every such command."""
    commands = [
        shlex.split(part) for run in rests(image, "RUN") for part in re.split(r"&&|; ", run) if "pip install" in part
    ]
    return [words[words.index("install") + 1 :] for words in commands]


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_installed_is_pinned(image: str) -> None:
    assert installs(image)
    for words in installs(image):
        here = "--python" not in words  # else another interpreter, with versions of its own
        rest = iter(words)
        for word in rest:
            if word in ("-c", "-r", "--python"):
                value = next(rest)
                assert word == "--python" or (ROOT / value).is_file()
            elif word == "--extra":
                assert next(rest) in PYPROJECT["project"]["optional-dependencies"]
            elif word == "-e" or word == "." or word.startswith("--"):
                assert word != "-e" or next(rest).startswith("/opt/")
            elif "git+" in word:
                assert re.search(r"@[0-9a-f]{40}$", word)
            else:
                name, version = re.fullmatch(r"([\w-]+)==([\w.]+)", word).groups()
                assert not here or PINNED.get(name.lower(), version) == version
        if "-r" in words:
            assert "-c" in words


UV = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
COMPILED = {
    "deepspeed",
    "flash-attn",
}  # in the image, against its torch: what they depend on is known only by running their build


def lines_to_resolve() -> list[tuple[str, list[str], str]]:
    """Image, arguments of `uv pip compile`, and the requirements it reads, of every install line that asks the
    registry."""
    lines = []
    python = dict(
        re.findall(
            r"ARG (\w*PYTHON_VERSION)=(\S+)", "".join(f.read_text() for f in sorted(DOCKER.glob("Dockerfile.*")))
        )
    )
    for image in IMAGES:
        for words in installs(image):
            named = [word for word in words if "==" in word and word.split("==")[0] not in COMPILED]
            extras = [word for i, word in enumerate(words) if "--extra" in words[max(0, i - 1) : i + 1]]
            own = (
                ["--python-version", python["ISAAC_PYTHON_VERSION"]]
                if "--python" in words
                else ["--python-version", python["PYTHON_VERSION"], "-c", "constraints.txt"]
            )
            if named or "-r" in words:  # else this package itself, or compiled
                lines.append((image, ["pyproject.toml" if "-r" in words else "-", *extras, *own], "\n".join(named)))
    return lines


def test_what_is_installed_can_be() -> None:
    """Every install line resolves for a bare Linux with its image's own Python, from wheels alone; nothing is
    installed."""
    if UV is None:
        pytest.skip("needs uv, which `make venv` brings")
    lines = lines_to_resolve()
    assert {image for image, _, _ in lines} == set(IMAGES)
    for image, arguments, named in lines:
        done = subprocess.run(
            [
                UV,
                "pip",
                "compile",
                *arguments,
                "--no-build",
                "--quiet",
                "--no-header",
                "--no-annotate",
                "--python-platform",
                "x86_64-manylinux_2_28",
            ],
            input=named,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if "failed to fetch" in done.stderr.lower():  # not that it has no such version
            pytest.skip("needs a package registry")
        assert done.returncode == 0, f"{image}: {arguments} {named}\n{done.stderr}"
        assert set(named.split()) <= set(done.stdout.split())


@pytest.mark.parametrize("image", IMAGES)
def test_imports_are_tried_at_the_end_of_a_build(image: str) -> None:
    check = rests(image, "RUN")[-1]
    assert "test ! -e /workspace/data" in check and instructions(image)[-3][0] != "COPY"
    modules = re.findall(r"\bdvla(?:\.\w+)+", check)
    assert modules
    for module in modules:
        path = ROOT.joinpath(*module.split(".")[1:])
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module


def test_what_the_adapters_ask_for_is_set() -> None:
    settings = " ".join(rest for image in IMAGES for rest in rests(image, "ENV"))
    assert all(name + "=" in settings for name in ("COPPELIASIM_ROOT", "DVLA_ISAAC_PYTHON", "DVLA_DEXGRASPNET"))
    assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)=", settings)


def enter(tmp_path: Path, key: str | None, login: str) -> subprocess.CompletedProcess[str]:
    """The entry point before `echo`, with a `python` that does `login` in place of W&B's."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "called with $*, $WANDB_API_KEY" >> {tmp_path}/calls\n{login}\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DISPLAY": ":0"} | ({"WANDB_API_KEY": key} if key else {})
    assert os.access(DOCKER / "entrypoint.sh", os.X_OK)
    return subprocess.run(
        [DOCKER / "entrypoint.sh", "echo", "ran", "this"], env=environment, capture_output=True, text=True
    )


def test_the_entry_point_logs_in_only_with_a_key_which_it_never_shows(tmp_path: Path) -> None:
    done = enter(tmp_path, None, "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran this\n", "") and not (tmp_path / "calls").exists()
    done = enter(tmp_path, "hidden", 'echo "$WANDB_API_KEY" >&2')
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran this\n", "")
    called = (tmp_path / "calls").read_text()
    assert (
        "wandb.login" in called and "hidden" not in called.partition(",")[0]
    )  # from the environment, not as an argument
    done = enter(tmp_path, "hidden", "exit 1")
    assert (
        done.returncode == 0
        and done.stdout == "ran this\n"
        and "did not accept" in done.stderr
        and "hidden" not in done.stderr
    )


def test_missing_isaac_gym_is_said_in_one_line() -> None:
    assert any(
        "if [ ! -f /tmp/isaac/IsaacGym_Preview_4_Package.tar.gz ]" in run and "exit 1" in run
        for run in rests("dexgrasp", "RUN")
    )
    assert (
        OPTIONAL in copied("dexgrasp") and len(copied("dexgrasp")) > 1
    )  # a COPY of which nothing matches fails without a reason


def test_the_image_gets_every_folder_of_the_package() -> None:
    """Those of pyproject.toml's packages, through .dockerignore and into the image."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inside = {name.split(".")[1] for name in setuptools["packages"] if name.startswith("dvla.")}
    folders = inside | {folder.split("/")[0] for folder in setuptools["package-dir"].values() if folder != "."}
    copied = {line for line in (ROOT / "docker/Dockerfile.base").read_text().splitlines() if line.startswith("COPY")}
    allowed = set((ROOT / ".dockerignore").read_text().split())
    assert "client" in folders
    for folder in folders:
        assert f"COPY {folder} {folder}" in copied and f"!{folder}" in allowed, folder
