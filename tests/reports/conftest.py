"""Fixtures of reports: which fonts are installed."""

import pytest

from cvlab.reports import fonts


@pytest.fixture(autouse=True)
def blank_plots():
    """Draw all plots: here they are what is tested."""


@pytest.fixture
def only_fonts(monkeypatch):
    """Set the fonts that are installed beside the bundled one."""

    def install(*paths):
        monkeypatch.setattr(fonts, "_installed", lambda: paths)
        fonts._path_with.cache_clear()

    yield install
    fonts._path_with.cache_clear()


@pytest.fixture
def bundled_font_only(only_fonts):
    """No font but the bundled one exists."""
    only_fonts()
