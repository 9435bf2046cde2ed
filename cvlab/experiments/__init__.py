"""The tasks, one folder each. May import every layer below; no task imports another."""
