"""Detector heads on the feature maps of a backbone."""
