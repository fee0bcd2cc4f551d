"""Settings shared by all tests."""

from hypothesis import settings

# The same examples on every machine and in every run; `--hypothesis-profile explore` looks further.
settings.register_profile(
    "deterministic", derandomize=True, database=None, deadline=None, max_examples=30
)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile("deterministic")

# Doctests would import it a second time, and a device can be registered once.
collect_ignore = ["simulated_device.py"]
