"""Grids of variants and seeds, trained and evaluated."""
