"""Cards for the hub: what a policy is, its data and their licenses, what was measured and what it cannot do.

A card is a function of stored documents: what was not measured is reported as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ... import __version__
from ...cache.actions.history import history_of
from ...cache.vlm.spec import features_in_words
from ...common.config import from_mapping
from ...common.hub import HUB_ID
from ...common.text import markdown
from ...drifting.heads import sample_steps
from ...drifting.losses import LossConfig

NON_COMMERCIAL = re.compile(r"(?i)\bNC\b|non.?commercial")
PERMISSIVE = {"mit": "mit", "apache-2.0": "apache-2.0", "cc-by-4.0": "cc-by-4.0"}  # as the hub writes them
LIMITS = """
- It knows the robots, views, rates and units named above and no others. With another camera position or action
  convention its actions mean nothing.
- It has no notion of safety: bound speeds and forces in the robot's controller.
- Success was measured where this card says so, from held-out initial states; nothing else is claimed.
"""


def policy_card(
    document: Mapping[str, Any], state: Mapping[str, Any], repo: str, evaluations: Sequence[Mapping[str, Any]] = ()
) -> str:
    """README.md of a policy.

    Args:
        document: policy.json.
        state: state.json (step, held-out metrics).
        repo: "owner/name" on the hub, or the name of a folder.
        evaluations: summaries of `dvla eval`.
    """
    datasets, base = document["datasets"], document["encoder"]["spec"]["path"]
    found = [HUB_ID.fullmatch(d.get("source", "")) for d in datasets]
    sources = sorted({match[1] for match in found if match})  # on the hub
    head = {
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "tags": ["lerobot", "robotics", "dvla", "vision-language-action", "drifting"],
        **license_of([d["license"] for d in datasets]),
        **({"datasets": sources} if sources else {}),
        **({"base_model": base} if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else {}),
    }
    sections = [
        f"# {repo}\n\n{_description(document, base)}",
        data_section(datasets),
        f"## Use\n\n{_use(datasets, repo)}",
        f"## Training\n\n{_training(document, state)}",
        f"## Results\n\n{_held_out(state)}\n\n{_closed_loop(evaluations)}",
        f"## Limits\n{LIMITS}",
    ]
    return front_matter(head) + "\n\n".join(sections)


def _description(document: Mapping[str, Any], base: str) -> str:
    dit = document["net"]["dit"]
    loss = from_mapping(LossConfig, document.get("loss", {}), "policy.json")
    steps, past = sample_steps(loss), history_of(document)
    seen = f" It sees frames at offsets {list(past.frames)} and states at {list(past.proprio)}, in control steps."
    return (
        f"A vision-language-action policy of dvla {__version__}: a DiT of {dit['blocks']} blocks of width "
        f"{dit['width']} that turns features of {markdown(base)}, the instruction and the robot's state into "
        f"{dit['horizon']} actions, in {steps} forward pass{'es' if steps > 1 else ''} ({loss.kind} head)."
    ) + seen * bool(past)


def data_section(datasets: Sequence[Mapping[str, Any]]) -> str:
    """The datasets, each with its license; a non-commercial one is named first."""
    restricted = ", ".join(markdown(d["name"]) for d in datasets if NON_COMMERCIAL.search(d["license"]))
    unknown = ", ".join(markdown(d["name"]) for d in datasets if not d["license"] or "not stated" in d["license"])
    rows = "".join(
        f"\n| {markdown(d['name'])} | {markdown(d['license']) or 'not stated'} | {d['control_hz']:g} |"
        for d in datasets
    )
    paragraphs = ["## Data", f"| dataset | license | Hz |\n|---|---|---|{rows}"]
    if unknown:
        paragraphs.insert(1, f"**No license is stated** for {unknown}: ask its owners before use.")
    if restricted:
        paragraphs.insert(1, f"**Non-commercial:** made from {restricted}, whose license forbids commercial use.")
    return "\n\n".join(paragraphs)


def _use(datasets: Sequence[Mapping[str, Any]], repo: str) -> str:
    which = f", dataset={json.dumps(datasets[0]['name'])}" if len(datasets) > 1 else ""
    chosen = f" --policy.dataset={json.dumps(datasets[0]['name'])}" if len(datasets) > 1 else ""
    views = "; ".join(markdown(f"{d['name']}: {', '.join(d['views'])}") for d in datasets)
    return f"""```python
import dvla

policy = dvla.Policy.from_pretrained("{repo}"{which})
# images: {{view: uint8 [H, W, 3]}}; state [ds] and the actions [T, d] are in the robot's own units
actions = policy.act(images, "what to do", state)
```

Views: {views}.

With LeRobot, on a robot of the same kind and cameras of these names (`--rename_map` for others):

```
pip install "dvla[lerobot]"
lerobot-rollout --policy.path={repo}{chosen} --task="what to do" --robot.type=…
```"""


def _training(document: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    made = document["encoder"]["fingerprint"]
    tuned = "fine-tuned: its changed weights are in this repository" if made.get("adapter") else "frozen"
    lines = [
        f"- step {state.get('step', '?')}, features: {features_in_words(made)}, {made.get('tokens', '?')} per "
        f"image, resolution {made.get('resolution', '?')}",
        f"- the VLM was {tuned}",
        *(f"- of the demonstrations of {name}: `{chosen}`" for name, chosen in document.get("selection", {}).items()),
        *(["- it was trained with images blanked (a blind baseline)"] if document["conditions"]["blind"] else []),
    ]
    return "\n".join(lines)


def _held_out(state: Mapping[str, Any]) -> str:
    metrics = {k: v for k, v in (state.get("metrics") or {}).items() if "/" not in k}
    if not metrics:
        return "No held-out error was measured."
    return f"Held-out episodes, normalized units: {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}."


def _closed_loop(evaluations: Sequence[Mapping[str, Any]]) -> str:
    tasks = [task for summary in evaluations for task in summary["tasks"].items()]
    if not tasks:
        return "No closed-loop success was measured."
    rows = "".join(
        f"\n| {markdown(task)} | {_percent(r['success'])} | {_percent(r['ci95'][0])} – {_percent(r['ci95'][1])} | "
        f"{_percent(r.get('expert'))} | {_percent(r.get('random'))} | {_percent(r.get('blind'))} | {r['episodes']} |"
        for task, r in tasks
    )
    return (
        "Closed loop, held-out initial states (the same for all columns):\n\n"
        f"| task | success | 95 % | expert | random | blind | episodes |\n|---|---|---|---|---|---|---|{rows}"
    )


def license_of(licenses: Sequence[str]) -> dict[str, Any]:
    """The card's license: the datasets' own where all have the same permissive one, else "other"."""
    found = {PERMISSIVE.get(license.lower()) for license in licenses}
    only = found.pop() if len(found) == 1 else None
    return {"license": only} if only else {"license": "other", "license_name": "licenses-of-its-datasets"}


def front_matter(head: Mapping[str, Any]) -> str:
    """The YAML head of a card."""
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False)}---\n"


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.0f} %"
