"""DexWild HDF5 files."""

from .source import DexWildSource

READER = DexWildSource
