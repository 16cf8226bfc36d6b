"""Fuzz runs, checkpoints, policies, evaluations and VLM checkpoints: seeded damage, then every command that reads them.

    python tests/fuzz/fuzz_runs.py --count 1000 --seed 0
    python tests/fuzz/fuzz_runs.py --seed 0 --only 137     # one again, with all that it prints

Damage to documents and tensors has, more often than not, checksums that fit again: what only a forger could have done.
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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from dvla.stages.policy import Policy, checkpoint  # noqa: E402
from fixtures.make_landing import BUILDS, losses  # noqa: E402
from fuzz.bounded import bounded, in_child, run_bounded, trials  # noqa: E402
from fuzz.run_damage import COMMANDS, TOPS, Damage, damage, make_sample, seen  # noqa: E402

# right: each command gave what it gives for the undamaged files; refused: one line, exit code 2; changed: another
# result, from a value that nothing else vouches for; silent: another result although a checksum or the form of the
# file is broken; half: a refused command left something under the final name; the rest are faults, too.
OUTCOMES = ("right", "refused", "changed", "silent", "half", "traceback", "hang", "memory", "died")
FAULTS = OUTCOMES[3:]
FRESH = (*COMMANDS["stage_two"][:3], "--out", "fresh", "--init", "stage_two", *COMMANDS["stage_two"][5:])


@dataclass
class Outcome:
    """What came of one trial."""

    index: int
    damage: Damage
    result: str = "right"  # of OUTCOMES
    text: str = ""


def _act(folder: str, vlm: str | None = None) -> Callable[[], None]:
    def act() -> None:
        actions = Policy.from_pretrained(folder, device="cpu", vlm_path=vlm).act(*seen())
        print(np.asarray(actions, np.float64).round(6).tolist())

    return act


def _serve(folder: str) -> Callable[[], None]:
    def serve() -> None:
        from dvla.stages.serving.config import ServeConfig
        from dvla.stages.serving.server import PolicyServer, load_policy

        server = PolicyServer(load_policy(Path(folder), "cpu"), ServeConfig(), None, print)
        print(server.metadata["actions"], server.metadata["horizon"])

    return serve


def _lerobot() -> None:
    from dvla.stages.policy.lerobot.plugin import DvlaPolicy

    print(DvlaPolicy.from_pretrained("policy_lora").config.horizon)


def actions(top: str) -> dict[str, Any]:
    """What reads the folder `top`: name → a command line, or a function."""
    resume, stop = list(COMMANDS.get(top, ())), {"stage_two": "5", "stage_three": "3"}.get(top, "")
    look = {"report": ["report", top, "--out", "page.html"], "compare": ["compare", "stage_two", "stage_three"]}
    use = {
        "act": _act(top),
        "serve": _serve(top),
        "export": ["export", top, "--out", "out"],
        "push": ["push", top, "owner/name"],
    }
    if top == "stage_two":
        tuned = list(COMMANDS["stage_three"])
        tuned[3] = "fresh"
        more = {"init": [*FRESH, "--stop-after", "1"], "finetune": [*tuned, "--stop-after", "1"]}
        lerobot = {"lerobot": ["export", top, "--out", "out", "--format", "lerobot"]}
        return {"resume": [*resume, "--stop-after", stop], **look, **use, **more, **lerobot}
    if top == "stage_three":
        build = [word for word in BUILDS["cache_fp16"][:-1] if word not in ("--vlm", "tiny_qwen3vl")]
        adapted = {"adapted": [*build, "fresh", "--adapter", top]}
        return {"resume": [*resume, "--stop-after", stop], **look, **use, **adapted}
    if top == "eval":
        return {
            "report": ["report", "stage_two", "--out", "page.html", "--eval", top],
            "push": ["push", "policy", "owner/name", "--eval", top],
        }
    if top == "vlm":
        tuned = [*COMMANDS["stage_three"], "--stop-after", "3"]
        build = [*BUILDS["cache_fp16"][:-1], "fresh"]
        return {
            "build": build,
            "act": _act("policy", "vlm"),
            "resume": tuned,
            "export": ["export", "stage_three", *OUT],
        }
    return {**use, **({"lerobot": _lerobot} if top == "policy_lora" else {})}


OUT = ("--out", "out")
MADE = ("out", "page.html", "fresh")  # final names


def prepare() -> None:
    """No hub; one thread; what every process would import again."""
    import huggingface_hub
    import jinja2  # noqa: F401
    import lerobot.policies  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    from transformers.models.qwen3_vl import modeling_qwen3_vl  # noqa: F401

    from dvla.stages.policy.lerobot import plugin  # noqa: F401
    from dvla.stages.reports import compare, report  # noqa: F401
    from dvla.stages.serving import server  # noqa: F401
    from dvla.stages.training.stage_three import finetune  # noqa: F401

    class Hub:
        def create_repo(self, *_: Any, **__: Any) -> str:
            return "https://hub/owner/name"

        def upload_folder(self, folder_path: Path, **_: Any) -> None:
            assert (folder_path / "README.md").is_file()

    huggingface_hub.HfApi = Hub  # type: ignore[assignment, misc]
    torch.set_num_threads(1)


def digest(action: str, text: str) -> str:
    """What an action made, where that does not depend on the time."""
    if action in ("act", "serve"):
        return text
    made: list[Any] = []
    for run in ("stage_two", "stage_three") if action == "resume" else ("fresh",):
        found = checkpoint.checkpoints(Path(run))
        if action in ("resume", "init", "finetune") and found and (Path(run) / "log.jsonl").is_file():
            made += [losses(Path(run)), *(sorted(_crcs(found[-1]).items()))]
    if action in ("export", "lerobot") and Path("out").is_dir():
        document = json.loads((Path("out") / "policy.json").read_text())
        del document["encoder"]["fingerprint"]  # whoever acts compares it with the VLM
        del document["conditions"]["masking"]  # a record that nothing acts on
        made += [*sorted(_crcs(Path("out")).items()), *({**d, "config": None} for d in document.pop("datasets"))]
        made.append(document)
    if action in ("build", "adapted") and (Path("fresh") / "manifest.json").is_file():
        made += [json.loads((Path("fresh") / "manifest.json").read_text())["files"]]
    return str(made)


def _crcs(folder: Path) -> dict[str, tuple[int, int]]:
    from dvla.common.files import file_crc32c

    return {p.name: file_crc32c(p) for p in folder.glob("*.safetensors")}


def run_actions(
    sample: Path, folder: Path, names: dict[str, Any], spoil: Callable[[], Damage] | None
) -> Iterator[tuple[str, str, str, str]]:
    """(action, outcome, text, digest) of each action on a copy of `sample`, damaged by `spoil`."""
    for name, action in names.items():
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sample, folder, symlinks=True)
        if spoil:
            spoil()
        os.chdir(folder)
        result, text = bounded(action) if callable(action) else run_bounded(action)
        if result == "refused" and any(Path(made).exists() for made in MADE) and name not in ("init", "finetune"):
            result = "half" if name not in ("build", "adapted") else result  # a build is resumed
        yield name, result, text, digest(name, text) if result == "right" else ""


def fuzz(count: int, seed: int, where: Path, only: int | None = None, most: int = 3) -> Iterator[Outcome]:
    """The outcomes of `count` trials, in order, each of at most `most` actions; `where`: a folder for temporary
    files."""
    sample, folder = where / "sample", where / "damaged"
    sample.mkdir()
    numbers = range(count) if only is None else [only]
    plans: dict[int, tuple[str, list[str]]] = {}  # number → the folder that is damaged, the actions
    for number in numbers:
        every = actions(top := random.Random(f"{seed} {number}").choice(TOPS))  # the first that `damage` draws
        plans[number] = top, random.Random(f"{number} {seed}").sample(sorted(every), min(most, len(every)))
    needed = {top: {name for of, names in plans.values() if of == top for name in names} for top in TOPS}

    def reference(send: Callable[[Any], None]) -> None:
        try:
            make_sample(sample)
        except BaseException as error:
            send(repr(error))
            return
        own = {top: {n: a for n, a in actions(top).items() if n in names} for top, names in needed.items()}
        send({top: {n: (r, t, d) for n, r, t, d in run_actions(sample, folder, of, None)} for top, of in own.items()})

    sound = next(in_child(reference), None)
    for top, found in sound.items() if isinstance(sound, dict) else ():
        if wrong := {n: x for n, x in found.items() if x[0] != "right"}:
            raise SystemExit(f"the undamaged {top} gives {wrong}")
    if not isinstance(sound, dict):
        raise SystemExit(f"no sample: {sound}")

    def trial(number: int, announce: Callable[[Damage], None]) -> Outcome:
        def spoil() -> Damage:
            return damage(folder, random.Random(f"{seed} {number}"))

        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sample, folder)
        announce(done := spoil())
        top, chosen = plans[number]
        out = Outcome(number, done)
        for name, result, text, made in run_actions(sample, folder, {n: actions(top)[n] for n in chosen}, spoil):
            if result == "right" and made != sound[top][name][2]:
                vouched = done.kind == "form" or not done.forged and done.file.startswith(CHECKED)
                result, text = ("silent" if vouched else "changed"), f"another result: {text[-300:]}"
            if OUTCOMES.index(result) > OUTCOMES.index(out.result):
                out.result, out.text = result, f"{name}: {text}"
            if result in ("hang",):
                break
        return out

    for number, done, found in trials(numbers, trial, lambda found: found.result == "hang"):
        if isinstance(found, str):
            found = Outcome(number, done or Damage("", "none", ""), "hang" if found == "hang" else "died", found)
        yield found


CHECKED = ("stage_two/checkpoints/step-", "stage_three/checkpoints/step-", "policy/", "policy_lora/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actions", type=int, default=3, help="commands of a trial, at most")
    parser.add_argument("--only", type=int, help="this trial alone, with all that it gives")
    parser.add_argument("--out", type=Path, help="JSON lines to append to: what came of each trial")
    asked = parser.parse_args()
    prepare()
    counts, began, fast = Counter[str](), time.monotonic(), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as where:
        for found in fuzz(asked.count, asked.seed, Path(where), asked.only, asked.actions):
            counts[found.result] += 1
            if asked.only is not None:
                print(found.damage, found.result, found.text, sep="\n")
            if asked.out:
                line = {"seed": asked.seed, "index": found.index, "result": found.result, **vars(found.damage)}
                with asked.out.open("a") as out:
                    out.write(json.dumps({**line, "text": found.text[-3000:]}) + "\n")
    print(" ".join(f"{o:>10}" for o in OUTCOMES))
    print(" ".join(f"{counts[o]:>10}" for o in OUTCOMES), f"{time.monotonic() - began:.0f} s")
    sys.exit(any(counts[o] for o in FAULTS))


if __name__ == "__main__":
    main()
