"""PaliGemma 2."""
