"""Checks of the configuration of a `PipelineScheduler`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin


def replaced_class(config: Mapping[str, Any]) -> Any:
    """Class of the scheduler that a configuration of a `PipelineScheduler` replaces."""
    kind = getattr(diffusers, str(config.get("scheduler")), None)
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not known:
        raise ValueError(
            "config must come from a PipelineScheduler; got the configuration of "
            f"{config.get('_class_name', 'another scheduler')}. Pass the scheduler itself: "
            "PipelineScheduler(pipe.scheduler)"
        )
    return kind


def check_described(config: Any, parts: Mapping[str, object], replaced: object) -> None:
    """Raise a ValueError unless a configuration determines all parts and the scheduler."""
    for name, part in parts.items():
        if part is not None and config[name] is None:
            raise ValueError(
                f"{name} cannot be saved: {part!r} is not determined by the name of a class of "
                "cldsde and options of JSON"
            )
    if getattr(diffusers, config.scheduler, None) is not type(replaced):
        msg = f"scheduler cannot be saved: {config.scheduler} is no class of diffusers"
        raise ValueError(msg)
