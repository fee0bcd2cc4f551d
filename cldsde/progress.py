"""Progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["progress_bar"]


def progress_bar(items: Iterable[Any] | None, *, shown: bool, **options: Any) -> Any:
    """Iterate over items with a bar; where stderr is no terminal it is drawn seldom.

    Parameters
    ----------
    items
        What to iterate over; None for a bar that is updated by hand.
    shown
        Whether to draw anything.
    options
        Passed to tqdm, e.g. ``desc``.
    """
    # The one for notebooks warns on import where there are no widgets.
    if shown:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, disable=not shown, mininterval=interval, maxinterval=interval, **options)
