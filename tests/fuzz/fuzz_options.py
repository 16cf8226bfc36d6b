"""Fuzz the command line: hostile values of every option, setting and recipe, and machines that refuse.

    python tests/fuzz/fuzz_options.py --count 2000 --seed 0
    python tests/fuzz/fuzz_options.py --kind machine --seed 0 --only 17     # one again, with all that it prints

A trial is one command on tiny data. Work that is merely long is stopped where it begins: the options were accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.bounded import run_bounded, trials  # noqa: E402
from fuzz.machine import MACHINES, on_machine  # noqa: E402
from fuzz.option_samples import FILES, LINES, cut_short, few_steps, special_files, values_of  # noqa: E402
from fuzz.option_values import SETTINGS, hostile, mutated_document  # noqa: E402

OUTCOMES = ("right", "refused", "traceback", "hang", "memory", "died", "half file")
FAULTS = OUTCOMES[2:]
KINDS = ("option", "setting", "document", "machine")


@dataclass
class Outcome:
    """What came of one trial."""

    index: int
    kind: str
    line: list[str]
    result: str = "right"
    text: str = ""


def options_of(command: str) -> list[tuple[str, str]]:
    """(name, type) of every option and argument of a command, as cli_options.json lists them."""
    frozen = json.loads((Path(__file__).parents[1] / "project" / "cli_options.json").read_text())
    compiled = ("--compile",)  # takes half a minute
    return [
        (names.split()[0].split("/")[0], what.split(",")[0])
        for names, what in frozen[command].items()
        if names not in compiled
    ]


def drawn(rng: random.Random, kind: str, work: Path) -> tuple[list[str], str]:
    """One command line, and the machine's fault ("": none)."""
    if kind == "document":
        return mutated_document(rng, work), ""
    command = rng.choice([c for c in LINES for _ in range(1 + len(options_of(c)) // 4)])
    words, given = command.split(), dict(LINES[command])
    if kind == "machine":
        return [*words, *_typed(given)], rng.choice(MACHINES)
    if kind == "setting":
        command = rng.choice(list(SETTINGS))
        words, given = command.split(), dict(LINES[command])
        name, value = rng.choice(SETTINGS[command]()), hostile(rng, "any")
        extra = rng.choice([["--set", f"{name}={value}"], [f"--{name}={value}"]])
        if rng.random() < 0.1:
            extra = ["--set", hostile(rng, "any")]
        if command == "launch":  # what follows its "--" is another command
            return [*words, *extra, *_typed(given)], ""
        return [*words, *_typed(given), *extra], ""
    for name, what in rng.sample(options_of(command), min(len(options_of(command)), rng.choice((1, 1, 1, 2)))):
        if what == "bool":
            given[name] = None
        else:
            given[name] = hostile(rng, what, values_of(name, what))
    return [*words, *_typed(given)], ""


def _typed(given: dict[str, str | list[str] | None]) -> list[str]:
    """Options and arguments as words."""
    words: list[str] = []
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            if name.startswith("-"):
                words += [name] if one is None else [name, one]
            elif one is not None:
                words.append(one)
    return words


def fuzz(kind: str, count: int, seed: int, base: Path, where: Path, only: int | None = None) -> Iterator[Outcome]:
    """The outcomes of `count` trials of a kind, in order; `where`: a folder for temporary files."""
    folder = where / "trial"

    def trial(number: int, announce: Callable[[list[str]], None]) -> Outcome:
        work = folder / "deep" / "er"
        shutil.rmtree(folder, ignore_errors=True)
        work.mkdir(parents=True)
        for name in FILES:
            (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, work / name)
        special_files(work, base)
        rng = random.Random(f"{kind} {seed} {number}")
        line, machine = drawn(rng, kind, work)
        shown = [word if len(word) < 400 else f"{word[:40]}… {len(word)}" for word in line]
        shown += [f"# {machine}"] if machine else []
        announce(shown)
        few_steps()
        os.chdir(work)
        result, text = on_machine(machine, line, work, rng) if machine else run_bounded(line)
        found = Outcome(number, kind, shown, result, text[-6000:])
        os.chdir(where)
        return found

    numbers = range(count) if only is None else [only]
    for number, line, found in trials(numbers, trial, lambda found: found.result == "hang"):
        if isinstance(found, str):
            found = Outcome(number, kind, line or [], "hang" if found == "hang" else "died", found)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: all")
    parser.add_argument("--count", type=int, default=1000, help="trials of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this trial alone, with all that it gives")
    parser.add_argument("--samples", type=Path, help="folder of samples, made where there is none; default: anew")
    parser.add_argument("--out", type=Path, help="JSON lines to append to: what came of each trial")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    fast = Path("/dev/shm")
    print(f"{'kind':<10}{'seconds':>8} " + "".join(f"{o:>10}" for o in OUTCOMES), flush=True)
    bad = 0
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None, ignore_cleanup_errors=True) as where:
        base = asked.samples or Path(where) / "base"
        if not base.is_dir():
            samples = [sys.executable, str(Path(__file__).with_name("option_samples.py")), str(base)]
            subprocess.run(samples, check=True, stdout=subprocess.DEVNULL)
        Path(where).chmod(0o755)
        cut_short()
        for kind in asked.kind or KINDS:
            counts, began = Counter[str](), time.monotonic()
            for found in fuzz(kind, asked.count, asked.seed, base, Path(where), asked.only):
                counts[found.result] += 1
                if asked.only is not None:
                    print(found.line, found.result, found.text, sep="\n")
                if asked.out:
                    line = {"kind": kind, "seed": asked.seed, "index": found.index, "result": found.result}
                    with asked.out.open("a") as out:
                        out.write(json.dumps({**line, "line": found.line, "text": found.text[-4000:]}) + "\n")
            bad += sum(counts[o] for o in FAULTS)
            numbers = "".join(f"{counts[o]:>10}" for o in OUTCOMES)
            print(f"{kind:<10}{time.monotonic() - began:>8.0f} {numbers}", flush=True)
    with contextlib.suppress(OSError):
        os.chdir("/")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
