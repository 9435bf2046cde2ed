"""Namespaces of layers: a model is built from `layers.Conv2d`, `layers.Linear`, ... of the one that is passed in."""

LAYERS = {"torch": "torch:nn"}
