"""A cache as WebDataset tars."""
