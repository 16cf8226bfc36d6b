"""Readers, unified actions, the VLM encoder, the store and the loader. Imports neither drifting nor stages."""
