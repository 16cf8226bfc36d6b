"""Stages two and three: the training loop and what stands around it."""
