"""Success rates as a table: policy, expert, random, blind."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ...common.console import table

DROP = (
    "ms/chunk",
    "mean return",
    "ms/action",
)  # columns that the console leaves out where they do not fit; table.md has all


def success_table(summaries: dict[str, dict[str, Any]]) -> Table:
    """One row per task and policy, success beside expert, random and blind; tasks without their simulator's name."""
    head, rows = success_cells(summaries)
    short = {task: task.partition("/")[2] for task, *_ in rows}
    if len(set(short.values())) == len(short):
        rows = [[short[task], *cells] for task, *cells in rows]
    return table(head, rows, drop=DROP)


def success_cells(summaries: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of that table. `summaries`: name → summary of `dvla eval`."""
    head = [
        "task",
        "policy",
        "success",
        "95% interval",
        "expert",
        "random",
        "blind",
        "mean return",
        "ms/action",
        "ms/chunk",
    ]
    rows = []
    for task in next(iter(summaries.values()))["tasks"]:
        for name, summary in summaries.items():
            row = summary["tasks"][task]
            low, high = row["ci95"]
            chunk = row.get("ms_per_chunk")
            rows.append(
                [
                    task,
                    name,
                    f"{row['success']:.0%} of {row['episodes']}",
                    f"{low:.0%} – {high:.0%}",
                    *(f"{row[b]:.0%}" if b in row else "–" for b in ("expert", "random", "blind")),
                    f"{row['mean_return']:.1f}",
                    f"{row['ms_per_action']:.1f}",
                    "–" if chunk is None else f"{chunk:.1f}",
                ]
            )
    return head, rows
