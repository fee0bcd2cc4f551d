"""Comparison of models and samplers: a loop over training and evaluation, and its report."""

from cldsde.images.compare.comparison import Comparison
from cldsde.images.compare.config import PRESETS, ComparisonConfig, load_comparison

__all__ = ["PRESETS", "Comparison", "ComparisonConfig", "load_comparison"]
