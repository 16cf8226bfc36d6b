"""Simulators: record experts, evaluate policies."""
