"""Comparison of models and samplers: a loop over training and evaluation, and its report."""

from cldsde.images.compare.comparison import Comparison
from cldsde.images.compare.config import (
    PRESETS,
    ComparisonConfig,
    RowConfig,
    check_comparison,
    load_comparison,
)
from cldsde.images.compare.report import plot_measure, read_results, write_report
from cldsde.images.compare.tables import tables

__all__ = [
    "PRESETS",
    "Comparison",
    "ComparisonConfig",
    "RowConfig",
    "check_comparison",
    "load_comparison",
    "plot_measure",
    "read_results",
    "tables",
    "write_report",
]
