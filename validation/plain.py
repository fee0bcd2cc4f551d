"""Conversion of results to types of strict JSON."""

from __future__ import annotations

import enum
import math
from typing import Any


def plain(value: Any) -> Any:
    """Convert nested dicts and sequences: lists for tuples, None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, enum.StrEnum) else value
