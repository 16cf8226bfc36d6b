"""A policy of dvla as one of LeRobot's, for `lerobot-eval` and robots that run through LeRobot.

    dvla export RUN --out policies/push --format lerobot
    lerobot-eval --env.discover_packages_path=dvla.stages.policy.lerobot --policy.path=policies/push --env.type=metaworld --env.task=push-v3 \
      --rename_map='{"observation.image": "observation.images.corner2"}'

LeRobot imports this package where it is told to (`--env.`, since it takes `--policy.discover_packages_path` for a setting of the policy) and finds the policy
by the names in it. Pictures are `observation.images.<view>` (`--rename_map` for other names), the state is `observation.state`, both in the robot's own units;
so are the actions. It acts; LeRobot's trainer cannot train it.

Letters: B robots, V views, H, W picture size, ds state width, T steps of a chunk, d action width.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import (
    OBS_IMAGES,
    OBS_STATE,
)

from ....errors import UserError
from ...policy.observation import Observation
from ..policy import Policy
from .config import TYPE, DvlaConfig


class DvlaPolicy(PreTrainedPolicy):
    """Acts as `Policy` does, with LeRobot's names."""

    config_class = DvlaConfig
    name = TYPE

    def __init__(self, config: DvlaConfig, policy: Policy) -> None:
        super().__init__(config)
        self.net = policy.net  # a module of this one, so that its device and size can be asked
        self._policy = policy
        self._episode = 0
        self._chunk: deque[torch.Tensor] = deque()
        self._step = 0

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: DvlaConfig | None = None, **_: Any
    ) -> DvlaPolicy:
        """What `dvla export --format lerobot` wrote, or its repository on the hub."""
        config = config or PreTrainedConfig.from_pretrained(pretrained_name_or_path)
        policy = Policy.from_pretrained(
            pretrained_name_or_path, dataset=config.dataset, device=config.device, vlm_path=config.vlm_path
        )
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
        policy, state = self._policy, batch[OBS_STATE].float().cpu().numpy()  # [B,ds]
        views = policy.robot.views if policy.needs_images else ()
        missing = [f"{OBS_IMAGES}.{view}" for view in views if f"{OBS_IMAGES}.{view}" not in batch]
        if missing:
            raise UserError(
                f"{missing[0]} is missing; the observation has {', '.join(k for k in batch if k.startswith('observation'))}: rename it with --rename_map"
            )
        pictures = {
            view: (batch[f"{OBS_IMAGES}.{view}"].float() * 255)
            .round()
            .clamp(0, 255)
            .byte()
            .permute(0, 2, 3, 1)
            .cpu()
            .numpy()
            for view in views
        }
        tasks = batch.get("task") or [""] * len(state)
        tasks = [tasks] * len(state) if isinstance(tasks, str) else tasks
        observations = [
            Observation(
                {view: np.ascontiguousarray(p[i]) for view, p in pictures.items()},
                tasks[i],
                state[i],
                self._episode * 4096 + i,
                self._step,
            )
            for i in range(len(state))
        ]
        return torch.from_numpy(policy.act_batch(observations)).to(batch[OBS_STATE].device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """The next action of every robot [B,d]; a forward pass when the chunk is used up."""
        if not self._chunk:
            steps = self.config.n_action_steps or self.config.horizon
            self._chunk.extend(self.predict_action_chunk(batch)[:, :steps].transpose(0, 1))  # steps times [B,d]
        self._step += 1
        return self._chunk.popleft()
