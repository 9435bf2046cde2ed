"""Image classifiers; their layers come from a namespace such as torch.nn or cvlab.layers."""
