"""`dvla launch`: runs a dvla command on several processes or machines, or under Slurm, by a script one can read first.

A script is `configs/launch/NAME.sh`, or an edited copy of it: a shell script with `{{setting}}` where a value goes,
`{{command}}` for the command, and a line `#: setting=default   what it is` for each setting.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.config import configs_dir
from ...common.documents import read_file, shown
from ...common.signals import handled
from ...common.text import printable, slurm_errors
from ...errors import UserError, unknown

_SETTING = re.compile(r"#: (\w+)=(\S*)\s*(.*)")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_VALUE = re.compile(r"[\w.:/@+-]+")
MOST_BYTES = 2**20  # of a script
TRAINING = ("train", "finetune")


@dataclass(frozen=True)
class Setting:
    """One value that a script leaves to its user."""

    default: str
    meaning: str


def scripts() -> tuple[str, ...]:
    """Names of the shipped scripts, sorted."""
    return tuple(sorted(p.stem for p in (configs_dir() / "launch").glob("*.sh")))


def read_script(name_or_file: str) -> str:
    """Text of a shipped script by name, or of a file *.sh. `UserError` for an unknown one."""
    if name_or_file.endswith(".sh"):
        file = Path(name_or_file).expanduser()
    elif name_or_file in scripts():
        file = configs_dir() / "launch" / f"{name_or_file}.sh"
    else:
        raise unknown("launch script", name_or_file, scripts())
    try:
        return read_file(file, MOST_BYTES).decode()
    except UnicodeDecodeError:
        raise UserError(f"cannot read {file}: it is not text in UTF-8, expected a shell script") from None


def settings_of(text: str) -> dict[str, Setting]:
    """A script's settings, by name."""
    return {
        found[1]: Setting(found[2], found[3].strip())
        for line in text.splitlines()
        if (found := _SETTING.fullmatch(line.rstrip()))
    }


def render(text: str, command: Sequence[str], given: Mapping[str, str]) -> str:
    """The script of `text` that runs `dvla COMMAND…`, with what is `given` in place of its defaults.

    Raises:
        UserError: for an unknown setting, a value that a shell would read as more than one word, or a command that the
            script cannot run.
    """
    known = settings_of(text)
    for name, value in given.items():
        if name not in known:
            raise unknown("setting of the script", name, known)
        if not _VALUE.fullmatch(value):
            raise UserError(f"{name}={value!r}: use only letters, digits and . : / @ + - _")
        if known[name].default.isdigit() and not value.isdigit():
            raise UserError(f"{name}={value!r}: give a whole number, as in {name}={known[name].default}")
    _check_command(text, command)
    values = {name: setting.default for name, setting in known.items()} | dict(given) | {"command": shlex.join(command)}
    walltime, notice = _seconds(values.get("walltime", "")), values.get("notice", "")
    if walltime is not None and notice.isdigit() and walltime <= int(notice):
        raise UserError(
            f"walltime={values['walltime']} is {walltime} s, and the job is told to stop {notice} s before it ends: "
            "give a longer one, or a shorter --set notice=SECONDS"
        )
    lines = [line for line in text.splitlines() if not _SETTING.fullmatch(line.rstrip())]
    # Not jinja2: shell code is full of {# and {% (as in ${#array[@]}), which it would read as its own.
    for missing in {found[1] for line in lines for found in _PLACE.finditer(line)} - values.keys():
        raise UserError(f"the script uses {{{{{missing}}}}} but has no line '#: {missing}=…' for it; add one")
    return _PLACE.sub(lambda found: values[found[1]], "\n".join(lines)) + "\n"


def _seconds(walltime: str) -> int | None:
    """Seconds of a Slurm time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for others, which sbatch judges."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", walltime)
    if not found:
        return None
    days, *numbers = (int(number or 0) for number in found.groups())
    units = (3600, 60, 1) if found[1] or found[4] else (60, 1, 0)
    return 86400 * days + sum(number * unit for number, unit in zip(numbers, units))


def _check_command(text: str, command: Sequence[str]) -> None:
    """`UserError` unless the script of `text` can run `dvla COMMAND…`."""
    if not command:
        raise UserError("no command to launch; give it after --: dvla launch torchrun -- train --from-cache C --out R")
    if unprintable := [word for word in command if printable(word) != word]:
        raise UserError(f"{shown(unprintable[0])} in the command holds control characters; leave them out")
    builds_cache = "--workers {{" in text
    if builds_cache and list(command[:2]) != ["cache", "build"]:
        raise UserError(f"this script builds a cache: begin the command with cache build; given: {shlex.join(command)}")
    if not builds_cache and command[0] not in TRAINING:
        raise UserError(
            f"'{command[0]}' cannot run on several processes; give {' or '.join(TRAINING)}"
            + (" (for a cache: --workers N, or the script slurm-cache)" if command[0] == "cache" else "")
        )
    for option in ("--workers", "--strategy"):
        if any(word.split("=")[0] == option for word in command) and f"{option} " in text:
            raise UserError(f"{option} is set by this script; leave it out of the command")


def launch(script: str) -> int:
    """Run a rendered script, or submit it if it is a Slurm job; returns the exit code.

    `UserError` without sbatch, or when it refuses the job."""
    slurm = "\n#SBATCH " in script
    program = "sbatch" if slurm else "bash"
    if shutil.which(program) is None:
        raise UserError(f"{program} is not installed; show the script with --print, or run this where {program} is")
    if slurm:
        done = subprocess.run([program], input=script, text=True, stderr=subprocess.PIPE)
        if done.returncode:
            reason = slurm_errors(done.stderr) or f"exit code {done.returncode}"
            raise UserError(f"Slurm refused the job: {reason}; change it with --set")
        sys.stderr.write(done.stderr)
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        process = subprocess.Popen([program, file.name])
        # The launcher passes SIGTERM on to its processes, which save a checkpoint.
        with handled(lambda number, frame: process.send_signal(number), (signal.SIGTERM,)):
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:  # Ctrl-C has reached the processes too
                    continue
