"""Policies to the hub and back, against a hub that is a folder; what their cards say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml

from dvla.cache.vlm.spec import LoraSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.documents import read_json
from dvla.errors import UserError
from dvla.stages.policy import checkpoint as ck
from dvla.stages.policy.card import policy_card
from dvla.stages.policy.hub import push_policy
from dvla.stages.policy.policy import Policy
from support.cli_runner import Dvla, refused
from support.run_samples import TINY, make_run, observations

REPO = "me/push"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3vl(tmp_path_factory.mktemp("vlm") / "qwen", TINY)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's files, as OWNER/NAME; its client's calls that are used here work on them."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo: str, repo_type: str, private: bool, exist_ok: bool) -> str:
            assert repo_type == "model" and private and exist_ok
            (root / repo).mkdir(parents=True, exist_ok=True)
            return f"hub/{repo}"

        def upload_folder(self, repo_id: str, folder_path: Path, repo_type: str, commit_message: str) -> None:
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def snapshot(repo: str, revision: str | None = None, **_: Any) -> str:
        if not (root / repo).is_dir() or revision not in (None, "main"):
            raise OSError(f"404: {repo} at {revision} not found")
        return str(root / repo)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return root


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_there_and_back_it_acts_alike(vlm: Path, hub: Path, tmp_path: Path, lora: LoraSpec | None) -> None:
    run = make_run(tmp_path / "run", vlm, lora=lora)
    policy, said = Policy.from_pretrained(run), []
    assert push_policy(run, REPO, say=said.append) == f"hub/{REPO}"
    assert any("give their own with vlm_path" in line for line in said)  # the VLM is a folder of this machine
    again = Policy.from_pretrained(f"{REPO}@main")
    expected, found = policy.act_batch(observations()), again.act_batch(observations())
    if lora is None:
        np.testing.assert_array_equal(found, expected)
    else:  # merged weights round otherwise
        np.testing.assert_allclose(found, expected, atol=2e-3 * float(np.abs(expected).max()))
    assert not (hub / REPO / "optimizer.safetensors").exists()
    again.push_to_hub("me/copy")
    np.testing.assert_array_equal(Policy.from_pretrained("me/copy").act_batch(observations()), found)


def test_what_the_hub_does_not_have(
    vlm: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dvla: Dvla
) -> None:
    with pytest.raises(
        UserError, match="no run or checkpoint at me/none, and no policy of that name on the hub .*404: me/none"
    ):
        Policy.from_pretrained("me/none")
    run = make_run(tmp_path / "run", vlm)
    refused(dvla("push", str(run), "no-owner"), "'no-owner' is not a repository of the hub; give owner/name")
    refused(dvla("push", str(run), REPO, "--eval", str(tmp_path / "none")), "holds no evaluation")

    def no_token(*_: Any, **__: Any) -> None:
        raise RuntimeError("401 Client Error\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", no_token)
    with pytest.raises(UserError, match="the hub rejected me/push: 401 Client Error; log in"):
        push_policy(run, REPO, say=lambda _: None)


def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_names_licenses_results_and_limits(vlm: Path, hub: Path, tmp_path: Path, dvla: Dvla) -> None:
    row = {"success": 0.75, "ci95": [0.5, 0.9], "expert": 1.0, "random": 0.0, "blind": 0.25, "episodes": 20}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "summary.json").write_text(json.dumps({"tasks": {"metaworld/push-v3": row}}))
    run = make_run(tmp_path / "run", vlm)
    assert dvla("push", str(run), REPO, "--eval", str(tmp_path / "eval")).code == 0
    card = (hub / REPO / "README.md").read_text()
    assert front(card)["license"] == "mit" and front(card)["library_name"] == "lerobot"
    assert {"lerobot", "robotics", "dvla"} <= set(front(card)["tags"]) and "datasets" not in front(card)
    assert "| metaworld/push-v3 | 75 % | 50 % – 90 % | 100 % | 0 % | 25 % | 20 |" in card
    assert "mse 0.5" in card and "| toy | mit | 20 |" in card and "Non-commercial" not in card

    folder = ck.resolve(run)
    document, state = read_json(folder / "policy.json"), read_json(folder / "state.json")
    other = {**document["datasets"][0], "name": "grasps", "license": "CC-BY-NC-4.0"}
    unknown = {**other, "name": "lost", "license": ""}
    card = policy_card(
        {**document, "datasets": [*document["datasets"], other, unknown]}, {**state, "metrics": {}}, REPO
    )
    assert front(card)["license"] == "other"
    assert (
        "made from grasps, whose license forbids commercial use" in card and "**No license is stated** for lost" in card
    )
    assert "No held-out error was measured" in card and "No closed-loop success was measured" in card
    known = {**document["datasets"][0], "source": "someone/pick/train@main"}
    assert front(policy_card({**document, "datasets": [known, other]}, state, REPO))["datasets"] == ["someone/pick"]
    namespace: dict[str, Any] = {}
    code = card.split("```python\n")[1].split("```")[0]
    with pytest.raises(UserError, match="no policy of that name"):  # the lines compile, and ask the hub
        exec(code.replace(REPO, "me/none"), namespace)
