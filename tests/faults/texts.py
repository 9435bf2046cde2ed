"""Configurations and command lines that the tests of faults share."""

import textwrap

CONFIG = """experiment: classify
data: {name: scenes10, num_train: 100, val_fraction: 0.02}
model: {name: deep_convnet, filters: [4], pools: [0], batchnorm: true}
optimizer: {name: adam, lr: 1e-2}
batch_size: 20
duration: {epochs: 1000}
threads: 1
precision: float32
"""
SWEEP = "experiment: sweep\nbase:\n" + textwrap.indent(CONFIG, "  ") + "grid: {optimizer.lr: [1e-2, 1e-3]}\n"

READERS = (
    "show latest",
    "report latest",
    "compare latest latest",
    "runs",
    "eval latest",
    "export latest --to safetensors",
)
WRITERS = (
    "resume latest",
    "train {folder}/c.yaml",
    "sweep {folder}/sweep.yaml",
    "detect {folder}/photos",
    "doctor --faults",
)
