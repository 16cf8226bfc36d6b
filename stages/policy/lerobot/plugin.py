"""A policy of dvla as one of LeRobot's, for `lerobot-eval` and robots that run through LeRobot.

    dvla export RUN --out policies/push --format lerobot
    lerobot-eval --env.discover_packages_path=dvla.stages.policy.lerobot --policy.path=policies/push \\
      --env.type=metaworld --env.task=push-v3 --rename_map='{"observation.image": "observation.images.corner2"}'

LeRobot imports this package because of that option (`--env.`, since it takes `--policy.discover_packages_path` for a
setting of the policy) and finds the policy by the names in it. Images are `observation.images.<view>` (`--rename_map`
for other names); `observation.state` and the actions are in the robot's own units. LeRobot's trainer cannot train it.

Letters: B robots, H, W image size, ds state width, T steps of a chunk, d action width.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_STATE

from ....common.documents import read_json
from ....common.text import printable
from ....errors import UserError
from ..observation import from_lerobot
from ..policy import Policy
from .config import TYPE, DvlaConfig


def _read_config(path: str | Path) -> Any:
    """config.json of an exported policy; `UserError` for what LeRobot cannot read."""
    if (file := Path(path) / "config.json").parent.is_dir():
        read_json(file, remedy="export the policy again")
    try:
        return PreTrainedConfig.from_pretrained(path)
    except Exception as error:  # draccus raises many
        reason = printable(" ".join(str(error).split()))[-120:]
        raise UserError(f"{path}: LeRobot cannot read its config.json; export the policy again ({reason})") from None


class DvlaPolicy(PreTrainedPolicy):
    """`Policy` with LeRobot's names."""

    config_class = DvlaConfig
    name = TYPE

    def __init__(self, config: DvlaConfig, policy: Policy) -> None:
        super().__init__(config)
        self.net = policy.net  # a submodule, so that LeRobot finds its device and size
        self._policy = policy
        self._episode = 0
        self._chunk: deque[torch.Tensor] = deque()
        self._step = 0

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: DvlaConfig | None = None, **_: Any
    ) -> DvlaPolicy:
        """Load what `dvla export --format lerobot` wrote, from a folder or the hub."""
        config = config or _read_config(pretrained_name_or_path)
        policy = Policy.from_pretrained(
            pretrained_name_or_path,
            dataset=config.dataset,
            device=torch.device(config.device) if config.device else "auto",
            vlm_path=config.vlm_path,
        )
        return cls(config, policy).eval()

    def get_optim_params(self) -> dict[str, Any]:
        raise NotImplementedError("LeRobot's trainer cannot train this policy; use `dvla train`")

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any] | None]:
        raise NotImplementedError("LeRobot's trainer cannot train this policy; use `dvla train`")

    def reset(self) -> None:
        """Begin a new episode of every robot."""
        self._episode, self._step = self._episode + 1, 0
        self._chunk.clear()

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """Images [B,3,H,W] in [0,1], state [B,ds], "task" a text for each → native actions [B,T,d] float32.

        The noise depends on the robot's place in the batch, the episode and the step."""
        policy = self._policy
        views = policy.robot.views if policy.needs_images else ()
        observations = [
            dataclasses.replace(seen, start=self._episode * 4096 + i, step=self._step)
            for i, seen in enumerate(from_lerobot(batch, views, policy.robot.state_map.field_names))
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
