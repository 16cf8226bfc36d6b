"""Cards for the hub: what a policy or a cache is, what it was made from, under which licences, what was measured and what it cannot do.

Text of a pure function of documents; nothing is invented: what was not measured is said not to be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ... import __version__
from ...common.config import from_mapping
from ...drifting.config import LossConfig
from ...drifting.heads import sample_steps

NON_COMMERCIAL = re.compile(r"(?i)\bNC\b|non.?commercial")
PERMISSIVE = {"mit": "mit", "apache-2.0": "apache-2.0", "cc-by-4.0": "cc-by-4.0"}  # as the hub writes them


def policy_card(
    document: Mapping[str, Any], state: Mapping[str, Any], repo: str, evaluations: Sequence[Mapping[str, Any]] = ()
) -> str:
    """README.md of a policy. `document`: policy.json; `state`: state.json (step, held-out metrics); `evaluations`: summaries of `dvla eval`."""
    datasets = document["datasets"]
    encoder, net = document["encoder"], document["net"]["dit"]
    loss = from_mapping(LossConfig, document.get("loss", {}), "policy.json")
    steps = sample_steps(loss)
    base = encoder["spec"]["path"]
    head = {
        "library_name": "dvla",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "vision-language-action", "drifting"],
        **_licence([d["license"] for d in datasets]),
        **({"base_model": base} if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else {}),
    }
    views = "; ".join(f"{d['name']}: {', '.join(d['views'])}" for d in datasets)
    lines = [
        _front(head),
        f"# {repo}",
        "",
        f"A vision-language-action policy of dvla {__version__}: a DiT of {net['blocks']} blocks of width {net['width']} that turns features of "
        f"`{base}`, the instruction and the robot's state into {net['horizon']} actions, in {steps} forward pass{'es' if steps > 1 else ''} ({loss.kind} head).",
        "",
        *_sources(datasets),
        "",
        "## Use",
        "",
        "```python",
        "from dvla.stages.policy import Policy",
        "",
        f'policy = Policy.from_pretrained("{repo}"'
        + (f', dataset="{datasets[0]["name"]}")' if len(datasets) > 1 else ")"),
        'actions = policy.act(images, "what to do", state)     # {view: uint8 [H, W, 3]}, text, native state [ds] -> native actions [T, d]',
        "```",
        "",
        f"Views: {views}.",
        "",
        "## Training",
        "",
        f"- step {state.get('step', '?')}, features: {encoder['fingerprint'].get('features', '?')} tokens, {encoder['fingerprint'].get('tokens', '?')} a picture, "
        f"resolution {encoder['fingerprint'].get('resolution', '?')}",
        f"- the VLM {'was fine-tuned: its changed weights are in this repository' if encoder['fingerprint'].get('adapter') else 'was frozen'}",
        *(["- it never saw a picture (a blind baseline)"] if document["conditions"]["blind"] else []),
        "",
        "## Results",
        "",
    ]
    metrics = {k: v for k, v in (state.get("metrics") or {}).items() if "/" not in k}
    lines += [
        f"Held-out episodes, normalised units: {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}."
        if metrics
        else "No held-out error was measured.",
        "",
    ]
    rows = [(task, row) for summary in evaluations for task, row in summary["tasks"].items()]
    if rows:
        lines += [
            "Closed loop, unseen starts (the same for all columns):",
            "",
            "| task | success | 95 % | expert | random | blind | starts |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {task} | {_percent(r['success'])} | {_percent(r['ci95'][0])} – {_percent(r['ci95'][1])} | {_percent(r.get('expert'))} | {_percent(r.get('random'))} | "
            f"{_percent(r.get('blind'))} | {r['episodes']} |"
            for task, r in rows
        ]
    else:
        lines += ["No closed-loop success was measured."]
    lines += [
        "",
        "## Limits",
        "",
        "- It knows the robots, views, rates and units named above and no others; with another camera position or action convention its actions mean nothing.",
        "- It has no notion of safety: bound speeds and forces in the robot's controller.",
        "- Success was measured where it says so, on starts disjoint from training; nothing else is claimed.",
        "",
    ]
    return "\n".join(lines)


def _sources(datasets: Sequence[Mapping[str, Any]]) -> list[str]:
    """The data, each with its licence, a non-commercial one named first."""
    restricted = [d["name"] for d in datasets if NON_COMMERCIAL.search(d["license"])]
    unknown = [d["name"] for d in datasets if not d["license"] or "not stated" in d["license"]]
    lines = ["## Data", ""]
    if restricted:
        lines += [f"**Non-commercial:** made from {', '.join(restricted)}, whose licence forbids commercial use.", ""]
    if unknown:
        lines += [f"**No licence is stated** for {', '.join(unknown)}: ask its owners before use.", ""]
    return [
        *lines,
        "| dataset | licence | Hz |",
        "|---|---|---|",
        *(f"| {d['name']} | {d['license'] or 'not stated'} | {d['control_hz']:g} |" for d in datasets),
    ]


def _licence(licences: Sequence[str]) -> dict[str, Any]:
    """The card's licence: the sources' own where all have the same permissive one, else "other", explained in the text."""
    found = {PERMISSIVE.get(licence.lower()) for licence in licences}
    only = found.pop() if len(found) == 1 else None
    return {"license": only} if only else {"license": "other", "license_name": "licences-of-its-datasets"}


def _front(head: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False)}---\n"


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.0f} %"
