"""The end-to-end test: `dvla demo --quick`, the full pipeline on real simulators, through the command line."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest

needs_simulator = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("metaworld", "lerobot")),
    reason="needs the extras: pip install 'dvla[lerobot,sim]'",
)


def dvla(monkeypatch, *arguments: str) -> int:
    """Run one command as a user would; its exit code."""
    from dvla import cli

    monkeypatch.setattr(sys, "argv", ["dvla", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@needs_simulator
@pytest.mark.slow
def test_quick_demo(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    assert dvla(monkeypatch, "demo", "--quick", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    for command in ("data record", "vlm tiny", "cache build", "cache verify", "train", "finetune --lora", "eval"):
        assert f"$ dvla {command}" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["stages"]) == {"stage_two", "stage_three"} and len(summary["tasks"]) == 2
    for row in summary["tasks"].values():
        assert row["expert"] == 1.0  # the scripted expert solves these starts: the simulator and its success test work
        assert (
            all(0 <= row[name] <= 1 for name in ("success", "random", "blind"))
            and row["ci95"][0] <= row["success"] <= row["ci95"][1]
        )
    assert summary["frames"] > 100 and summary["cache_bytes"] > summary["frames"] * 2 * 16 * 128 * 2
    assert np.isfinite(summary["loss"]["stage_two"] + summary["loss"]["stage_three"]).all()
    for image in ("loss.png", "switch.png", "success.png", "eval3_metaworld_button-press-topdown-v3.mp4"):
        assert (out / image).stat().st_size > 1000

    from dvla.stages.policy.policy import Policy

    policy = Policy.from_pretrained(out / "stage3", environment="metaworld/button-press-topdown-v3")
    image = np.zeros((128, 128, 3), np.uint8)
    action = policy.act({view: image for view in policy.robot.views}, "press the button", np.zeros(4, np.float32))
    assert action.shape == (8, 4) and np.isfinite(action).all()

    # Run again: every command is already done, nothing is repeated, the numbers stay.
    assert dvla(monkeypatch, "demo", "--quick", "--out", str(out)) == 0
    again = capsys.readouterr().out
    assert "$ dvla train" in again and again.count("already done") == len(summary["seconds"]) == 9
    assert json.loads((out / "summary.json").read_text()) == summary
    # Another seed is another demo: refused, not mixed.
    assert dvla(monkeypatch, "demo", "--quick", "--seed", "1", "--out", str(out)) == 2
    assert "other settings" in capsys.readouterr().err
