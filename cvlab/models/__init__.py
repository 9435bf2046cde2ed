"""Pretrained classifiers as backbones, and their weights. May import `data`, `runs` and below."""
