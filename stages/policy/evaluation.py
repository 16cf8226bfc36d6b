"""summary.json of an evaluation folder, as `dvla eval --out` writes it and cards and reports read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ...common.documents import Field, Form, Positive, read_json
from ...errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[Share], Field(min_length=2, max_length=2)]
Milliseconds = Annotated[float, Field(ge=0, le=1e9)]


class TaskForm(Form):
    """One policy in one task."""

    success: Share
    ci95: Interval
    episodes: Positive
    successes: list[Annotated[int, Field(ge=0, le=1)]] = []
    mean_return: float = 0.0
    ms_per_action: Milliseconds | None = None
    ms_per_chunk: Milliseconds | None = None
    expert: Share = 0.0
    expert_ci95: Interval = []
    random: Share = 0.0
    random_ci95: Interval = []
    blind: Share = 0.0
    blind_ci95: Interval = []


class SummaryForm(Form):
    """summary.json; earlier releases and hand-made ones may lack all but the tasks."""

    tasks: dict[Annotated[str, Field(min_length=1, max_length=200)], TaskForm]
    policy: str = ""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    settings: dict[str, Any] = {}
    blind_is: str = ""


def read_summary(folder: Path) -> dict[str, Any]:
    """The evaluation in a folder. `UserError` where there is none, or it is damaged."""
    path = folder / "summary.json"
    if not path.exists():
        raise UserError(f"{folder} holds no evaluation (no summary.json); give the folder of `dvla eval --out`")
    summary: dict[str, Any] = read_json(path, SummaryForm, "evaluate again")
    for name, task in summary["tasks"].items():
        if task.get("successes") and len(task["successes"]) != task["episodes"]:
            raise UserError(f"{path} is damaged: '{name}' has {task['episodes']} episodes, not as many successes")
    return summary
