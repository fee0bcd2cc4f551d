"""Progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def progress_bar(items: Iterable[Any] | None, *, shown: bool, **options: Any) -> Any:
    """Progress bar over items; if stderr is not a terminal, it is updated every 10 seconds.

    Parameters
    ----------
    items
        Items to iterate over; None for a bar that the caller updates.
    shown
        Whether to show the bar.
    options
        Further options of tqdm, e.g. ``desc``.
    """
    # Import the notebook bar only if it is shown, because it warns if widgets are missing.
    if shown:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, disable=not shown, mininterval=interval, maxinterval=interval, **options)
