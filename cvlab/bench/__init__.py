"""Measurements of this machine and of cvlab itself. May import everything but `cli`."""
