"""Everything that wants a GPU, one line an item: `make gpu-check` (benchmarks/gpu_check.sh)."""
