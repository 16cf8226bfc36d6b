"""Caches to other formats and places, and back."""
