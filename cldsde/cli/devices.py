"""The option ``--device``."""

from __future__ import annotations

import torch

__all__ = ["resolve_device"]


def resolve_device(name: str) -> str:
    """Turn ``auto`` into a GPU where there is one; refuse a device that is not there.

    Raises
    ------
    ValueError
        If torch does not know the device, or this machine does not have it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        msg = f"--device: {name!r} cannot be used here ({reason}); use auto, cpu or cuda"
        raise ValueError(msg) from None
    return name
