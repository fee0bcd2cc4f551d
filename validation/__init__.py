"""Measurement of solvers against exact answers."""

from .moments import propagate_moments

__all__ = ["propagate_moments"]
