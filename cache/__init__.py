"""Stage-one material: corpus readers, unified actions, the VLM encoder, the store, the loader. Imports neither drifting nor stages."""
