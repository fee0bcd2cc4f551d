"""The command ``cldsde evaluate``."""

import dataclasses
import errno
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cldsde import VPSDE
from cldsde.images.evaluate import classifier
from cldsde.images.evaluate.classifier import ImageClassifier
from cldsde.images.evaluate.results import read_results
from cldsde.solvers import recommend, recommended
from command import command, rejected
from tolerances import EPS32

pytestmark = pytest.mark.usefixtures("untrained_classifier")
DEVICE = ["--device", "cpu"]
ROUNDED = 10 * 10.0**-10  # results hold ten digits


def evaluate(*arguments):
    return command("evaluate", *arguments, *DEVICE)


def results(file):
    return list(read_results(file).values())


def test_a_run_is_measured_and_finished_results_are_kept(run, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    arguments = [run, "--out", out, "--samples", 6, "--repeats", 2]
    arguments += ["--solver", "sscs,em", "--nfe", "3,5", "--part", "held_out"]
    assert evaluate(*arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in table[2:6]] == [
        [f" {solver} ", f" {nfe} "] for solver in ("sscs", "euler-maruyama") for nfe in (3, 5)
    ]
    assert [one.seeds for one in results(out)] == [(0, 5), (6, 11)] * 4
    assert [one.nfe for one in results(out)] == [3, 3, 5, 5] * 2
    before = out.read_text()
    assert evaluate(*arguments) == 0
    assert out.read_text() == before


def test_the_choice_of_the_recommended_solver_is_shown(run, capsys):
    options = ["--process", "VPSDE", "--samples", 6, "--nfe", 4, "--part", "held_out"]
    assert evaluate(run, *options) == 0
    [one] = results(run / "evaluation-VPSDE.jsonl")
    levels = recommend(VPSDE(), 4, shape=(1, 8, 8)).kappa
    assert one.sampler["kappa"] == pytest.approx(levels, rel=ROUNDED, abs=0)
    shown = capsys.readouterr().out
    assert f"| recommended | 4 | κ {', '.join(f'{x:.2f}' for x in levels)} | 6 | " in shown
    assert "\nrecommended, 4 evaluations: order 3, λ = 0.5.\n" in shown


def test_a_change_of_the_recommended_table_is_measured_and_not_the_old_number_shown(
    run, capsys, monkeypatch
):
    options = ["--process", "VPSDE", "--samples", 6, "--nfe", 4, "--part", "held_out"]
    assert evaluate(run, *options) == 0
    first, *others = recommended.RECOMMENDED
    changed = dataclasses.replace(first, ends=(first.ends[0], first.ends[1] + 0.1))
    monkeypatch.setattr(recommended, "RECOMMENDED", (changed, *others))
    before = capsys.readouterr().out
    assert evaluate(run, *options) == 0
    old, new = results(run / "evaluation-VPSDE.jsonl")
    later = old.sampler["kappa"][-1] + 0.1
    assert new.sampler["kappa"][-1] == pytest.approx(later, rel=ROUNDED, abs=0)
    assert new.numbers != old.numbers
    shown = capsys.readouterr().out
    rows = [[x for x in text.splitlines() if x.startswith("| recomm")] for text in (before, shown)]
    assert [len(x) for x in rows] == [1, 1]
    assert f"{new.numbers['fd']:.3f}" in rows[1][0]
    # Nothing has changed since: the number is kept.
    assert evaluate(run, *options) == 0
    assert len(results(run / "evaluation-VPSDE.jsonl")) == 2


@pytest.mark.slow
def test_bits_are_added_to_the_results(run, tmp_path, capsys):
    arguments = [run, "--out", tmp_path / "results.jsonl", "--samples", 6, "--part", "held_out"]
    assert evaluate(*arguments) == 0
    assert evaluate(*arguments, "--metrics", "bpd", "--likelihood-images", 2) == 0
    assert results(tmp_path / "results.jsonl")[-1].about["images"] == 2
    assert " bits per dim of 2 images (" in capsys.readouterr().out


def test_samples_in_a_file_and_a_folder_are_as_far_from_the_data_as_those_of_the_run(
    run, tmp_path, monkeypatch
):
    """Digits have 17 levels, which a file holds as they are and a picture as bytes."""
    assert evaluate(run, "--samples", 10, "--out", tmp_path / "run.jsonl") == 0
    [expected] = results(tmp_path / "run.jsonl")
    for name in ("x", "x.npz"):
        words = ("--seeds", "0-9", "--out", tmp_path / name)
        assert command("sample", run, *words, *DEVICE) == 0
    (tmp_path / "x" / "._0.png").touch()  # as macOS leaves them
    shutil.copytree(tmp_path / "x", tmp_path / "x.v2")
    for name in ("x", "x.npz", "x.v2"):
        assert evaluate(tmp_path / name, "--reference", run) == 0
        [found] = results(tmp_path / f"{name}-evaluation.jsonl")
        assert found.about["samples"] == 10
        # A file gives them in another order. A distance has the rounding of features in single
        # precision, a small difference of large numbers.
        close = 800 * EPS32
        assert found.numbers["fd"] == pytest.approx(expected.numbers["fd"], rel=close, abs=0)
    (tmp_path / "x-evaluation.jsonl").unlink()
    monkeypatch.chdir(tmp_path / "x")
    assert evaluate(".", "--reference", run) == 0
    assert (tmp_path / "x-evaluation.jsonl").exists()


def test_the_accuracy_of_the_classifier_is_shown_and_a_useless_one_noted(
    run, tmp_path, capsys, monkeypatch
):
    for accuracy, noted in ((0.5, False), (0.2, True)):
        trained = ImageClassifier(1, 10, width=4, size=8).eval(), accuracy
        monkeypatch.setattr(classifier, "train_classifier", mock.Mock(return_value=trained))
        (run / "classifier.safetensors").unlink(missing_ok=True)
        out = tmp_path / f"{accuracy}.jsonl"
        assert evaluate(run, "--samples", 12, "--part", "held_out", "--out", out) == 0
        shown = capsys.readouterr()
        assert f"Classifier of fd: {accuracy:.1%} of held-out images right" in shown.out
        assert ("fd means little" in shown.err) is noted
        assert results(out)[0].about["classifier_accuracy"] == accuracy


def test_a_read_only_run_keeps_its_classifier_beside_the_results(
    run, tmp_path, capsys, monkeypatch
):
    probe = tempfile.NamedTemporaryFile

    def read_only(*arguments, dir, **options):  # noqa: A002
        if dir == run:
            raise PermissionError(errno.EACCES, "Permission denied")
        return probe(*arguments, dir=dir, **options)

    # Root may write even if the mode of a folder forbids it.
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    assert evaluate(run, "--samples", 6, "--part", "held_out", "--out", tmp_path / "x.json") == 0
    assert (tmp_path / "x-reference" / "classifier.safetensors").is_file()
    message = rejected(capsys, "evaluate", run)
    assert "run cannot be made or written (Permission denied)" in message
    (run / "classifier.safetensors").write_text("")
    assert evaluate(run, "--out", tmp_path / "y.json") == 1  # after all checks
    assert "classifier.safetensors is damaged" in capsys.readouterr().err


def test_data_that_are_elsewhere_are_asked_for_by_the_option(tmp_path, capsys):
    config = {"data": {"name": "folder", "options": {"path": "photos", "size": 8}}}
    (tmp_path / "c.json").write_text(json.dumps({**config, "training": {"images": 1}}))
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8), np.uint8))
    text = rejected(capsys, "evaluate", tmp_path / "x.npy", "--reference", tmp_path / "c.json")
    place = Path("photos").absolute()
    assert f"--data: path must be a folder; got {place}, which is no folder" in text
