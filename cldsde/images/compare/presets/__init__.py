"""Configurations of the comparisons that come with the package."""
