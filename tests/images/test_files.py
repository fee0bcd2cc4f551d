"""Tensor files hold the written tensors or are rejected."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from cldsde.files import file_lock
from cldsde.images.tensor_files import load_tensors, save_tensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.empty(0, 2),
}


def test_tensors_and_notes_come_back_and_equal_contents_make_equal_files(tmp_path):
    words = 'a "quoted" \\ line\nwith\tcontrol \x01\x7f and é 漢 \U0001f600'
    notes = {f"{i}{words}": words for i in range(9)}
    files = [tmp_path / f"{i}" for i in range(4)]
    for i, file in enumerate(files):
        save_tensors(file, "numbers", TENSORS, dict(sorted(notes.items(), reverse=bool(i % 2))))
    assert len({file.read_bytes() for file in files}) == 1
    tensors, found = load_tensors(files[0], "numbers")
    assert notes.items() <= found.items()
    assert tensors.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert torch.equal(tensors[name], x)
        assert tensors[name].dtype == x.dtype


def test_every_flipped_or_missing_byte_is_noticed(tmp_path):
    file = tmp_path / "x.safetensors"
    save_tensors(file, "numbers", TENSORS, {"note": "x"})
    whole = file.read_bytes()
    for i in range(0, len(whole), 5):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(ValueError, match=r"x\.safetensors (is damaged|must hold)"):
            load_tensors(file, "numbers")
        file.write_bytes(whole[:i])
        with pytest.raises(ValueError, match=r"x\.safetensors (is damaged|must hold)"):
            load_tensors(file, "numbers")


def test_other_files_are_rejected(tmp_path):
    file = tmp_path / "x.safetensors"
    save_tensors(file, "numbers", TENSORS, {})
    with pytest.raises(ValueError, match="must hold letters; it holds numbers"):
        load_tensors(file, "letters")
    save_file(TENSORS, file)
    with pytest.raises(ValueError, match="must hold numbers; it holds something else"):
        load_tensors(file, "numbers")
    torch.save(TENSORS, file)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_tensors(file, "numbers")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tensors(tmp_path / "y", "numbers")
    with pytest.raises(OSError, match="cannot be written"):
        save_tensors(tmp_path / "nowhere" / "x", "numbers", TENSORS, {})


def test_a_name_is_held_by_one_at_a_time(tmp_path):
    """A lock belongs to the opened file, so that threads stand for processes."""
    name, inside, seen = tmp_path / "x", [], []

    def work(i):
        for _ in range(20):
            with file_lock(name, wait=True):
                inside.append(i)
                time.sleep(1e-4)
                seen.append(list(inside))
                inside.clear()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(seen) == [[i] for i in range(4) for _ in range(20)]
    with file_lock(name, wait=False), pytest.raises(TimeoutError), file_lock(name, wait=False):
        pass
    with file_lock(name, wait=False):
        pass
    assert not list(tmp_path.iterdir())
