"""From shards to training batches: order, read-ahead, assembly, prefetch."""
