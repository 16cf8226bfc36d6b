"""A policy of dvla as one of LeRobot's, for its commands and its robots.

    dvla export RUN --out policies/push
    lerobot-rollout --policy.path=policies/push --robot.type=so101_follower …
    lerobot-eval --policy.path=policies/push --env.type=metaworld --env.task=push-v3 \\
      --rename_map='{"observation.image": "observation.images.corner2"}'

LeRobot finds it by the distribution `lerobot_policy_dvla`, which is installed with dvla (`plugin/`). Images are
`observation.images.<view>` (`--rename_map` for other names); `observation.state` and the actions are in the robot's own
units. LeRobot's trainer cannot train it.

Letters: B robots, H, W image size, ds state width, T steps of a chunk, d action width.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE

from ....common.documents import read_json
from ....common.text import printable
from ....errors import UserError
from ..history import Past
from ..lerobot_files import TYPE, native_names
from ..observation import Observation, from_lerobot
from ..policy import Policy
from .config import UNTRAINABLE, DvlaConfig
from .overlap import blend


def _read_config(path: str, revision: str | None) -> Any:
    """config.json of an exported policy; `UserError` for what LeRobot cannot read."""
    if (file := Path(path) / "config.json").parent.is_dir():
        read_json(file, remedy="export the policy again")
    try:
        return PreTrainedConfig.from_pretrained(path, revision=revision)
    except Exception as error:  # draccus raises many
        reason = printable(" ".join(str(error).split()))[-120:]
        raise UserError(f"{path}: LeRobot cannot read its config.json; export the policy again ({reason})") from None


class DvlaPolicy(PreTrainedPolicy):
    """`Policy` with LeRobot's names."""

    config_class = DvlaConfig
    name = TYPE

    def __init__(self, config: DvlaConfig, policy: Policy | None = None, **_: Any) -> None:
        super().__init__(config)
        if policy is None:  # what `--policy.type=dvla` asks for
            raise UserError(
                f"give --policy.path, the folder of `dvla export` or a repository of the hub; {UNTRAINABLE}"
            )
        self.net = policy.net  # a submodule, so that LeRobot finds its device and size
        self._policy = policy
        self._episode = 0
        self._chunk: deque[torch.Tensor] = deque()
        self._step = 0
        self._pasts: dict[int, Past] = {}  # of each robot

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: DvlaConfig | None = None,
        revision: str | None = None,
        dataset_meta: Any = None,
        **_: Any,
    ) -> DvlaPolicy:
        """Load what `dvla export` wrote, from a folder or the hub, for the robot of `dataset_meta` where it is given.

        `UserError` for another robot: its actions have other names in another order, or are of another width."""
        path = str(pretrained_name_or_path)
        config = config or _read_config(path, revision)
        policy = Policy.from_pretrained(
            f"{path}@{revision}" if revision and not Path(path).exists() else path,
            dataset=config.dataset,
            device=torch.device(config.device) if config.device else "auto",
            vlm_path=config.vlm_path,
        )
        _require_robot(config, policy, dataset_meta)
        return cls(config, policy).eval()

    def _apply(self, fn: Any, recurse: bool = True) -> DvlaPolicy:
        super()._apply(fn, recurse)  # of `to`, `cuda` and the like
        self._policy.to(next(self.net.parameters()).device)
        return self

    def get_optim_params(self) -> dict[str, Any]:
        raise UserError(UNTRAINABLE)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any] | None]:
        raise UserError(UNTRAINABLE)

    def supports_rtc(self) -> bool:
        """Whether `lerobot-rollout --inference.type=rtc` may plan in the background: see `blend`. Not with a history,
        since only some of the frames come here then."""
        return not self._policy.history

    def reset(self) -> None:
        """Begin a new episode of every robot."""
        self._episode, self._step = self._episode + 1, 0
        self._chunk.clear()
        self._pasts.clear()

    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        *,
        inference_delay: int = 0,
        prev_chunk_left_over: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Images [B,3,H,W] in [0,1], state [B,ds], "task" a text for each → native actions [B,T,d] float32.

        The noise depends on the robot's place in the batch, the episode and the step. Called by itself, it is not shown
        the frames in between, so a policy with a history sees the current one alone.

        Args:
            inference_delay, prev_chunk_left_over: steps that will have passed when the chunk is used, and the actions
                [n,d] that follow meanwhile, where LeRobot plans in the background."""
        policy = self._policy
        if policy.history:
            warnings.warn("this policy sees earlier frames, and is asked without them: use select_action", stacklevel=2)
        chunk = self._predict(self._observations(batch), batch)
        if prev_chunk_left_over is not None:
            rtc = getattr(self.config, "rtc_config", None)  # what `lerobot-rollout` asks for
            chunk = blend(policy.robot.action_map, prev_chunk_left_over, chunk, inference_delay, rtc)
        return chunk

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """The next action of every robot [B,d]; a forward pass when the chunk is used up."""
        history, observations = self._policy.history, []
        if history:  # which may see any step later
            found = enumerate(self._observations(batch))
            observations = [self._pasts.setdefault(i, Past(history)).push(seen) for i, seen in found]
        if not self._chunk:
            steps = self.config.n_action_steps or self.config.horizon
            chunk = self._predict(observations, batch) if history else self.predict_action_chunk(batch)
            self._chunk.extend(chunk[:, :steps].transpose(0, 1))  # steps times [B,d]
        self._step += 1
        return self._chunk.popleft()

    def _observations(self, batch: dict[str, Any]) -> list[Observation]:
        policy = self._policy
        views = policy.robot.views if policy.needs_images else ()
        return [
            dataclasses.replace(seen, start=self._episode * 4096 + i, step=self._step)
            for i, seen in enumerate(from_lerobot(batch, views, policy.robot.state_map.field_names))
        ]

    def _predict(self, observations: list[Observation], batch: dict[str, Any]) -> torch.Tensor:
        """Native actions [B,T,d], where the batch is."""
        return torch.from_numpy(self._policy.act_batch(observations)).to(batch[OBS_STATE].device)


def _require_robot(config: DvlaConfig, policy: Policy, dataset_meta: Any) -> None:
    """`UserError` unless LeRobot's actions are as many as the policy's, and the robot's names are in its order."""
    own, asked = policy.robot.action_map.native_dim, (config.output_features or {}).get(ACTION)
    if asked is not None and tuple(asked.shape) != (own,):
        raise UserError(
            f"the robot takes actions of {list(asked.shape)} numbers, this policy gives [{own}] for another robot: "
            f"{', '.join(policy.robot.action_map.native_names)}"
        )
    features = getattr(dataset_meta, "features", {})
    for key, fields in ((ACTION, policy.robot.action_map), (OBS_STATE, policy.robot.state_map)):
        native, theirs = native_names(fields), features.get(key, {}).get("names")
        if native and isinstance(theirs, list) and sorted(theirs) == sorted(native) and theirs != native:
            raise UserError(f"the robot's {key} has the order {', '.join(theirs)}, the policy's {', '.join(native)}")
