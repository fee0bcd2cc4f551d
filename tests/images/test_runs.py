"""Run folders are taken whole or left alone."""

from __future__ import annotations

import json

import pytest

from cldsde.images.runs import RunFolder

CONFIG = {"seed": 0, "samples": 10}


def test_a_new_folder_holds_its_configuration_and_is_continued(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run", CONFIG)
    assert json.loads((run / "config.json").read_text()) == CONFIG
    run.write_json("results.json", {"a": 1})
    del run
    assert (RunFolder(tmp_path / "deep" / "run", CONFIG) / "results.json").exists()


def files_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("name", "content", "folder", "error", "message"),
    [
        (
            "config.json",
            b'{"seed": 0, "samples": 9}',
            "",
            ValueError,
            r"other settings \(samples\)",
        ),
        ("config.json", b"[1]", "", ValueError, r"config\.json is n"),
        ("config.json", b"null", "", ValueError, r"config\.json is n"),
        ("config.json", b"{", "", ValueError, r"config\.json is n"),
        ("config.json", b"\xff\xfe", "", ValueError, r"config\.json is n"),
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
    assert files_of(tmp_path) == {tmp_path / name: content}


def test_a_folder_that_another_process_works_in_is_rejected(tmp_path):
    first = RunFolder(tmp_path, CONFIG)
    # A lock belongs to the opened file, so that a second opening stands for a second process.
    with pytest.raises(ValueError, match="in use by another process"):
        RunFolder(tmp_path, CONFIG)
    del first
    RunFolder(tmp_path, CONFIG)


def test_free_settings_take_the_place_of_old_ones_and_the_folder_stays_locked(tmp_path):
    before = {"seed": 0, "sampling": {"nfe": 3, "options": {}}, "training": {"every": 1, "lr": 2}}
    after = {"seed": 0, "sampling": {"nfe": 4}, "training": {"every": 5, "lr": 2}}
    free = ("sampling", "training.every")
    RunFolder(tmp_path, before)
    with pytest.raises(ValueError, match=r"other settings \(sampling.nfe, "):
        RunFolder(tmp_path, after)
    run = RunFolder(tmp_path, after, free=free)
    assert json.loads((run / "config.json").read_text()) == after
    with pytest.raises(ValueError, match="in use by another process"):
        RunFolder(tmp_path, after)
    other = {**after, "training": {"every": 1, "lr": 3}}
    with pytest.raises(ValueError, match=r"other settings \(training.lr\)"):
        RunFolder(tmp_path, other, free=free)


def test_half_written_files_are_removed_but_those_of_runs_below(tmp_path):
    """Below may be a run that another process is training: it holds a lock of its own."""
    run = RunFolder(tmp_path, CONFIG)
    del run
    own = [tmp_path / name for name in (".partial-a", "samples/.partial-b.png")]
    own.append(tmp_path / "evaluations/.partial-c.json")
    below = tmp_path / "models/VP/.partial-d.safetensors"
    for file in (*own, below):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    RunFolder(tmp_path, CONFIG)
    assert not any(file.exists() for file in own)
    assert below.exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    run.write_json("results.json", {"a": 1})

    def fail(file):
        file.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write("results.json", fail)
    assert json.loads((run / "results.json").read_text()) == {"a": 1}
    assert not list(tmp_path.glob(".partial-*"))


def test_metrics_beyond_the_step_of_a_continued_run_are_dropped(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    for step in (10, 20, 30):
        run.log({"images": step})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images": 4')  # cut off
    run.forget_metrics_after(20)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == [10, 20]
