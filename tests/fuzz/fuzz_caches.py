"""Fuzz caches: seeded mutations of a finished cache, an unfinished one, an export and a copy of a remote one, through
every command that reads them.

    python tests/fuzz/fuzz_caches.py --count 500 --seed 0
    python tests/fuzz/fuzz_caches.py --sample int8 --seed 0 --only 137     # one again, with all that it prints
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dvla.cache.loader.provenance import config_of  # noqa: E402
from dvla.cache.store import locations  # noqa: E402
from dvla.cache.store.cache import Cache  # noqa: E402
from dvla.cache.store.checksums import verify_checksums  # noqa: E402
from dvla.common.fingerprint import canonical, digest  # noqa: E402
from dvla.errors import UserError  # noqa: E402
from dvla.stages.caching import build_plan  # noqa: E402
from dvla.stages.caching.upkeep import verify  # noqa: E402
from dvla.stages.policy.robot import RobotInterface, describe_dataset  # noqa: E402
from dvla.stages.training.checks import require_trainable  # noqa: E402
from dvla.stages.training.config import TrainConfig  # noqa: E402
from dvla.stages.training.train import open_cache, policy_document, policy_net  # noqa: E402
from fuzz.bounded import bounded, run_bounded, trials  # noqa: E402
from fuzz.cache_mutations import damage  # noqa: E402
from fuzz.mutations import Mutation  # noqa: E402
from fuzz.trial import prepare  # noqa: E402
from support import hdf5_samples  # noqa: E402

# right: everything as before; refused: one line from at least one command; changed: another cache, whose checksums were
# made anew, or copies of a remote one, which `verify` does not see; silent: other content although `verify` calls the
# cache intact, or from a copy that was called intact; the rest are faults.
OUTCOMES = ("right", "refused", "changed", "silent", "traceback", "hang", "memory", "died")
FAULTS = OUTCOMES[3:]
PATIENCE = 2.0  # of a URL that does not answer, in seconds
CHOSEN = 3  # commands of a trial, besides `verify` and reading everything
NEW = ["--batch-size", "8", "--device", "cpu", "--shard-frames", "8"]


@dataclass(frozen=True)
class Sample:
    """A healthy cache in one form, and what reads it. `{x}`: the damaged one, `{ok}`: the healthy, `{new}`: a new
    folder."""

    build: tuple[str, ...]
    commands: tuple[str, ...]
    finished: bool = True


READING = (
    *("cache status {x}", "cache status {x} --json {new}", "cache inspect {x}", "cache inspect {x} --out {new}"),
    *(
        "cache inspect {x} --html {new}.html",
        "cache diff {x} {ok}",
        "cache diff {ok} {x}",
        "cache export {x} --out {new}",
    ),
    *("cache push {x} local://{new}", "cache pull local://{x} --out {new}", "train {x}", "mirror {x}"),
    *("cache gc {x} --yes", "cache repair {x} --device cpu", "cache plan {source} --update --out {x} --pilot 2"),
    *(
        "cache build {source} --update --out {x}",
        "cache build {source} --append --out {x}",
        "cache build {source} --out {x}",
    ),
)
SAMPLES = {
    "fp16": Sample((), READING),
    "int8": Sample(("--dtype", "int8", "--compression", "zstd", "--frame-stride", "2"), READING),
    "unfinished": Sample((), (*READING[:3], *READING[12:14], READING[-1]), False),
    "export": Sample(
        (), ("cache import {x} --out {new}", "train {x}", "cache export {ok} --out {x} --shard-size 20kB"), False
    ),
    "mirror": Sample((), ("copy {x}",), False),
    "pulling": Sample((), ("cache pull local://{ok} --out {x}",), False),
}


def write(sample: Sample, name: str, root: Path) -> None:
    """The healthy cache at `root`/ok, and in the sample's form at `root`/whole."""
    source, ok, whole = root / "can.hdf5", root / "ok", root / "whole"
    hdf5_samples.write_robomimic(source)
    _must("cache", "build", str(source), "--out", str(ok), *NEW, *sample.build)
    if name == "export":
        _must("cache", "export", str(ok), "--out", str(whole), "--shard-size", "20kB")
    elif name == "mirror":
        Cache.open(f"local://{ok}", local=whole)
    else:
        shutil.copytree(ok, whole)
    if name == "unfinished":
        (whole / "manifest.json").unlink()
        next(iter(sorted((whole / ".commits").rglob("0.json")))).unlink()
        (whole / ".x.tmp-0123").write_bytes(b"x")
    elif name == "pulling":
        data = (whole / "manifest.json").read_bytes()
        (whole / "manifest.json").unlink()
        from dvla.common.files import crc32c

        (whole / ".pulling").write_text(f"{crc32c(data):08x} local://{ok}\n")


def _must(*arguments: str) -> None:
    outcome, text = run_bounded(list(arguments))
    if outcome != "right":
        raise SystemExit(f"{arguments}: {outcome} {text}")


@dataclass
class Outcome:
    """What came of one mutation."""

    index: int
    mutation: Mutation
    result: str = "right"
    text: str = ""


def examine(root: Path, sample: Sample, name: str, index: int, mutation: Mutation, seed: str) -> Outcome:
    """Run `verify`, read everything, and a few of the sample's commands, on `root`/x."""
    found, rng, new = Outcome(index, mutation), random.Random(seed), root / "new"
    known = json.loads((root / "content.json").read_text()) if (root / "content.json").exists() else None
    commands = list(sample.commands)
    rng.shuffle(commands)
    first = ["cache verify {x}", "read {x}"] if sample.finished else []
    sound, other = False, ""
    for line in [*first, *commands[:CHOSEN]]:
        _clear(new)
        damaged = root / "x"
        if any(word in line for word in ("repair", "gc", "build", "export {ok}", "pull local://{ok}")):
            damaged = root / "changing"
            _clear(damaged)
            shutil.copytree(root / "x", damaged, symlinks=True, copy_function=_copy)
        result, text, content = _run(
            line, {"x": damaged, "ok": root / "ok", "new": new, "source": root / "can.hdf5"}, sample.build
        )
        if result in FAULTS:
            found.result, found.text = result, f"{line}: {text}"
            return found
        if line.startswith("cache verify"):
            sound = result == "right" and "all files are intact" in text
        if known is not None and content is not None and content != known:
            other = line
        if result == "refused" or (line.startswith("cache verify") and not sound):
            found.result, found.text = "refused", f"{line}: {text}"
    if other and found.result != "refused":
        found.result = "changed" if mutation.sound or other.startswith("copy") else "silent"
        found.text = f"{other} gives other content"
    return found


def _copy(source: str, target: str) -> None:
    """A file, or a pipe for what is none."""
    if Path(source).is_file():
        shutil.copy2(source, target)
    else:
        os.mkfifo(target)


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _run(line: str, where: dict[str, Path], build: tuple[str, ...]) -> tuple[str, str, Any]:
    """(outcome, text, content of the cache that was read or made, None where it was not)."""
    words = line.split()
    path, content = str(where["x"]), []

    def read() -> None:
        if words[0] == "copy":
            content.append(content_of(Cache.open(f"local://{where['ok']}", local=path)))
            return
        if words[0] == "mirror":
            content.append(content_of(Cache.open(f"local://{path}", local=where["new"])))
            return
        if words[0] == "read":
            content.append(content_of(Cache.open(path)))
            return
        config = TrainConfig(path, str(where["new"]), model_size="tiny", dit={"horizon": 4})
        cache = open_cache(config, None)
        require_trainable(config, cache)
        policy_document(policy_net(config, cache), cache, config)
        for d in cache.datasets:
            RobotInterface(describe_dataset(d))
            config_of(d.attributes)
        content.append(content_of(cache))

    if words[0] in ("read", "train", "mirror", "copy"):
        outcome, text = bounded(read)
        return outcome, text, content[0] if content else None
    arguments = [word.format(**where) for word in words]
    if words[:2] in (["cache", "build"], ["cache", "plan"]):
        arguments += [*NEW, *build]
    outcome, text = run_bounded(arguments)
    made = {"repair": path, "build": path, "import": where["new"], "pull": arguments[-1]}.get(words[1])
    if outcome == "right" and made is not None:
        try:
            intact = not verify_checksums(made)
            if not intact and words[1] == "build":  # it trusts sizes; `verify` tells
                return outcome, text, None
            return outcome, text, content_of(Cache.open(made)) if intact else "not intact"
        except UserError as error:
            return "refused", str(error), None
        except Exception:
            return "traceback", f"of what it made: {traceback.format_exc()}", None
    return outcome, text, None


def content_of(cache: Cache) -> list[Any]:
    """Digest of all that a cache gives."""
    found: list[Any] = [len(cache), cache.tokens, cache.width, digest(cache.fingerprint)]
    for d in cache.datasets:
        crc = zlib.crc32(canonical({d.name: d.attributes}).encode())
        arrays = [d.action, d.proprio, d.timestamp, d.text, d.text_length, d.null_text, d.null_features, d.action_mask]
        arrays += [d.episode_start, d.episode_length, d.episode_id, d.episode_instruction, d.quarantined]
        for array in arrays:
            crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
        rows = d.frame_of(np.arange(d.observations))
        for view in d.views:
            crc = zlib.crc32(d.features(view, rows).tobytes(), crc)
        found.append(crc)
    samples = cache.dataset()
    picked = [samples[i] for i in range(0, len(samples), 5)]
    found.append(zlib.crc32(b"".join(s[key].numpy().tobytes() for s in picked for key in sorted(s))))
    return found


def fuzz(name: str, count: int, seed: int, where: Path, only: int | None = None) -> Iterator[Outcome]:
    """The outcomes of `count` mutations of a sample, in order."""
    sample, root = SAMPLES[name], where / name
    root.mkdir()
    write(sample, name, root)
    content = content_of(Cache.open(root / "ok"))
    (root / "content.json").write_text(json.dumps(content))

    def trial(number: int, announce: Callable[[Mutation], None]) -> Outcome:
        _clear(root / "x")
        shutil.copytree(root / "whole", root / "x")
        words = f"{name} {seed} {number}"
        announce(mutation := damage(root / "x", random.Random(words)))
        return examine(root, sample, name, number, mutation, words)

    for number, mutation, found in trials(
        range(count) if only is None else [only], trial, lambda found: found.result == "hang"
    ):
        if isinstance(found, str):
            result = "hang" if found == "hang" else "died"
            found = Outcome(number, mutation or Mutation("", "none"), result, found)
        yield found


def prepare_caches() -> None:
    """Put the stand-in in the place of the encoder, also of repairs."""
    prepare()
    locations.PATIENCE = PATIENCE
    vars(verify)["load_encoder"] = build_plan.load_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="append", choices=list(SAMPLES), help="default: all")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this mutation alone, with all that it gives")
    parser.add_argument("--out", type=Path, help="JSON lines to append to: what came of each mutation")
    asked = parser.parse_args()
    prepare_caches()
    fast = Path("/dev/shm")
    print(f"{'sample':<12}{'seconds':>8} " + "".join(f"{o:>10}" for o in OUTCOMES), flush=True)
    bad = 0
    for name in asked.sample or SAMPLES:
        counts, began = Counter[str](), time.monotonic()
        with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as where:
            for found in fuzz(name, asked.count, asked.seed, Path(where), asked.only):
                counts[found.result] += 1
                if asked.only is not None:
                    print(found.mutation, found.result, found.text, sep="\n")
                if asked.out:
                    line = {"sample": name, "seed": asked.seed, "index": found.index, "result": found.result}
                    line |= {"file": found.mutation.file, "what": found.mutation.what}
                    with asked.out.open("a") as out:
                        out.write(json.dumps({**line, "text": found.text[-3000:]}) + "\n")
        bad += sum(counts[o] for o in FAULTS)
        numbers = "".join(f"{counts[o]:>10}" for o in OUTCOMES)
        print(f"{name:<12}{time.monotonic() - began:>8.0f} {numbers}", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
