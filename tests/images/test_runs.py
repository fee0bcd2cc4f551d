"""Run folders are taken whole or left alone; damaged tensor files are rejected."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from cldsde.files import file_lock
from cldsde.images.runs import RunFolder
from cldsde.images.tensor_files import load_tensors, save_tensors

CONFIG = {"seed": 0, "samples": 10}


@pytest.mark.parametrize(
    ("name", "content", "folder", "error", "message"),
    [
        ("config.json", b'{"seed": 0, "samples": 9}', "", ValueError, r"settings \(samples\)"),
        *(
            ("config.json", content, "", ValueError, r"config\.json is n")
            for content in (b"[1]", b"\xff\xfe")
        ),
        ("thesis.tex", b"text", "", ValueError, "no run of cldsde"),
        ("file", b"text", "file", ValueError, "not a folder"),
        ("file", b"text", "file/run", OSError, "file"),
    ],
)
def test_other_folders_are_rejected_and_left_as_they_are(
    tmp_path, name, content, folder, error, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        RunFolder(tmp_path / folder, CONFIG)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_bytes() == content


def test_a_folder_stays_locked_and_its_settings_as_they_were(tmp_path):
    """Whoever continues the run writes its settings, once nothing can be rejected any more."""
    RunFolder(tmp_path, CONFIG)
    run = RunFolder(tmp_path, {**CONFIG, "samples": 11}, free=("samples",))
    assert json.loads((run / "config.json").read_text()) == CONFIG
    # A lock belongs to the opened file, so that a second opening stands for a second process.
    with pytest.raises(ValueError, match="in use by another process"):
        RunFolder(tmp_path, CONFIG)


def test_half_written_files_are_removed_but_those_of_runs_below(tmp_path):
    """Below may be a run that another process is training: it holds a lock of its own."""
    RunFolder(tmp_path, CONFIG)
    below = "models/VP/.partial-d.safetensors"
    for name in (".partial-a", "samples/.partial-b.png", "evaluations/.partial-c.json", below):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    RunFolder(tmp_path, CONFIG)
    assert list(tmp_path.rglob(".partial-*")) == [tmp_path / below]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run", CONFIG)
    run.write_json("results.json", {"a": 1})

    def fail(file):
        file.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write("results.json", fail)
    assert json.loads((run / "results.json").read_text()) == {"a": 1}
    assert not list(run.path.glob(".partial-*"))


def test_numbers_of_metrics_that_are_not_finite_are_null(tmp_path):
    """As norms of gradients are if the scaler of mixed precision skips their step."""
    run = RunFolder(tmp_path, CONFIG)
    run.log({"images": 8, "gradient_norm": math.inf, "score_gradient_norm": math.nan})
    found = json.loads((run / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert found == {"images": 8, "gradient_norm": None, "score_gradient_norm": None}


TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.empty(0, 2),
}


def test_tensors_and_notes_come_back_and_equal_contents_make_equal_files(tmp_path):
    notes = {f"{i}\n\x01 é": 'a "quoted" \\ line' for i in range(9)}
    files = [tmp_path / f"{i}" for i in range(4)]
    for i, file in enumerate(files):
        save_tensors(file, "numbers", TENSORS, dict(sorted(notes.items(), reverse=bool(i % 2))))
    assert len({file.read_bytes() for file in files}) == 1
    tensors, found = load_tensors(files[0], "numbers")
    assert notes.items() <= found.items()
    assert tensors.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        torch.testing.assert_close(tensors[name], x, rtol=0, atol=0)  # dtypes, too


def test_other_tensor_files_are_rejected_and_every_wrong_or_missing_byte_is_noticed(tmp_path):
    file = tmp_path / "x.safetensors"

    def assert_rejected(message, kind="numbers"):
        with pytest.raises(ValueError, match=rf"x\.safetensors {message}"):
            load_tensors(file, kind)

    save_tensors(file, "numbers", TENSORS, {"note": "x"})
    assert_rejected("must hold letters; it holds numbers", "letters")
    whole = file.read_bytes()
    for i in range(0, len(whole), 7):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert_rejected("(is damaged|must hold)")
        file.write_bytes(whole[:i])
        assert_rejected("(is damaged|must hold)")
    save_file(TENSORS, file)
    assert_rejected("must hold numbers; it holds something else")
    torch.save(TENSORS, file)
    assert_rejected("is damaged or no safetensors file")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tensors(tmp_path / "y", "numbers")
    with pytest.raises(OSError, match="cannot be written"):
        save_tensors(tmp_path / "nowhere" / "x", "numbers", TENSORS, {})


def test_a_name_is_held_by_one_at_a_time(tmp_path):
    """A lock belongs to the opened file, so that threads stand for processes."""
    inside = []

    def work(i):
        for _ in range(5):
            with file_lock(tmp_path / "x", wait=True):
                inside.append(i)
                time.sleep(1e-4)
                assert inside == [i]
                inside.clear()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not list(tmp_path.iterdir())


def test_snapshots_of_another_metric_make_room(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    (run / "snapshots").mkdir()
    for i, metrics in enumerate([{"last": -9.0}, {"loss": 0.5}, {"loss": 0.4}]):
        name = f"{i}.safetensors"
        (run / "snapshots" / name).touch()
        run.keep_snapshot(name, metrics, *metrics, count=1)
        assert [file.name for file in tmp_path.glob("snapshots/*.safetensors")] == [name]
