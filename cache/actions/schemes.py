"""Names of the ways to normalize (normalizer.py) and of the frames of actions (chunk_frame.py), for settings: without
NumPy, as the command line starts."""

from __future__ import annotations

from typing import Literal, get_args

Scheme = Literal["std5", "meanstd", "minmax", "quantile", "std5-clipped"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
EARLIER: Scheme = "std5-clipped"  # of what says no scheme: runs and policies of earlier releases
Frame = Literal["absolute", "chunk"]
FRAMES: tuple[Frame, ...] = get_args(Frame)
