"""The cache on disk: Zarr v3 shards, their index and checksums, WebDataset tars, remote mirrors."""
