"""Process groups, collectives, sharding, DDP and the launcher. May import the root modules only."""
