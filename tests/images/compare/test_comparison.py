"""Comparisons: one table after any interruption, and reports from its file alone."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from cldsde.images.compare import comparison
from cldsde.images.compare.comparison import Comparison
from cldsde.images.compare.config import ComparisonConfig
from cldsde.images.compare.report import RESULTS, read_comparison, write_report
from cldsde.images.evaluate import evaluation, results
from cldsde.images.evaluate.results import read_results
from cldsde.images.model import load_model
from cldsde.images.runs import RunFolder
from cldsde.images.sample import sampler as sampling
from cldsde.solvers import SSCS
from comparisons import TINY, feature_module, numbers, tiny

pytestmark = pytest.mark.usefixtures("undrawn_figures")

# Parts of the comparison, which take less time to check.
CLD = {"models": {"CLD": {}}, "rows": [TINY["rows"][0], TINY["rows"][2]]}
EM = {**CLD, "rows": TINY["rows"][:1]}


def compare(folder: Path, **changes) -> dict:
    return Comparison(ComparisonConfig.from_dict(tiny(**changes)), folder).run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(feature_module(folder.parent))
        compare(folder)
        yield folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished comparison."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def drawn(monkeypatch):
    """A spy on the samplers of images, which are made for a model and a recipe."""
    spy = mock.Mock(wraps=sampling.ImageSampler.of)
    for module in (evaluation, comparison):  # not of training
        monkeypatch.setattr(module, "ImageSampler", SimpleNamespace(of=spy))
    return spy


def test_every_cell_is_filled_with_its_mean_cost(finished):
    found = read_comparison(finished / RESULTS)
    assert found["complete"]
    cells = {row["label"]: row["cells"] for row in found["rows"]}
    assert [cell["nfe"] for cell in cells["EM"]] == [3, 5]
    assert cells["SSCS | midpoint"][0]["nfe"] == 3  # a step of two, and one that denoises
    [adaptive] = cells["ODE"]
    assert adaptive["budget"] == 0.5
    assert adaptive["nfe"] > 6
    for cell in (cell for row in cells.values() for cell in row):
        assert [len(values) for values in cell["measures"].values()] == [2]
        assert cell["seconds"] > 0
    for name, model in found["models"].items():
        loaded = load_model(finished / "models" / name)
        assert model["weights"] == loaded.digest
        count = sum(x.numel() for x in loaded.score.parameters())
        assert model["parameters"] == {"score": count, "autoencoder": 0}
        assert model["seconds"] > 0


def test_reports_are_made_again_from_the_results_alone(finished, tmp_path, monkeypatch):
    monkeypatch.undo()
    shutil.copy(finished / RESULTS, tmp_path)
    write_report(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert table == (finished / "table.md").read_text()
    assert "| CLD | SSCS \\| midpoint |" in table
    for name in ("fd.svg", "fd.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000
    assert "data:image/png" not in (tmp_path / "report.html").read_text()
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == len(TINY["rows"])
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_added_metrics_repeats_rows_and_models_leave_the_others_as_they_are(
    finished, folder, drawn
):
    rows = [*TINY["rows"], {"model": "VE", "solver": "reverse-diffusion", "nfe": [3]}]
    models = {**TINY["models"], "VE": {"process": {"name": "VESDE"}}}
    found = compare(folder, rows=rows, models=models)
    assert {call.args[1].solver for call in drawn.call_args_list} == {"reverse-diffusion"}
    before = numbers(finished / RESULTS)
    assert numbers(folder / RESULTS)["rows"][:3] == before["rows"]
    assert found["rows"][3]["cells"][0]["nfe"] == 3
    found = compare(folder, metrics=["fd", "bpd"], repeats=3)
    bounds = {name: model["bits"]["is_bound"] for name, model in found["models"].items()}
    assert bounds == {"CLD": True, "VP": False}
    assert "≤ " in (folder / "table.md").read_text()
    for row, old in zip(found["rows"], before["rows"], strict=True):
        for cell, one in zip(row["cells"], old["cells"], strict=True):
            assert len(cell["measures"]["fd"]) == 3
            assert cell["measures"]["fd"][:2] == one["measures"]["fd"]


class Killed(BaseException):
    """Only what catches everything catches it."""


@pytest.mark.slow
def test_a_comparison_that_is_killed_again_and_again_ends_with_the_same_numbers(
    finished, tmp_path, monkeypatch
):
    """At files of training, of cells and of results, each time with more files than before."""
    left = 0

    def counted(function):
        def wrapped(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", counted(RunFolder.write))
        patch.setattr(results, "add_results", counted(results.add_results))
        for survived in (2, 4, 5, 3):
            left = survived
            with pytest.raises(Killed):
                compare(tmp_path / "again")
    assert "Unfinished." in (tmp_path / "again" / "report.html").read_text()
    compare(tmp_path / "again")
    assert "Unfinished." not in (tmp_path / "again" / "report.html").read_text()
    assert numbers(tmp_path / "again" / RESULTS) == numbers(finished / RESULTS)


def test_a_finished_comparison_samples_nothing_again(finished, folder, drawn):
    compare(folder)
    assert numbers(folder / RESULTS) == numbers(finished / RESULTS)
    drawn.assert_not_called()


@pytest.mark.slow
def test_the_classifier_then_models_are_made_once_with_a_report_after_each(
    tmp_path, untrained_classifier, monkeypatch
):
    seen, training, out = [], comparison.train, tmp_path / "new"

    def watched(*arguments, **options):
        assert untrained_classifier  # made before any model
        table = out / "table.md"
        seen.append(table.read_text() if table.exists() else "")
        return training(*arguments, **options)

    monkeypatch.setattr(comparison, "train", watched)
    found = compare(out, features="classifier")
    assert seen[0] == ""
    assert "| CLD | EM |" in seen[1]  # a killed process writes no report at its end
    (out / "evaluations" / "VP.jsonl").unlink()
    assert compare(out, features="classifier")["reference"] == found["reference"]
    assert len(untrained_classifier) == 1


def test_repeats_before_a_failure_are_kept(folder, monkeypatch):
    draw, asked = sampling.ImageSampler.draw, []

    def failing(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 2:
            raise FloatingPointError("not finite")
        return draw(*arguments, **options)

    monkeypatch.setattr(sampling.ImageSampler, "draw", failing)
    (folder / "evaluations" / "CLD.jsonl").unlink()
    found = compare(folder, **EM)
    first, second = found["rows"][0]["cells"]
    assert (first["repeats"], first["reason"], second["repeats"]) == (1, "not finite", 2)
    count = len(asked)
    assert compare(folder, **EM)["rows"] == found["rows"]
    assert len(asked) == count  # a failure is a result
    assert "not finite" in (folder / "table.md").read_text()


@pytest.mark.slow
def test_numbers_keep_the_conditions_that_they_were_made_under(finished, folder, monkeypatch):
    threads = torch.get_num_threads()
    [before] = read_comparison(finished / RESULTS)["made"]
    assert (before["device"], before["threads"]) == ("cpu", threads)
    assert set(before["versions"]) == {"python", "cldsde", "torch"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    row = {"model": "VP", "label": "EM", "solver": "euler-maruyama", "nfe": [3]}
    made = compare(folder, rows=[*TINY["rows"], row])["made"]
    assert [one["threads"] for one in made] == [threads, threads + 1]
    page = " ".join((folder / "report.html").read_text().split())
    assert all(f"cpu, {one['threads']} thread" in page for one in made)


def test_cells_of_a_solver_with_other_defaults_are_measured_again(
    finished, folder, drawn, monkeypatch
):
    find, changed = sampling.find_solver, SSCS(score_step="midpoint", merge=False)
    monkeypatch.setattr(
        sampling, "find_solver", lambda name, *_: changed if name == "sscs-midpoint" else find(name)
    )
    found = compare(folder, **CLD)
    # One sampler for the repeats; the picture is of the same images.
    assert [call.args[1].solver for call in drawn.call_args_list] == ["sscs-midpoint"]
    assert found["rows"][0] == read_comparison(finished / RESULTS)["rows"][0]
    stored = read_results(folder / "evaluations/CLD.jsonl").values()
    assert {result.solver for result in stored} == {
        *("EulerMaruyama()", repr(changed), repr(find("sscs-midpoint")))
    }


def test_damaged_pictures_are_not_shown_and_made_again(folder):
    file = next((folder / "samples").glob("CLD-em-*.png"))
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == len(TINY["rows"]) - 1
    compare(folder, **EM)
    assert file.read_bytes() == whole  # of the images that were measured


def test_damaged_or_foreign_results_are_rejected_and_kept(folder):
    for content, message in (("{", "damaged"), ('{"format": "other"}', "not a comparison")):
        (folder / RESULTS).write_text(content)
        with pytest.raises(ValueError, match=rf"comparison.json is {message}"):
            compare(folder, **EM)
        assert (folder / RESULTS).read_text() == content


def test_folders_of_something_else_are_rejected_before_any_folder_is_made(
    finished, folder, tmp_path
):
    def assert_rejected(place, message, **changes):
        before = sorted(place.rglob("*"))
        with pytest.raises(ValueError, match=message):
            compare(place, **changes)
        assert sorted(place.rglob("*")) == before

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("mine")
    assert_rejected(tmp_path / "notes", "holds files that are no run", **EM)
    assert_rejected(finished, r"other settings \(seed\)", seed=1, **EM)
    shutil.rmtree(folder / "models" / "VP")  # which comes first
    models = {"VP": TINY["models"]["VP"], "CLD": {"process": {"name": "PSLD"}}}
    message = r"models/CLD holds a run with other settings \(process"
    assert_rejected(folder, message, models=models)
