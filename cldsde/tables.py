"""Tables of results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Entry(NamedTuple):
    """Entry of a table: its text, whether it is set in bold, and whether it is a number."""

    text: str
    best: bool = False
    number: bool = True


class Table(NamedTuple):
    """A table with its title, and remarks below it."""

    title: str
    head: list[str]
    rows: list[list[Entry]]
    remarks: list[str]

    def markdown(self) -> str:
        """The table as Markdown, with its title above and its remarks below."""
        rule = 3 * "-"
        lines = [self.head, [f"{rule}:" if entry.number else rule for entry in self.rows[0]]]
        for row in self.rows:
            texts = [(entry.text.replace("|", "\\|"), entry.best) for entry in row]
            lines.append([f"**{text}**" if best else text for text, best in texts])
        title = [f"## {self.title}", ""] if self.title else []
        joined = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([*title, *joined, *(f"\n{remark}" for remark in self.remarks)])


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean of some values, with their standard deviation if there are several."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
