"""Comparisons with other libraries: `python benchmarks/NAME.py --json`."""
