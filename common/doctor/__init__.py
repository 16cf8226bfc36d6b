"""What is wrong with a machine or a command: missing packages, faults and how they end, the report of a bug."""
