"""Tables, plots and comparisons, read from run directories; no experiment is imported here."""
