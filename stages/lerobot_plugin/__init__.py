"""Where the LeRobot plug-in was: the cards of earlier exports name this path for `--env.discover_packages_path`. It is `stages/policy/lerobot` now."""

from ..policy.lerobot.config import DvlaConfig, make_dvla_pre_post_processors
from ..policy.lerobot.plugin import DvlaPolicy

__all__ = ["DvlaConfig", "DvlaPolicy", "make_dvla_pre_post_processors"]
