"""Field, losses, DiT and policy model: pure torch, no I/O. Imports neither cache nor stages."""
