"""Diffusion Policy's Zarr replay buffers."""

from .source import ReplayBufferSource

READER = ReplayBufferSource
