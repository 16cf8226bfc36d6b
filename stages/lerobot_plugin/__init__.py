"""The earlier place of `stages/policy/lerobot`, the LeRobot plug-in.

The cards of earlier exports name this path for `--env.discover_packages_path`.
"""

from ..policy.lerobot.config import DvlaConfig, make_dvla_pre_post_processors
from ..policy.lerobot.plugin import DvlaPolicy

__all__ = ["DvlaConfig", "DvlaPolicy", "make_dvla_pre_post_processors"]
