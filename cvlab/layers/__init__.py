"""Namespaces of layers: a model is built from `layers.Conv2d`, `layers.Linear`, ... of the one that is passed in.

`torch` is torch.nn; `manual` is ours, with forward and backward written out; `manual_alt` differs from it in the
derivation of BatchNorm's backward. All three read and write the same checkpoints.
May import the root modules only.
"""

LAYERS = {
    "torch": "torch:nn",
    "manual": "cvlab.layers.modules:MANUAL_LAYERS",
    "manual_alt": "cvlab.layers.modules:MANUAL_ALT_LAYERS",
}
