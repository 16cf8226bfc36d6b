"""Fuzz the readers: seeded mutations of a tiny dataset of each format, through `show`, `check` and `build`.

    python tests/fuzz/fuzz_readers.py --format lerobot-v21 --count 2000 --seed 0
    python tests/fuzz/fuzz_readers.py --format lerobot-v21 --seed 0 --only 137     # one again, with all that it prints

Each process does a few dozen mutations under limits of time and memory, so that one that dies or hangs costs only
itself and is counted. `python` runs the `dvla` that it finds: another checkout is tried with PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.fuzz_samples import FORMATS  # noqa: E402
from fuzz.mutations import Mutation  # noqa: E402
from fuzz.trial import FAULTS, MOST_NBYTES, OUTCOMES, Outcome, damaged, examine, judge, prepare  # noqa: E402

BATCH = 40  # mutations of one process
WALL_SECONDS = 60.0  # without a word of it, on a machine that may be busy


def fuzz(name: str, count: int, seed: int, where: Path, only: int | None = None) -> Iterator[Outcome]:
    """The outcomes of `count` mutations of the format `name`, in order; `where`: a folder for temporary files."""
    sample = where / name
    sample.mkdir()
    dataset = FORMATS[name].write(sample)
    sound = _reference(sample, dataset, where)
    todo = list(range(count)) if only is None else [only]
    while todo:
        for found in _batch(name, dataset, sample, todo[:BATCH], seed, sound):
            del todo[0]
            yield found


def _reference(sample: Path, dataset: str, where: Path) -> Outcome:
    """What the undamaged dataset gives."""
    (found,) = _in_child(lambda send: send(examine(sample, dataset, -1, Mutation("", "none"))), 1)
    if not isinstance(found, Outcome) or not found.content:
        raise SystemExit(f"the undamaged {dataset} cannot be built: {found}")
    shutil.rmtree(where / f"{sample.name}.cache")
    return found


def _batch(name: str, dataset: str, sample: Path, numbers: list[int], seed: int, sound: Outcome) -> Iterator[Outcome]:
    """The outcomes of these mutations, up to the first one that ended its process."""
    folder = sample.with_name(f"{name}.damaged")

    def work(send) -> None:  # type: ignore[no-untyped-def]
        for number in numbers:
            mutation = damaged(sample, folder, f"{name} {seed} {number}")
            send(mutation)
            found = judge(examine(folder, dataset, number, mutation), sound, FORMATS[name])
            found.content = {}
            send(found)
            if found.result == "hang":
                return  # its threads may go on

    mutation, done = Mutation("", "none"), 0
    for said in _in_child(work, len(numbers)):
        if isinstance(said, Outcome):
            done += 1
            yield said
            if said.result == "hang":
                return
        elif isinstance(said, Mutation):
            mutation = said
        elif done < len(numbers):
            yield Outcome(numbers[done], mutation, "hang" if said == "hang" else "died", text=str(said))


def _in_child(work, most: int) -> Iterator[object]:  # type: ignore[no-untyped-def]
    """What `work(send)` sends from a process of its own; at its end "hang", or the signal that killed it."""
    receive, give = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(receive)
            _limit()
            with open(give, "wb") as pipe:

                def send(value: object) -> None:
                    pickle.dump(value, pipe)
                    pipe.flush()

                work(send)
        finally:
            os._exit(0)
    os.close(give)
    with open(receive, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], WALL_SECONDS)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                yield "hang"
                return
            try:
                yield pickle.load(pipe)
            except (EOFError, pickle.UnpicklingError):
                break
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        yield signal.Signals(os.WTERMSIG(status)).name


def _limit() -> None:
    """Room for 2 GiB more than now; no core files; what C libraries print goes nowhere."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + MOST_NBYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not os.environ.get("FUZZ_LOUD"):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", action="append", choices=list(FORMATS), help="default: all")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this mutation alone, with all that it gives")
    parser.add_argument("--out", type=Path, help="JSON lines to append to: what came of each mutation")
    asked = parser.parse_args()
    prepare()
    fast = Path("/dev/shm")  # no disk waits for these files
    print(f"{'format':<16}{'seconds':>8} " + "".join(f"{o:>10}" for o in OUTCOMES) + f"{'unforeseen':>12}", flush=True)
    bad = 0
    for name in asked.format or FORMATS:
        counts, unforeseen, began = Counter[str](), 0, time.monotonic()
        with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as where:
            for found in fuzz(name, asked.count, asked.seed, Path(where), asked.only):
                counts[found.result] += 1
                unforeseen += found.unforeseen
                if asked.only is not None:
                    print(found.mutation, found.result, found.text, sep="\n")
                if asked.out:
                    line = {"format": name, "seed": asked.seed, "index": found.index, "result": found.result}
                    line |= {"unforeseen": found.unforeseen, "file": found.mutation.file, "what": found.mutation.what}
                    with asked.out.open("a") as out:
                        out.write(json.dumps({**line, "text": found.text[-3000:]}) + "\n")
        bad += sum(counts[o] for o in FAULTS)
        seconds = time.monotonic() - began
        numbers = "".join(f"{counts[o]:>10}" for o in OUTCOMES)
        print(f"{name:<16}{seconds:>8.0f} {numbers}{unforeseen:>12}", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
