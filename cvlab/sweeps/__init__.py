"""Sweeps: trials, search, scheduler and executors.

May import `runs`, `config`, `reports` and below; experiments by name, through `registry`.
"""
