"""The frozen vision-language encoder: checkpoints, preprocessing, features, LoRA."""
