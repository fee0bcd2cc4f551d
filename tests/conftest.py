"""Settings of all tests."""

import os

from hypothesis import settings

# "ci" takes the same examples on every machine and in every run. "deep" looks further, at random;
# `tox -e slow` sets HYPOTHESIS_PROFILE=deep.
settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=30)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Doctests would import it a second time, and a device can be registered once.
collect_ignore = ["simulated_device.py"]
