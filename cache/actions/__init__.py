"""The unified 128-d action space: slots, field maps, rotations, normalization."""
