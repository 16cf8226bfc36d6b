"""The runner of commands: what it notes, resumes and refuses (with commands that stand in for `dvla`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dvla.errors import UserError
from dvla.stages.experiments import runner
from dvla.stages.experiments.runner import Job, options, run_in_order

JOBS = [
    Job("train", (("train", "--out", "a"),), beside=(("train", "--blind", "--out", "b"),), purpose="Train [both]."),
    Job("eval", (("eval", "a"),)),
]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import pathlib, sys; print('said'); sys.exit(2 * pathlib.Path('fail').exists())"
    monkeypatch.setattr(runner, "command_line", lambda command: [sys.executable, "-S", "-c", code])


def test_finished_jobs_are_announced_but_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out, ran, said = tmp_path / "out", list[list[str]](), list[str]()
    Path("fail").touch()
    with pytest.raises(
        UserError, match=r"dvla train failed with exit code 2 \(said\); see .*b.log, then rerun the demo"
    ):
        run_in_order(out, JOBS, ran.append, said.append, "demo")
    Path("fail").unlink()
    seconds = run_in_order(out, JOBS, ran.append, said.append, "demo")
    assert list(seconds) == ["train", "eval"] and ran == [["train", "--out", "a"]] * 2 + [["eval", "a"]]
    said.clear()
    assert run_in_order(out, JOBS, ran.append, said.append, "demo") == seconds and len(ran) == 3
    assert said[1:4] == [
        r"[cyan]Train \[both].[/cyan]",
        "[bold]$ dvla train --out a &[/bold]",
        "[bold]$ dvla train --blind --out b[/bold]",
    ]
    assert sum(line.startswith("already done") for line in said) == 2


def test_a_folder_begun_earlier_resumes_or_is_refused(tmp_path: Path) -> None:
    """`progress.json` has had this form since the first release of the demo."""
    road = [[["train", "--out", "a"], ["train", "--blind", "--out", "b"]], [["eval", "a"]]]
    (tmp_path / "progress.json").write_text(json.dumps({"road": road, "seconds": {"train": 3.0}}))
    ran: list[list[str]] = []
    assert run_in_order(tmp_path, JOBS, ran.append, lambda _: None, "demo")["train"] == 3.0 and ran == [["eval", "a"]]
    for document in ({"road": road[:1], "seconds": {}}, {}):
        (tmp_path / "progress.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match="holds a demo with other settings; choose|progress.json is damaged"):
            run_in_order(tmp_path, JOBS, ran.append, lambda _: None, "demo")


def test_keywords_become_options() -> None:
    assert options(from_cache=Path("c"), seed=0, env=["a", "b"]) == (
        *("--from-cache", "c", "--seed", "0"),
        *("--env", "a", "--env", "b"),
    )
