"""Devices, the training loop, optimizers, and the trainer in a run directory. May import `runs`, `data` and below."""
