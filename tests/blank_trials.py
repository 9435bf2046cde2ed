"""Imported into the process that forks the trials of sweeps: their plots are blank. See conftest.py."""

from tests import blank_plots

blank_plots.apply()
