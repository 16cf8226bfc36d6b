"""RLDS datasets: TFRecord files without TensorFlow."""

from .source import RldsSource

READER = RldsSource
