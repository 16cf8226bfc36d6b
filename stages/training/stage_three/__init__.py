"""Stage three: the live VLM with LoRA."""
