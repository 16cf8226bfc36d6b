"""Drifting where the answer is known."""
