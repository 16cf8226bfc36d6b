"""A field map for a new dataset."""
