"""A dvla policy as LeRobot's own code loads and calls it: `lerobot-eval`'s steps, and itself in an environment of our
own."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.errors import UserError
from dvla.stages.policy.lerobot_files import NAMES
from dvla.stages.policy.policy import Policy
from dvla.stages.simulation.envs import Observation
from support.cli_runner import Dvla, refused
from support.lerobot_plugins import site
from support.run_samples import TINY, VIEWS, make_run

pytest.importorskip("lerobot", reason="needs lerobot (the extra lerobot)")
gymnasium = pytest.importorskip("gymnasium")
from lerobot.configs.types import FeatureType, PolicyFeature  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("plugin")
    return make_run(base / "run", make_tiny_qwen3vl(base / "vlm", TINY))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dvla.stages.policy.export import export_policy

    return export_policy(run, tmp_path_factory.mktemp("exported") / "policy", ("lerobot",)).path


def test_lerobot_loads_it_and_it_acts_as_ours(exported: Path) -> None:
    from lerobot.configs.parser import load_plugin
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    from dvla.stages.policy import lerobot as lerobot_plugin  # what --env.discover_packages_path imports

    load_plugin(lerobot_plugin.__name__)
    config = PreTrainedConfig.from_pretrained(exported, n_action_steps=2)
    assert (
        config.type == "dvla"
        and config.horizon == 4
        and list(config.image_features) == [f"observation.images.{v}" for v in VIEWS]
    )
    config.n_action_steps, config.pretrained_path = 2, exported
    policy = get_policy_class("dvla").from_pretrained(exported, config=config)
    before, after = make_pre_post_processors(
        config,
        exported,
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {
                "rename_map": {"observation.images.top": f"observation.images.{VIEWS[0]}"}
            },
        },
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 2, 48, 48, 3), dtype=np.uint8)  # [V,B,H,W,3]
    state = rng.normal(0, 0.3, (2, 3)).astype(np.float32)  # [B,ds]
    names = ("observation.images.top", f"observation.images.{VIEWS[1]}")
    batch = {name: torch.from_numpy(p).permute(0, 3, 1, 2).float() / 255 for name, p in zip(names, images)}
    batch |= {"observation.state": torch.from_numpy(state), "task": ["put it there", "and that"]}

    ours = Policy.from_pretrained(exported)
    expected = ours.act_batch(
        [
            Observation({v: images[k, i] for k, v in enumerate(VIEWS)}, batch["task"][i], state[i], 4096 + i, 0)
            for i in range(2)
        ]
    )
    policy.reset()
    actions = [after(policy.select_action(before(dict(batch)))) for _ in range(3)]
    np.testing.assert_allclose(np.stack(actions[:2], 1), expected[:, :2], rtol=1e-5, atol=1e-6)
    assert actions[2].shape == (2, 3) and not np.allclose(
        actions[2], expected[:, 2]
    )  # planned anew after two steps, with other noise
    policy.reset()
    assert not np.allclose(after(policy.select_action(before(dict(batch)))), actions[0])  # another episode, other noise
    del batch[names[1]]
    with pytest.raises(Exception, match=f"observation.images.{VIEWS[1]} is missing.*--rename_map"):
        policy.reset() or policy.select_action(before(dict(batch)))
    for train in (lambda: policy.forward({}), policy.get_optim_params, config.get_optimizer_preset):
        with pytest.raises(UserError, match="dvla train"):
            train()


class Toy(gymnasium.Env):
    """Two cameras and three joints; three steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        {
            "pixels": gymnasium.spaces.Dict(
                {name: gymnasium.spaces.Box(0, 255, (48, 48, 3), np.uint8) for name in ("top", VIEWS[1])}
            ),
            "agent_pos": gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        }
    )
    task_description = "put it there"

    def _observation(self) -> dict[str, Any]:
        return {
            "pixels": {
                name: self.np_random.integers(0, 256, (48, 48, 3), dtype=np.uint8) for name in ("top", VIEWS[1])
            },
            "agent_pos": np.zeros(3),
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        assert action.shape == (3,) and np.isfinite(action).all()
        return self._observation(), 0.0, False, False, {"is_success": True}

    def render(self) -> np.ndarray:
        return np.zeros((48, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def toy() -> str:
    """The type of an environment of LeRobot's with `Toy` in it."""
    from lerobot.envs.configs import EnvConfig

    keys = {
        "pixels/top": "observation.images.top",
        f"pixels/{VIEWS[1]}": f"observation.images.{VIEWS[1]}",
        "agent_pos": "observation.state",
        "action": "action",
    }
    kinds = {"agent_pos": FeatureType.STATE, "action": FeatureType.ACTION}
    features = {
        name: PolicyFeature(kinds[name], (3,)) if name in kinds else PolicyFeature(FeatureType.VISUAL, (48, 48, 3))
        for name in keys
    }

    @EnvConfig.register_subclass("dvla_toy")
    @dataclasses.dataclass
    class ToyConfig(EnvConfig):
        features: dict[str, PolicyFeature] = dataclasses.field(default_factory=lambda: features)
        features_map: dict[str, str] = dataclasses.field(default_factory=lambda: keys)
        gym_id = "dvla/Toy-v0"

        @property
        def gym_kwargs(self) -> dict[str, Any]:
            return {}

    gymnasium.register(ToyConfig.gym_id, entry_point=Toy, max_episode_steps=3)
    return "dvla_toy"


@pytest.mark.parametrize("discovered", [[], ["--env.discover_packages_path=dvla.stages.policy.lerobot"]])
def test_lerobot_eval_runs_it(
    exported: Path, toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, discovered: list[str]
) -> None:
    """By the distribution `lerobot_policy_dvla`, and by the option that earlier releases needed."""
    from lerobot.configs.default import EvalConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    if not discovered:
        for path in site(tmp_path / "site")[:2]:
            monkeypatch.syspath_prepend(path)
        monkeypatch.setattr("sys.excepthook", sys.excepthook)  # put back what the plug-in replaces
        monkeypatch.setattr("support.so101_standin.put_in", lambda put: None)
        register_third_party_plugins()
        assert "lerobot_policy_dvla" in sys.modules
    from lerobot.scripts.lerobot_eval import eval_main

    renamed = json.dumps({"observation.images.top": f"observation.images.{VIEWS[0]}"})
    monkeypatch.setattr(
        "sys.argv",
        [
            "lerobot-eval",
            *discovered,
            f"--policy.path={exported}",
            "--policy.n_action_steps=2",
            f"--env.type={toy}",
            "--eval.n_episodes=3",
            "--eval.batch_size=2",
            f"--rename_map={renamed}",
            f"--output_dir={tmp_path}",
            *(["--eval.use_async_envs=false"] if hasattr(EvalConfig, "use_async_envs") else []),
        ],
    )
    eval_main()
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["pc_success"] == 100.0


def test_its_files_are_those_that_lerobot_would_write(exported: Path, tmp_path: Path) -> None:
    """They are written without LeRobot, for every version of it: names and forms are its own."""
    from lerobot.configs.policies import PreTrainedConfig

    from dvla.stages.policy import lerobot as lerobot_plugin

    config = PreTrainedConfig.from_pretrained(exported)
    config.save_pretrained(tmp_path)
    for pipeline in lerobot_plugin.make_dvla_pre_post_processors(lerobot_plugin.DvlaConfig(device="cpu")):
        pipeline.save_pretrained(tmp_path)
    for name in NAMES:
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (exported, tmp_path))
        assert ours.items() <= {**theirs, "device": None}.items() if name == "config.json" else ours == theirs


def test_from_the_command_line(run: Path, tmp_path: Path, dvla: Dvla) -> None:
    """Every export is LeRobot's; the format that earlier releases wanted for it is accepted."""
    for format in ([], ["--format", "lerobot"]):
        out = tmp_path / f"policy{len(format)}"
        assert dvla("export", str(run), "--out", str(out), *format).code == 0
        config = json.loads((out / "config.json").read_text())
        assert config["type"] == "dvla" and config["output_features"]["action"]["shape"] == [3]
        assert {*NAMES, "policy.json", "model.safetensors", "README.md"} <= {p.name for p in out.iterdir()}
        for name in NAMES:  # people edit them, for example n_action_steps
            (out / name).write_text((out / name).read_text() + " ")
        Policy.from_pretrained(out)  # still one of ours
    refused(dvla("export", str(run), "--out", str(tmp_path / "x"), "--format", "lerobto"), "unknown format 'lerobto'")
    refused(dvla("report", str(tmp_path / "policy0"), "--out", str(tmp_path / "page.html")), "policy0")
