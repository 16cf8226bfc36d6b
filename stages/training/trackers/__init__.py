"""Where a run's numbers are drawn, besides RUN/log.jsonl, on request: Weights & Biases, TensorBoard, trackio."""
