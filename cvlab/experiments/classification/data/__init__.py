"""Data sets for image classification, their batches and augmentation."""
