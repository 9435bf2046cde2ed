"""Fixtures of reports: which fonts are installed."""

import pytest

from cvlab.reports import fonts


@pytest.fixture(autouse=True)
def blank_plots():
    """Draw all plots, because the tests of reports look at them."""


@pytest.fixture
def only_fonts(monkeypatch):
    """Return a function that sets the fonts installed in addition to the bundled one."""

    def install(*paths):
        monkeypatch.setattr(fonts, "_installed", lambda: paths)
        fonts._path_with.cache_clear()

    yield install
    fonts._path_with.cache_clear()


@pytest.fixture
def bundled_font_only(only_fonts):
    """Make the bundled font the only one that exists."""
    only_fonts()
