"""DexGraspNet 2.0 scenes, rendered."""

from .source import DexGraspNetSource

READER = DexGraspNetSource
