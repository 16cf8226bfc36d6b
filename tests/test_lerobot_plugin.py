"""A dvla policy as LeRobot's own code loads and calls it: `lerobot-eval`'s steps, with pictures and states of our own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dvla.cache.tiny_vlm import make_tiny_qwen3vl
from dvla.stages.envs import Observation
from dvla.stages.policy import Policy

from .cli_runner import Dvla, refused
from .run_samples import TINY, VIEWS, make_run

pytest.importorskip("lerobot", reason="needs lerobot (the extra lerobot)")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("plugin")
    return make_run(base / "run", make_tiny_qwen3vl(base / "vlm", TINY))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dvla.stages.export_policy import export_policy

    return export_policy(run, tmp_path_factory.mktemp("exported") / "policy", ("lerobot",)).path


def test_lerobot_loads_it_and_it_acts_as_ours(exported: Path) -> None:
    from dvla.stages import lerobot_plugin      # what --policy.discover_packages_path imports
    from lerobot.configs.parser import load_plugin
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    load_plugin(lerobot_plugin.__name__)
    config = PreTrainedConfig.from_pretrained(exported, n_action_steps=2)
    assert config.type == "dvla" and config.horizon == 4 and list(config.image_features) == [f"observation.images.{v}" for v in VIEWS]
    config.n_action_steps, config.pretrained_path = 2, exported
    policy = get_policy_class("dvla").from_pretrained(exported, config=config)
    before, after = make_pre_post_processors(config, exported, preprocessor_overrides={
        "device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": {"observation.images.top": f"observation.images.{VIEWS[0]}"}}})
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 2, 48, 48, 3), dtype=np.uint8)          # [V,B,H,W,3]
    state = rng.normal(0, 0.3, (2, 3)).astype(np.float32)                       # [B,ds]
    names = ("observation.images.top", f"observation.images.{VIEWS[1]}")
    batch = {name: torch.from_numpy(p).permute(0, 3, 1, 2).float() / 255 for name, p in zip(names, pictures)}
    batch |= {"observation.state": torch.from_numpy(state), "task": ["put it there", "and that"]}

    ours = Policy.from_pretrained(exported)
    expected = ours.act_batch([Observation({v: pictures[k, i] for k, v in enumerate(VIEWS)}, batch["task"][i], state[i], 4096 + i, 0) for i in range(2)])
    policy.reset()
    actions = [after(policy.select_action(before(dict(batch)))) for _ in range(3)]
    np.testing.assert_allclose(np.stack(actions[:2], 1), expected[:, :2], rtol=1e-5, atol=1e-6)
    assert actions[2].shape == (2, 3) and not np.allclose(actions[2], expected[:, 2])      # planned anew after two steps, with other noise
    policy.reset()
    assert not np.allclose(after(policy.select_action(before(dict(batch)))), actions[0])     # another episode, other noise
    del batch[names[1]]
    with pytest.raises(Exception, match=f"observation.images.{VIEWS[1]} is missing.*--rename_map"):
        policy.reset() or policy.select_action(before(dict(batch)))
    with pytest.raises(NotImplementedError, match="dvla train"):
        policy.forward({})


def test_from_the_command_line(run: Path, tmp_path: Path, dvla: Dvla) -> None:
    done = dvla("export", str(run), "--out", str(tmp_path / "policy"), "--format", "lerobot")
    assert done.code == 0
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert config["type"] == "dvla" and config["output_features"]["action"]["shape"] == [3]
    assert {"policy_preprocessor.json", "policy_postprocessor.json", "policy.json"} <= {p.name for p in (tmp_path / "policy").iterdir()}
    Policy.from_pretrained(tmp_path / "policy")     # still one of ours
    refused(dvla("export", str(run), "--out", str(tmp_path / "x"), "--format", "lerobto"), "did you mean 'lerobot'?")

