"""A dvla policy's configuration in LeRobot: `config.json` of an exported policy, and its processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import (
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)

from ....common.device import pick_device
from ....errors import UserError
from ..lerobot_files import TYPE

UNTRAINABLE = "train it with `dvla train`: LeRobot's trainer cannot train this policy"


@PreTrainedConfig.register_subclass(TYPE)
@dataclass
class DvlaConfig(PreTrainedConfig):
    """config.json of an exported policy."""

    device: str | None = None  # None: a GPU where there is one
    action_feature_names: list[str] | None = None  # the robot's own, where known: `lerobot-rollout` orders by them
    dataset: str | None = None  # whose robot and normalization to use, where it was trained on several
    horizon: int = 16  # T, steps of a chunk
    n_action_steps: int | None = None  # of them executed before the next forward pass; None: all
    vlm_path: str | None = None  # where the VLM is, if not where the policy says
    push_to_hub: bool = False  # `dvla push` does that

    def __post_init__(self) -> None:
        self.device = self.device or str(pick_device("auto"))
        super().__post_init__()
        if self.n_action_steps is not None and not 1 <= self.n_action_steps <= self.horizon:
            raise ValueError(
                f"give n_action_steps from 1 to {self.horizon}, the steps of a chunk; got {self.n_action_steps}"
            )

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
        raise UserError(UNTRAINABLE)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Nothing to infer: an exported policy declares what it sees."""


def make_dvla_pre_post_processors(
    config: DvlaConfig, dataset_stats: Any = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Names, a batch dimension, devices. Nothing is normalized here: the policy works in the robot's units."""
    before = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](
        steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=config.device),
        ],
        name=POLICY_PREPROCESSOR_DEFAULT_NAME,
    )
    after = PolicyProcessorPipeline[Any, Any](
        steps=[DeviceProcessorStep(device="cpu")],
        name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after


def __getattr__(name: str) -> Any:
    if name == "DvlaPolicy":  # LeRobot looks for the policy in the module of its configuration
        from .plugin import DvlaPolicy

        return DvlaPolicy
    raise AttributeError(name)
