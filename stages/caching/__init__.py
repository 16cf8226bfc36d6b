"""Stage one: from a dataset to a feature cache."""
