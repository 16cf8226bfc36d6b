"""RLBench demonstrations: folders, zips or tars."""

from .source import RlbenchSource

READER = RlbenchSource
