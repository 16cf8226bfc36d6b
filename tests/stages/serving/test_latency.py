"""`dvla bench latency`: every part is there, parts lie inside the whole, and timing changes nothing. How long things
take is not asserted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_paligemma2 import TinyPaliGemmaSpec, make_tiny_paligemma2
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.policy.policy import KEPT_TEXTS, Policy
from dvla.stages.policy.stopwatch import PARTS, Stopwatch
from dvla.stages.serving import latency
from dvla.stages.serving.config import LatencyConfig
from dvla.stages.serving.latency import NAMES, NEW_TEXT, SERVED, WHOLE, measure
from support.cli_runner import Dvla, argv, refused
from support.run_samples import TINY, make_run, observations

QUICK: dict[str, Any] = {"warm_up": 1, "repeats": 2, "camera": (48, 64), "device": "cpu"}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "qwen", TINY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vlm: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("latency") / "run", vlm)


def parts_of(report: dict[str, Any], batch: int) -> dict[str, dict[str, float]]:
    rows = [row for row in report["rows"] if row["batch"] == batch]
    assert len({row["part"] for row in rows}) == len(rows)
    for row in rows:
        assert 0 <= row["p50"] <= row["p90"] <= row["p99"]
    return {row["part"]: row for row in rows}


# --- the stopwatch ----------------------------------------------------------------------------------------------------


def test_parts_add_up_to_the_whole() -> None:
    began, watch = time.perf_counter(), Stopwatch("cpu")
    for part in ("a", "b", "a"):
        time.sleep(0.002)
        watch.mark(part)
    whole, found = time.perf_counter() - began, watch.seconds()
    assert list(found) == ["a", "b"] and found["a"] >= 0.004 and found["b"] >= 0.002 and sum(found.values()) <= whole


def test_on_a_gpu_its_own_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events stand in a stream and are waited for once, at the end; their times are milliseconds."""
    clock, waited = itertools.count(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            self.at = next(clock) ** 2
            assert stream == "stream of cuda:1"

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    watch = Stopwatch("cuda:1")
    for part in ("a", "b", "a"):
        watch.mark(part)
    assert watch.seconds() == pytest.approx({"a": 0.006, "b": 0.003}) and waited == [9]


@pytest.mark.parametrize("blind", [False, True])
def test_a_policy_marks_its_parts_and_acts_the_same(run: Path, blind: bool) -> None:
    policy, marks = Policy.from_pretrained(run, blind=blind), []
    np.testing.assert_array_equal(policy.act_batch(observations(2), marks.append), policy.act_batch(observations(2)))
    assert tuple(marks) == PARTS


def test_a_policy_keeps_so_many_instructions_and_no_more(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvla.stages.policy import policy as module

    policy = Policy.from_pretrained(run, blind=True)
    expected, seen = policy.act_batch(observations(3)), observations(3)
    sizes = {name: embedding.nbytes for name, (embedding, _) in policy._text.items()}
    assert list(sizes) == [one.instruction for one in seen] and sum(sizes.values()) == policy._text_nbytes
    assert 1000 * max(sizes.values()) < KEPT_TEXTS
    monkeypatch.setattr(module, "KEPT_TEXTS", sum(sizes.values()) - 1)
    policy.act_batch([dataclasses.replace(seen[0], step=9)])  # the first is the latest used
    policy.act_batch([dataclasses.replace(seen[0], instruction="grasp")])
    assert (
        set(policy._text) <= {seen[0].instruction, seen[2].instruction, "grasp"} and seen[0].instruction in policy._text
    )
    assert policy._text_nbytes == sum(e.nbytes for e, _ in policy._text.values()) < sum(sizes.values())
    policy.act_batch([dataclasses.replace(seen[0], instruction="push the puck " * 20)])  # longer than all that is kept
    assert len(policy._text) == 1
    np.testing.assert_array_equal(policy.act_batch(seen), expected)


# --- the measurement --------------------------------------------------------------------------------------------------


def test_every_part_of_a_checkpoint_is_timed(run: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    report = measure(LatencyConfig(str(run), batches=(1, 2), **QUICK), lambda *line: shown.append(line))
    for batch in (1, 2):
        rows = parts_of(report, batch)
        assert set(rows) == {*NAMES.values(), WHOLE, NEW_TEXT, SERVED}
        for part in NAMES.values():  # of every single call, and so of every percentile
            assert rows[part]["p50"] <= rows[WHOLE]["p50"] and rows[part]["p99"] <= rows[WHOLE]["p99"]
    assert (report["views"], report["horizon"], report["passes"], report["picture"], report["dtype"]) == (
        2,
        4,
        1,
        [48, 64],
        "float32",
    )
    assert {(name, total) for name, _, total in shown} == {
        (f"{kind}{n}{after}", 3) for n in (1, 2) for kind, after in (("policy, batch ", ""), ("server, ", " clients"))
    }
    assert not Policy.from_pretrained(run).encoder._forward_hooks


def test_an_encoder_of_whole_observations_has_images_as_one_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_paligemma2(tmp_path / "pali", TinyPaliGemmaSpec())
    monkeypatch.setattr(
        latency, "encoder_spec", lambda vlm, path: EncoderSpec(path, vlm=vlm, resolution=56, depth="language")
    )
    rows = parts_of(
        measure(
            LatencyConfig(vlm_path=str(folder), vlm="paligemma2", model_size="tiny", views=3, server=False, **QUICK)
        ),
        1,
    )
    assert set(rows) == {"images", *(NAMES[part] for part in PARTS[1:]), WHOLE, NEW_TEXT}


def test_random_weights_behind_a_vlm_are_a_whole_policy(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "encoder_spec", lambda vlm, path: EncoderSpec(path, vlm=vlm, resolution=64))
    report = measure(LatencyConfig(vlm_path=str(vlm), model_size="tiny", views=3, server=False, **QUICK))
    assert (
        report["views"] == 3
        and set(parts_of(report, 1)) == {*NAMES.values(), WHOLE, NEW_TEXT}
        and str(vlm) in report["policy"]
    )


def test_without_a_vlm_it_is_the_dit_alone() -> None:
    report = measure(LatencyConfig(model_size="tiny", views=9, batches=(1, 2), **QUICK | {"warm_up": 0}))
    assert (
        set(parts_of(report, 1)) == set(parts_of(report, 2)) == {NAMES["dit"]}
        and report["views"] == 9
        and report["horizon"] == 16
    )


def test_compile_reaches_the_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(latency, "compile_blocks", compiled.append)
    for config in (
        LatencyConfig(str(run), compile=True, server=False, **QUICK),
        LatencyConfig(model_size="tiny", views=1, compile=True, **QUICK),
    ):
        assert measure(config)["compiled"]
    assert len(compiled) == 2


@pytest.mark.parametrize(
    "changes", [{"repeats": 0}, {"warm_up": -1}, {"views": 0}, {"batches": ()}, {"batches": (0,)}, {"camera": (0, 5)}]
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        LatencyConfig(**changes)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_and_writes_the_same(run: Path, tmp_path: Path, dvla: Dvla) -> None:
    file = tmp_path / "latency.json"
    result = dvla(
        "bench",
        "latency",
        run,
        "--batch-size",
        1,
        "--batch-size",
        2,
        "--repeats",
        3,
        "--warm-up",
        0,
        "--image-size",
        "48x64",
        "--device",
        "cpu",
        "--json",
        file,
    )
    assert result.code == 0, result
    for row in json.loads(file.read_text())["rows"]:
        line = next(x for x in result.out.splitlines() if x.startswith(row["part"]) and f" {row['batch']} " in x)
        assert f"{row['p50']:.2f}" in line and f"{row['p99']:.2f}" in line
    assert "2 views, chunk of 4 steps" in result.out


def test_wrong_options_are_refused(run: Path, dvla: Dvla) -> None:
    refused(dvla("bench", "latency", run, "--model-size", "base"), "a checkpoint has its own")
    refused(dvla("bench", "latency", "--vlm", "qwen3vl"), "--vlm-path")
    refused(dvla("bench", "latency", "--image-size", "640"), "--image-size 640")
    refused(dvla("bench", "latency", "--model-size", "tinny", "--device", "cpu"), "did you mean 'tiny'")
    refused(dvla("bench", "latency", run.parent / "none"), "none")


def test_rows_are_shown_although_the_server_fails(
    dvla: Dvla, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise UserError("the port is taken")

    monkeypatch.setattr(latency, "_time_server", failing)
    result = dvla(
        "bench", "latency", run, *argv("--repeats 1 --warm-up 0 --image-size 32x32 --json"), tmp_path / "out.json"
    )
    assert result.code == 1 and "DiT" in result.out and "the port is taken" in result.err
    assert json.loads((tmp_path / "out.json").read_text())["rows"]
