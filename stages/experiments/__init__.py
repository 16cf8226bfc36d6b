"""End-to-end pipelines: demo, ablations, toy, co-training, launch scripts."""
