"""LeRobot's policy server of asynchronous inference, with dvla's policies: the stock one knows no plug-ins.

    python -m lerobot_policy_dvla.policy_server --host=127.0.0.1 --port=8080

It takes the stock server's options and serves LeRobot's own policies, too. Robots connect with LeRobot's client,
`python -m lerobot.async_inference.robot_client --policy_type=dvla --pretrained_name_or_path=…`.
"""

from __future__ import annotations

from lerobot.async_inference import constants, policy_server
from lerobot.configs.types import FeatureType, PolicyFeature

from dvla.stages.policy.lerobot_files import TYPE

from . import DvlaPolicy


class PolicyServer(policy_server.PolicyServer):
    """The stock server, which hands dvla's policies the images as the robot took them: they pad where it squeezes."""

    @property
    def policy_image_features(self) -> dict[str, PolicyFeature]:
        """Name of a camera → the size that its images are resized to."""
        if not isinstance(self.policy, DvlaPolicy):
            return super().policy_image_features
        shapes = {key: f["shape"] for key, f in self.lerobot_features.items() if f["dtype"] in ("image", "video")}
        return {key: PolicyFeature(FeatureType.VISUAL, (c, h, w)) for key, (h, w, c) in shapes.items()}


constants.SUPPORTED_POLICIES.append(TYPE)  # a list that the server shares
policy_server.PolicyServer = PolicyServer

if __name__ == "__main__":
    policy_server.serve()
