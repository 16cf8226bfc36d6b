"""Fuzz the readers: seeded mutations of a tiny dataset of each format, through `show`, `check` and `build`.

    python tests/fuzz/fuzz_readers.py --format lerobot-v21 --count 2000 --seed 0
    python tests/fuzz/fuzz_readers.py --format lerobot-v21 --seed 0 --only 137     # one again, with all that it prints

Each process does a few dozen mutations under limits of time and memory, so that one that dies or hangs costs only
itself and is counted. `python` runs the `dvla` that it finds: another checkout is tried with PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.bounded import in_child, trials  # noqa: E402
from fuzz.fuzz_samples import FORMATS  # noqa: E402
from fuzz.mutations import Mutation  # noqa: E402
from fuzz.trial import FAULTS, OUTCOMES, Outcome, damaged, examine, judge, prepare  # noqa: E402


def fuzz(name: str, count: int, seed: int, where: Path, only: int | None = None) -> Iterator[Outcome]:
    """The outcomes of `count` mutations of the format `name`, in order; `where`: a folder for temporary files."""
    sample = where / name
    sample.mkdir()
    dataset = FORMATS[name].write(sample)
    sound = _reference(sample, dataset, where)
    folder = sample.with_name(f"{name}.damaged")

    def trial(number: int, announce: Callable[[Mutation], None]) -> Outcome:
        announce(mutation := damaged(sample, folder, f"{name} {seed} {number}", FORMATS[name].only))
        found = judge(examine(folder, dataset, number, mutation), sound, FORMATS[name])
        found.content = {}
        return found

    numbers = range(count) if only is None else [only]
    for number, mutation, found in trials(numbers, trial, lambda found: found.result == "hang"):
        if isinstance(found, str):
            result = "hang" if found == "hang" else "died"
            found = Outcome(number, mutation or Mutation("", "none"), result, text=found)
        yield found


def _reference(sample: Path, dataset: str, where: Path) -> Outcome:
    """What the undamaged dataset gives."""
    (found,) = in_child(lambda send: send(examine(sample, dataset, -1, Mutation("", "none"))))
    if not isinstance(found, Outcome) or not found.content:
        raise SystemExit(f"the undamaged {dataset} cannot be built: {found}")
    shutil.rmtree(where / f"{sample.name}.cache")
    return found


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
