"""The tasks, one folder each. May import every layer below; no task imports another.

In each folder `config.py` has the configurations and `experiments.py` the experiments. Neither imports torch, so that a
configuration is validated in a fraction of a second; the methods of an experiment import what they need.
"""
