"""robomimic's HDF5 files and those of its relatives."""

from .source import RobomimicSource

READER = RobomimicSource
