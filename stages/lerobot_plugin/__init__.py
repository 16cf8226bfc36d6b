"""A policy of dvla as one of LeRobot's, for `lerobot-eval` and robots that run through LeRobot.

    dvla export RUN --out policies/push --format lerobot
    lerobot-eval --env.discover_packages_path=dvla.stages.lerobot_plugin --policy.path=policies/push --env.type=metaworld --env.task=push-v3 \
      --rename_map='{"observation.image": "observation.images.corner2"}'

LeRobot imports this package where it is told to (`--env.`, since it takes `--policy.discover_packages_path` for a setting of the policy) and finds the policy
by the names in it. Pictures are `observation.images.<view>` (`--rename_map` for other names), the state is `observation.state`, both in the robot's own units;
so are the actions. It acts; LeRobot's trainer cannot train it.

Letters: B robots, V views, H, W picture size, ds state width, T steps of a chunk, d action width.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import AddBatchDimensionProcessorStep, DeviceProcessorStep, PolicyProcessorPipeline, RenameObservationsProcessorStep
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE, POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from ...errors import UserError
from ..envs import Observation
from ..policy import Policy, RobotInterface

TYPE = "dvla"


@PreTrainedConfig.register_subclass(TYPE)
@dataclass
class DvlaConfig(PreTrainedConfig):
    """config.json of an exported policy."""

    dataset: str | None = None          # whose robot it acts for, where it was trained on several
    horizon: int = 16                   # T, steps of a chunk
    n_action_steps: int | None = None   # of them carried out before the next forward pass; None: all
    vlm_path: str | None = None         # where the VLM is, if not where the policy says
    push_to_hub: bool = False           # `dvla push` does that

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_action_steps is not None and not 1 <= self.n_action_steps <= self.horizon:
            raise ValueError(f"n_action_steps is {self.n_action_steps}; a chunk has {self.horizon} steps: give 1 to {self.horizon}")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.horizon))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise NotImplementedError("LeRobot's trainer cannot train this policy; use `dvla train`")

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Nothing to infer: an exported policy says what it sees."""


class DvlaPolicy(PreTrainedPolicy):
    """Acts as `Policy` does, with LeRobot's names."""

    config_class = DvlaConfig
    name = TYPE

    def __init__(self, config: DvlaConfig, policy: Policy) -> None:
        super().__init__(config)
        self.net = policy.net       # a module of this one, so that its device and size can be asked
        self._policy = policy
        self._episode = 0
        self._chunk: deque[torch.Tensor] = deque()
        self._step = 0

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, config: DvlaConfig | None = None, **_: Any) -> DvlaPolicy:
        """What `dvla export --format lerobot` wrote, or its repository on the hub."""
        config = config or PreTrainedConfig.from_pretrained(pretrained_name_or_path)
        policy = Policy.from_pretrained(pretrained_name_or_path, dataset=config.dataset, device=config.device, vlm_path=config.vlm_path)
        return cls(config, policy).eval()

    def get_optim_params(self) -> dict[str, Any]:
        raise NotImplementedError("LeRobot's trainer cannot train this policy; use `dvla train`")

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any] | None]:
        raise NotImplementedError("LeRobot's trainer cannot train this policy; use `dvla train`")

    def reset(self) -> None:
        """A new episode of every robot."""
        self._episode, self._step = self._episode + 1, 0
        self._chunk.clear()

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """Pictures [B,3,H,W] in [0,1], state [B,ds], "task" a text for each → native actions [B,T,d] float32.

        The noise depends on the robot's place in the batch, the episode and the step."""
        policy, state = self._policy, batch[OBS_STATE].float().cpu().numpy()                    # [B,ds]
        views = policy.robot.views if policy.needs_images else ()
        missing = [f"{OBS_IMAGES}.{view}" for view in views if f"{OBS_IMAGES}.{view}" not in batch]
        if missing:
            raise UserError(f"{missing[0]} is missing; the observation has {', '.join(k for k in batch if k.startswith('observation'))}: rename it with --rename_map")
        pictures = {view: (batch[f"{OBS_IMAGES}.{view}"].float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy() for view in views}
        tasks = batch.get("task") or [""] * len(state)
        tasks = [tasks] * len(state) if isinstance(tasks, str) else tasks
        observations = [Observation({view: np.ascontiguousarray(p[i]) for view, p in pictures.items()}, tasks[i], state[i], self._episode * 4096 + i, self._step)
                        for i in range(len(state))]
        return torch.from_numpy(policy.act_batch(observations)).to(batch[OBS_STATE].device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """The next action of every robot [B,d]; a forward pass when the chunk is used up."""
        if not self._chunk:
            steps = self.config.n_action_steps or self.config.horizon
            self._chunk.extend(self.predict_action_chunk(batch)[:, :steps].transpose(0, 1))        # steps times [B,d]
        self._step += 1
        return self._chunk.popleft()


def make_dvla_pre_post_processors(config: DvlaConfig, dataset_stats: Any = None) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Names, a batch dimension, devices. Nothing is normalised here: the policy speaks the robot's units."""
    before = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](
        steps=[RenameObservationsProcessorStep(rename_map={}), AddBatchDimensionProcessorStep(), DeviceProcessorStep(device=config.device)],
        name=POLICY_PREPROCESSOR_DEFAULT_NAME)
    after = PolicyProcessorPipeline[Any, Any](steps=[DeviceProcessorStep(device="cpu")], name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
                                              to_transition=policy_action_to_transition, to_output=transition_to_policy_action)
    return before, after


def write_lerobot(document: dict[str, Any], folder: Path, side: int = 224) -> None:
    """config.json and the processors of the policy of policy.json, into a folder that is there. Of one that was trained on several datasets the
    first one's robot is named; `--policy.dataset=NAME` names another.

    `side`: picture size that is declared; any is taken."""
    robot = RobotInterface(document["datasets"][0])
    views = () if document["conditions"]["blind"] else robot.views
    inputs = {f"{OBS_IMAGES}.{view}": PolicyFeature(FeatureType.VISUAL, (3, side, side)) for view in views}
    inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (len(robot.state_map.field_names),))
    outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (len(robot.action_map.field_names),))}
    config = DvlaConfig(input_features=inputs, output_features=outputs, device="cpu", horizon=document["net"]["dit"]["horizon"],
                        dataset=robot.name if len(document["datasets"]) > 1 else None)
    config._save_pretrained(folder)     # `save_pretrained` would make a folder
    for pipeline in make_dvla_pre_post_processors(config):
        pipeline.save_pretrained(folder)
