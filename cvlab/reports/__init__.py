"""Tables, plots, pages and comparisons, read from run directories. May import `runs`, `config` and the root modules."""
