"""Tensors in safetensors files, with a digest of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cldsde.files import write_whole
from cldsde.messages import brief

_NOTES = "cldsde"


def save_tensors(
    file: Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all, with a digest of its content.

    Equal contents make equal files: the notes are one entry, because the library writes entries in
    random order.
    """
    on_cpu = {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}
    notes = {**metadata, "kind": kind}
    notes["sha256"] = tensors_digest(on_cpu, notes)
    entry = {_NOTES: json.dumps(notes, sort_keys=True)}
    try:
        write_whole(file, lambda path: save_file(on_cpu, path, metadata=entry))
    except (OSError, SafetensorError) as error:
        raise OSError(f"{file} cannot be written ({brief(error)})") from error


def load_tensors(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load tensors and metadata that `save_tensors` wrote; ``"sha256"`` is the digest.

    Runs no code of the file. Raises a FileNotFoundError if there is none, a ValueError if it is
    damaged or of another kind.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        with safe_open(file, framework="pt") as source:
            tensors = {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
            entries: dict[str, str] = source.metadata() or {}
        # Older files have an entry for each note.
        notes: dict[str, str] = json.loads(entries[_NOTES]) if _NOTES in entries else entries
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({brief(error)})") from error
    if notes.get("kind") != kind:
        raise ValueError(f"{file} must hold {kind}; it holds {notes.get('kind', 'something else')}")
    written = notes.pop("sha256", "")
    if written != tensors_digest(tensors, notes):
        raise ValueError(f"{file} is damaged: its contents differ from the digest in it")
    del notes["kind"]
    return tensors, {**notes, "sha256": written}


def tensors_digest(tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> str:
    """SHA-256 of tensors on the CPU and their notes."""
    total = hashlib.sha256(json.dumps(sorted((notes or {}).items())).encode())
    for key in sorted(tensors):
        x = tensors[key]
        total.update(f"{key} {x.dtype} {tuple(x.shape)}".encode())
        total.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
