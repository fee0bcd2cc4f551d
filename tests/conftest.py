"""Settings of all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import is_hypothesis_test, settings

# "ci" takes the same examples on every machine and in every run. "deep" looks further, at random:
# `tox -e slow` sets HYPOTHESIS_PROFILE=deep, and runs all properties besides the slow tests.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=30)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=300)
settings.load_profile(PROFILE)

# Doctests would import it a second time, and a device can be registered once.
collect_ignore = ["simulated_device.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count properties among the slow tests if many examples of each are asked for."""
    for item in items:
        if PROFILE == "deep" and is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("slow")
