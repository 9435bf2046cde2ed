"""Run directories: records, checkpoints, interrupts.

The only writer to disk. May import `storage`, `config` and the root modules.
"""
