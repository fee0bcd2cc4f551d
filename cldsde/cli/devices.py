"""The option ``--device``."""

from __future__ import annotations

import re

import torch
from jsonargparse import ArgumentParser

def add_device_argument(parser: ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--device", type=str, metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps"
    )


def resolve_device(name: str) -> str:
    """Turn ``auto`` into a GPU where there is one; refuse a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        msg = f"--device must be auto, cpu, cuda, cuda:N or mps; got {name!r}"
        raise ValueError(msg)
    kind, _, index = name.partition(":")
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[kind]:
        msg = f"--device {name} is not available on this machine; use auto or cpu"
        raise ValueError(msg)
    return name
