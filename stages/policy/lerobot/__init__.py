"""A dvla policy as one of LeRobot's: importing this package registers its configuration and its class."""

from .config import DvlaConfig, make_dvla_pre_post_processors
from .plugin import DvlaPolicy

__all__ = ["DvlaConfig", "DvlaPolicy", "make_dvla_pre_post_processors"]
