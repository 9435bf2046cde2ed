"""Hand-written layers, and the namespaces from which a model takes `layers.Conv2d`, `layers.Linear`, ...

`torch` is torch.nn; `manual` has hand-written forward and backward passes; `manual_alt` differs from it in the
derivation of BatchNorm's backward. All three read and write the same checkpoints.
May import the root modules only.
"""

LAYERS = {
    "torch": "torch:nn",
    "manual": "cvlab.layers.modules:MANUAL_LAYERS",
    "manual_alt": "cvlab.layers.modules:MANUAL_ALT_LAYERS",
}
