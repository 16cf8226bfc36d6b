"""policy.json, state.json and the tensors of a checkpoint: what no training writes is refused before it is used."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvla.cache.vlm.spec import LoraSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.documents import json_bytes
from dvla.common.files import crc32c, file_crc32c
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.document import read_document
from dvla.stages.policy.evaluation import read_summary
from dvla.stages.policy.export import export_policy
from dvla.stages.policy.policy import Policy
from support.run_samples import TINY, make_document, make_robot, make_run


def forge(folder: Path) -> None:
    """Make the checksums of state.json fit again."""
    state = json.loads((folder / "state.json").read_text())
    state.pop("crc32c", None)
    state["files"] = {name: list(file_crc32c(folder / name)) for name in state["files"]}
    (folder / "state.json").write_bytes(json_bytes({**state, "crc32c": crc32c(json_bytes(state))}))


def put(document: Any, place: str, value: Any) -> None:
    *inner, last = place.split(".")
    for key in inner:
        document = document[int(key) if key.isdecimal() else key]
    document[int(last) if last.isdecimal() else last] = value


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("net.dit.blocks", 10**6, "DiT blocks is 1000000; it must be 1 to 512"),
        ("net.dit.width", 10**9, "DiT width is 1000000000; it must be 1 to 16384"),
        ("net.dit.horizon", 10**8, "DiT horizon is 100000000; it must be 1 to 4096"),
        ("net.dit.skip_std", 1e30, "DiT skip_std"),
        ("net.feature_width", 10**9, "network feature_width is 1000000000; it must be 1 to 65536"),
        ("net.slots", [5, 3], "network slots"),
        ("net.dit.more", 1, "more"),
        ("net.dit.width", "32", "expected int, got '32'"),
        ("loss", {"kind": "flow", "sample_steps": 5000}, "it must be 0 .the kind's own. to 1000"),
        ("loss.kind", "flow", "loss.kind is flow, net.dit.denoising another head's"),
        ("format", 2, "its format does not fit"),
        ("datasets", [], "at least 1 item"),
        ("datasets.0.views", ["a", "a"], "two views of datasets.0. have the same name"),
        ("datasets.0.views", list("abcdefghi"), "9 views, expected at most 8"),
        ("datasets.0.embodiment", 7, "embodiment is 7, expected below 7"),
        ("datasets.0.embodiment", "1", "'datasets.0..embodiment' is '1'"),
        ("datasets.0.control_hz", -1.0, "control_hz"),
        ("datasets.0.action_stats.std", [1.0] * 127, "std"),
        ("datasets.0.action_stats.mean.3", None, "mean.3."),
        ("datasets.0.action_stats.std.3", -1.0, "std.3."),
        ("datasets.0.more", 1, "is no key of it"),
        ("encoder.spec.resolution", 10**6, "resolution is 1000000; it must be at least 1 and at most 4096"),
        ("encoder.fingerprint.tokens", "\x1b[2J", "tokens"),
        ("conditions.blind", 0, "blind"),
    ],
)
def test_a_document_that_cannot_act_is_refused(tmp_path: Path, place: str, value: Any, said: str) -> None:
    document = make_document([make_robot()])
    (tmp_path / "policy.json").write_bytes(json_bytes(document))
    assert read_document(tmp_path) == json.loads(json_bytes(document))
    put(document := copy.deepcopy(document), place, value)
    (tmp_path / "policy.json").write_bytes(json_bytes(document))
    with pytest.raises(UserError, match=said) as error:
        read_document(tmp_path)
    assert "policy.json" in str(error.value) and "\n" not in str(error.value)


def test_normalization_by_quantiles_needs_them(tmp_path: Path) -> None:
    robot = {**make_robot(), "normalize": "quantile"}
    (tmp_path / "policy.json").write_bytes(json_bytes({**make_document([robot]), "format": 2}))
    read_document(tmp_path)
    robot["proprio_stats"] = {k: v for k, v in robot["proprio_stats"].items() if k != "quantiles"}
    (tmp_path / "policy.json").write_bytes(json_bytes({**make_document([robot]), "format": 2}))
    with pytest.raises(UserError, match="normalized by quantiles it lacks"):
        read_document(tmp_path)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "tiny", TINY)


def test_forged_weights_are_refused_before_they_are_used(tmp_path: Path, vlm: Path) -> None:
    folder = ck.resolve(make_run(tmp_path / "run", vlm))
    file = folder / "ema.safetensors"
    tensors = load_file(file)
    name = "dit.modulation.weight"
    for value, said in (
        (tensors[name].half(), "float16"),
        (tensors[name].T.contiguous(), "expected float32"),
        (torch.full_like(tensors[name], torch.nan), "is not finite"),
        (None, f"{name} is missing"),
    ):
        save_file({n: t for n, t in (tensors | {name: value}).items() if t is not None}, file)
        forge(folder)
        with pytest.raises(UserError, match=said):
            Policy.from_pretrained(folder, device="cpu")
    save_file(tensors, file)
    forge(folder)
    Policy.from_pretrained(folder, device="cpu")


def test_an_empty_file_of_fine_tuned_weights_is_refused(tmp_path: Path, vlm: Path) -> None:
    folder = ck.resolve(make_run(tmp_path / "run", vlm, lora=LoraSpec(r=2)))
    export_policy(folder, tmp_path / "policy", say=lambda _: None)
    save_file({}, tmp_path / "policy" / "vision.safetensors")
    forge(tmp_path / "policy")
    for use in (Policy.from_pretrained, lambda path: export_policy(path, tmp_path / "again", say=lambda _: None)):
        with pytest.raises(UserError, match="it holds no weight"):
            use(tmp_path / "policy")
    assert not (tmp_path / "again").exists()


def _pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: _pipe(f, "ema.safetensors"), "it is a pipe, expected a file"),
        (lambda f: _pipe(f, "policy.json"), "it is a pipe, expected a file"),
        (lambda f: _pipe(f, "state.json"), "it is a pipe, expected a file"),
        (lambda f: (f / "vision.safetensors").write_bytes(b""), "vision.safetensors is not listed in state.json"),
        (lambda f: put_state(f, "step", 8), "its state.json is of step 8"),
        (lambda f: put_state(f, "step", "7"), "'step' is '7'"),
        (lambda f: put_state(f, "metrics", {"mse": "x"}), "metrics.mse"),
        (lambda f: put_state(f, "files", {}), "policy.json is not listed"),
        (lambda f: put_state(f, "more", 1), "'more' is no key of it"),
    ],
)
def test_a_spoiled_checkpoint_is_one_line(tmp_path: Path, vlm: Path, spoil: Callable[[Path], Any], said: str) -> None:
    folder = ck.resolve(make_run(tmp_path / "run", vlm))
    spoil(folder)
    with pytest.raises(UserError, match=said):
        ck.load_state(folder)


def put_state(folder: Path, key: str, value: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    state.pop("crc32c")
    state[key] = value
    (folder / "state.json").write_bytes(json_bytes({**state, "crc32c": crc32c(json_bytes(state))}))


def test_best_names_a_checkpoint_and_nothing_else(tmp_path: Path, vlm: Path) -> None:
    run = make_run(tmp_path / "run", vlm)
    best = run / "checkpoints" / "best"
    best.write_text("step-00000007\n")
    assert ck.resolve(best).name == "step-00000007"
    for text in ("../../x", "", "step-7", "\xff"):
        best.write_text(text)
        with pytest.raises(UserError, match="it names no checkpoint"):
            ck.resolve(best)


def test_a_damaged_evaluation_is_one_line(tmp_path: Path) -> None:
    task = {"success": 0.5, "ci95": [0.1, 0.9], "episodes": 2, "successes": [0, 1]}
    for change, said in (
        ({"success": "0.5"}, "success"),
        ({"success": 1.5}, "success"),
        ({"ci95": [0.1]}, "ci95"),
        ({"episodes": 3}, "not as many successes"),
        ({"more": 1}, "'tasks.push.more' is no key of it"),
    ):
        (tmp_path / "summary.json").write_bytes(json_bytes({"tasks": {"push": task}}))
        assert read_summary(tmp_path)["tasks"]["push"] == task
        (tmp_path / "summary.json").write_bytes(json_bytes({"tasks": {"push": task | change}}))
        with pytest.raises(UserError, match=said):
            read_summary(tmp_path)
