"""cvlab: a command-line experiment runner for computer vision."""

__version__ = "0.1.0"
