"""Bytes on disk and from the network: atomic writes, locks, downloads, archives. May import the root modules only."""
