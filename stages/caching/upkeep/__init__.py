"""A finished cache: verify, repair, inspect, compare, clean up."""
