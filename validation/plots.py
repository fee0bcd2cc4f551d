"""Figures of reports."""

from __future__ import annotations

from typing import Any


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Create a matplotlib figure and its axes, without a window.

    Raises
    ------
    ImportError
        If matplotlib is not installed; it comes with the extra ``validation``.
    """
    try:
        from matplotlib.figure import Figure  # an extra
    except ImportError as error:
        msg = "matplotlib is missing; install the extra: pip install 'cldsde[validation]'"
        raise ImportError(msg) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
