"""One command on a machine that refuses something: a full or read-only disk, no permission, few files, no folder."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.bounded import Hang, in_child

MACHINES = (
    "full disk",
    "read-only disk",
    "small files",
    "nobody",
    "unreadable",
    "few files",
    "deleted folder",
    "closed pipe",
    "full output",
    "no home",
    "read-only home",
    "no temp folder",
    "little memory",
    "closed input",
    "file for folder",
)
# What a command writes besides, so that there is something to refuse.
WRITES: dict[str, list[str]] = {
    "cache status": ["--json", "new.json"],
    "cache inspect": ["--out", "new", "--html", "new.html"],
    "cache diff": ["--json", "new.json"],
    "cache gc": ["--yes"],
    "cache plan": ["--json", "new.json"],
    "bench latency": ["--json", "new.json"],
    "data check": ["--out", "new.json"],
    "data stats": ["--out", "new.json"],
    "compare": ["-o", "new.html"],
    "eval": ["--out", "new"],
}


def on_machine(machine: str, line: list[str], work: Path, rng: random.Random) -> tuple[str, str]:
    """(outcome, what was printed) of one command line of `dvla`, as its own process would end."""
    line = [*line, *WRITES.get(" ".join(line[:2]), WRITES.get(line[0], []))]
    place = work
    if machine in ("full disk", "read-only disk"):
        place = work.parent / "mounted"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place]).returncode:
            machine, place = "small files", work  # a container without the right to mount
    if place != work:
        special = shutil.ignore_patterns("fifo*", "socket")
        shutil.copytree(work, place, symlinks=True, dirs_exist_ok=True, ignore=special)
        if machine == "full disk":
            free = shutil.disk_usage(place).free
            (place / ".filler").write_bytes(bytes(max(0, free - rng.choice((0, 4096, 40960, 300_000)))))
        else:
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    if machine == "unreadable":
        for path in rng.sample(found := sorted(p for p in work.rglob("*") if not p.is_symlink()), min(len(found), 40)):
            path.chmod(0)
    if machine == "file for folder":
        line = [
            f"words.txt/{w}"
            if w.startswith(("new", "data", "cache", "run", "policy")) and rng.random() < 0.6 and i > 1
            else w
            for i, w in enumerate(line)
        ]
    before = {p for p in place.rglob("*")}
    try:
        pipes = [os.pipe() for _ in "oe"]
        for _, give in pipes:
            fcntl.fcntl(give, fcntl.F_SETPIPE_SZ, 1 << 20)
        code: Any = "hang"
        for value in in_child(lambda send: send(_run(machine, line, place, [give for _, give in pipes], rng))):
            code = value
        out, err = map(_said, pipes)
        halves = [str(p) for p in place.rglob("*") if p not in before and _half(p)]
    finally:
        if place != work:
            subprocess.run(["umount", "-l", place], check=True)
    text = f"code {code}\n{out[-1500:]}\n--- standard error\n{err[-3000:]}"
    if isinstance(code, str):
        return ("hang" if code == "hang" else "died"), text
    lines = [x for x in err.splitlines() if x.startswith("error: ")]
    if "Traceback" in err or "Exception ignored" in err or code not in (0, 1, 2, 130) or code == 2 and len(lines) != 1:
        return "traceback", text
    if halves:
        return "half file", f"{halves}\n{text}"
    return ("refused" if code == 2 else "right"), text


def _said(pipe: tuple[int, int]) -> str:
    os.close(pipe[1])
    with open(pipe[0], "rb") as file:
        return file.read().decode(errors="replace")


def _half(path: Path) -> bool:
    """Whether something stands under a final name that is not complete."""
    if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in path.parts[-3:]):
        return False
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (ValueError, OSError):
            return True
    return path.suffix in (".html", ".yaml", ".mp4", ".png", ".md") and not path.stat().st_size


def _run(machine: str, line: list[str], place: Path, outputs: list[int], rng: random.Random) -> int:
    """The exit code of `dvla LINE` in this process."""
    os.chdir(place)
    for number, give in enumerate(outputs, 1):
        os.dup2(give, number)
    BREAK[machine](rng, place)
    signal.alarm(60)
    from dvla import cli
    from dvla.common import console

    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, os.fdopen(number, "w", buffering=1 if number == 2 else -1))
    console.console.file, console.errors.file = sys.stdout, sys.stderr
    sys.argv = ["dvla", *line]
    code: object = 0
    try:
        cli.main()
    except SystemExit as error:
        code = error.code or 0
    except (Hang, MemoryError):
        raise
    except BaseException:
        import traceback

        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        traceback.print_exc()
        code = 99
    with contextlib.suppress(BaseException):
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, f"Exception ignored at the end: {error!r}\n".encode())
    return code if isinstance(code, int) else 99


def _nobody(rng: random.Random, place: Path) -> None:
    """Root without its power over the files of others, which these are; Python's own stay readable."""
    for path in [place, place.parent, *place.rglob("*")]:
        os.chown(path, 65533, 65533, follow_symlinks=False)
    libc, header, held = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, held)
    for at in (0, 1):  # effective, permitted: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        held[at] &= ~0b1110
    if libc.capset(header, held):
        raise OSError("capset failed")


def _few_files(rng: random.Random, place: Path) -> None:
    used, most = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + rng.randrange(0, 12), most))


def _memory(rng: random.Random, place: Path) -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    now = next(int(x.split()[1]) << 10 for x in status if x.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + rng.choice((1, 10, 40)) * 2**20, resource.RLIM_INFINITY))


def _deleted(rng: random.Random, place: Path) -> None:
    here = Path(tempfile.mkdtemp())
    os.chdir(here)
    here.rmdir()


def _closed_pipe(rng: random.Random, place: Path) -> None:
    receive, give = os.pipe()
    os.close(receive)
    os.dup2(give, 1)


def _full_output(rng: random.Random, place: Path) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _environment(**changes: str) -> Callable[[random.Random, Path], None]:
    def change(rng: random.Random, place: Path) -> None:
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)
        os.environ.update(changes)
        tempfile.tempdir = None

    return change


BREAK: dict[str, Callable[[random.Random, Path], None]] = {
    "full disk": lambda rng, place: None,
    "read-only disk": lambda rng, place: None,
    "small files": lambda rng, place: resource.setrlimit(
        resource.RLIMIT_FSIZE, (rng.choice((0, 1, 4096, 50_000)), resource.RLIM_INFINITY)
    ),
    "nobody": _nobody,
    "unreadable": _nobody,
    "few files": _few_files,
    "deleted folder": _deleted,
    "closed pipe": _closed_pipe,
    "full output": _full_output,
    "no home": _environment(HOME="/none/of/it"),
    "read-only home": _environment(HOME="/proc/1"),
    "no temp folder": _environment(TMPDIR="/none/of/it"),
    "little memory": _memory,
    "closed input": lambda rng, place: os.close(0),
    "file for folder": lambda rng, place: None,
}
