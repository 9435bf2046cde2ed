"""Annotation formats, data sets with boxes, and their augmentation."""
