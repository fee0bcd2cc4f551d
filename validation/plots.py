"""Figures of reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .checks import Check
from .order_estimate import Level


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Create a matplotlib figure and its axes, without a window."""
    try:
        from matplotlib.figure import Figure  # an extra
    except ImportError as error:
        msg = "matplotlib is missing; install the extra: pip install 'cldsde[validation]'"
        raise ImportError(msg) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def drawable_levels(check: Check) -> list[Level]:
    """Levels that logarithmic axes can show."""
    levels = () if check.estimate is None else check.estimate.levels
    return [level for level in levels if 0 < level.error < math.inf]


def order_curves(subject: str, own: Sequence[Check]) -> Any:
    """Plot of a solver's errors against steps, with hollow markers for dropped levels."""
    figure, axes = canvas(8, 3.6)
    for i, check in enumerate(own):
        assert check.estimate is not None
        levels = drawable_levels(check)
        kept = [level for level in levels if level.kept]
        marker, style = "osD^v<>"[i % 7], {"color": f"C{i % 10}", "markersize": 4, "linewidth": 1}
        steps, errors = [x.step for x in levels], [x.error for x in levels]
        axes.plot(steps, errors, marker, **style, markerfacecolor="none")
        label = f"{check.kind} on {check.problem}: {check.estimate.order:.2f}"
        steps, errors = [x.step for x in kept], [x.error for x in kept]
        axes.plot(steps, errors, f"{marker}-", **style, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="1 / number of steps",
        ylabel="error of moments or states",
        title=subject,
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
