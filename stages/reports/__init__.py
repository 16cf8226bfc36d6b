"""A run as a page, runs side by side, an episode in Rerun."""
