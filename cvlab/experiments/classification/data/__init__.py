"""Data sets of small images with a class each, and their augmentation."""
