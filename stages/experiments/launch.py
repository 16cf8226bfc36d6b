"""`dvla launch`: a dvla command on several processes, machines, or under Slurm, by a script that one can read first.

A script is `configs/launch/NAME.sh`, or a copy of it that somebody changed: a shell script with `{{setting}}` where a value goes, `{{command}}` for
the command, and a line `#: setting=default   what it is` for each setting.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.config import configs_dir
from ...common.signals import handled
from ...errors import UserError, unknown

_SETTING = re.compile(r"#: (\w+)=(\S*)\s*(.*)")
_VALUE = re.compile(r"[\w.:/@+-]+")
TRAINING = ("train", "finetune")


@dataclass(frozen=True)
class Setting:
    """One value that a script leaves open."""

    default: str
    meaning: str


def scripts() -> tuple[str, ...]:
    """Names of the shipped scripts, sorted."""
    return tuple(sorted(p.stem for p in (configs_dir() / "launch").glob("*.sh")))


def read_script(name_or_file: str) -> str:
    """Text of a shipped script by name, or of a file *.sh. `UserError` for an unknown one."""
    file = (
        Path(name_or_file).expanduser()
        if name_or_file.endswith(".sh")
        else configs_dir() / "launch" / f"{name_or_file}.sh"
    )
    if not name_or_file.endswith(".sh") and name_or_file not in scripts():
        raise unknown("launch script", name_or_file, scripts())
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def settings_of(text: str) -> dict[str, Setting]:
    """What a script leaves open, by name."""
    return {
        found[1]: Setting(found[2], found[3].strip())
        for line in text.splitlines()
        if (found := _SETTING.fullmatch(line.rstrip()))
    }


def render(text: str, command: Sequence[str], given: Mapping[str, str]) -> str:
    """The script of `text` that runs `dvla COMMAND…`, with its defaults and what is `given` in their place.

    `UserError` for a setting it does not have, a value a shell would read as more than one word, or a command it cannot run.
    """
    known = settings_of(text)
    for name, value in given.items():
        if name not in known:
            raise unknown("setting of the script", name, known)
        if not _VALUE.fullmatch(value):
            raise UserError(f"{name}={value!r}: letters, digits and . : / @ + - _ only")
        if known[name].default.isdigit() and not value.isdigit():
            raise UserError(f"{name}={value!r}: it must be a whole number, as in {name}={known[name].default}")
    if not command:
        raise UserError(
            "no command to launch; give it after --, as in `dvla launch torchrun -- train --from-cache cache --out run`"
        )
    cache = "--workers {{" in text
    if cache and list(command[:2]) != ["cache", "build"]:
        raise UserError(
            f"this script builds a cache; its command begins with cache build, given: {shlex.join(command)}"
        )
    if not cache and command[0] not in TRAINING:
        raise UserError(
            f"'{command[0]}' does not run in several processes that know of each other; give {' or '.join(TRAINING)}"
            + (" (for a cache: --workers N, or the script slurm-cache)" if command[0] == "cache" else "")
        )
    for option in ("--workers", "--strategy"):
        if any(word.split("=")[0] == option for word in command) and f"{option} " in text:
            raise UserError(f"{option} is set by this script; leave it out of the command")
    values = {name: setting.default for name, setting in known.items()} | dict(given) | {"command": shlex.join(command)}

    def filled(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise UserError(f"the script asks for {{{{{found[1]}}}}} and has no line '#: {found[1]}=…' for it")
        return values[found[1]]

    lines = [line for line in text.splitlines() if not _SETTING.fullmatch(line.rstrip())]
    return re.sub(r"\{\{(\w+)\}\}", filled, "\n".join(lines)) + "\n"


def launch(script: str) -> int:
    """Run a rendered script, or give it to Slurm if it is one of its jobs; returns the exit code. `UserError` without sbatch."""
    slurm = "\n#SBATCH " in script
    program = "sbatch" if slurm else "bash"
    if shutil.which(program) is None:
        raise UserError(f"{program} is not here; see the script with --print, or run this on a machine that has it")
    if slurm:
        return subprocess.run([program], input=script, text=True).returncode
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        process = subprocess.Popen([program, file.name])
        with handled(
            lambda number, frame: process.send_signal(number), (signal.SIGTERM,)
        ):  # the launcher tells its processes: they save
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:  # Ctrl-C reached the processes as well
                    continue
