"""Datasets: describe, check, measure, show, convert."""
