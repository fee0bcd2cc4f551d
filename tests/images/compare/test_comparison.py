"""Comparisons: one table whatever happens on the way, and reports from its file alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cldsde.images.compare import comparison
from cldsde.images.compare.comparison import Comparison
from cldsde.images.compare.config import ComparisonConfig
from cldsde.images.compare.report import RESULTS, read_results, write_report
from cldsde.images.config import RunConfig
from cldsde.images.data import digits
from cldsde.images.evaluate import ImageClassifier, reference, save_classifier
from cldsde.images.evaluate import evaluation as evaluation_table
from cldsde.images.evaluate import results as evaluation_results
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.evaluate.results import stored_results
from cldsde.images.model import MODEL, load_model
from cldsde.images.runs import RunFolder
from cldsde.images.sample import sampler as sampling
from cldsde.images.train.loop import STATE, train
from cldsde.score.flow_density import UnsolvedFlowError
from cldsde.solvers import SSCS
from comparisons import TINY, feature_module, numbers, tiny


@pytest.fixture(autouse=True)
def features(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(feature_module(tmp_path / "modules"))


def compare(folder: Path, **changes) -> dict:
    return Comparison(ComparisonConfig.from_dict(tiny(**changes)), folder).run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(feature_module(folder.parent))
        compare(folder)
    return folder


def test_every_cell_is_filled_with_its_mean_cost(finished):
    found = read_results(finished / RESULTS)
    assert found["complete"]
    cells = {row["label"]: row["cells"] for row in found["rows"]}
    assert [cell["nfe"] for cell in cells["EM"]] == [3, 5]
    assert cells["SSCS | midpoint"][0]["nfe"] == 3  # a step of two, and one that denoises
    adaptive = cells["ODE"][0]
    assert adaptive["budget"] == 0.5
    assert adaptive["nfe"] > 6
    for cell in (cell for row in cells.values() for cell in row):
        assert [len(values) for values in cell["measures"].values()] == [2]
        assert cell["seconds"] > 0
    assert set(found["models"]) == {"CLD", "VP"}
    for name, model in found["models"].items():
        loaded = load_model(finished / "models" / name)
        assert model["weights"] == loaded.digest
        count = sum(x.numel() for x in loaded.score.parameters())
        assert model["parameters"] == {"score": count, "autoencoder": 0}
        assert model["seconds"] > 0
        assert model["bits"] is None
    assert found["reference"]["features"] == "flat_features:flat"


def test_reports_are_made_again_from_the_results_alone(finished, tmp_path):
    shutil.copy(finished / RESULTS, tmp_path)
    write_report(tmp_path)
    assert (tmp_path / "table.md").read_text() == (finished / "table.md").read_text()
    for name in ("fd.svg", "fd.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000
    assert "data:image/png" not in (tmp_path / "report.html").read_text()
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == len(TINY["rows"])
    assert "http" not in page.replace("http-equiv", "")


def test_the_table_has_a_line_for_each_row_and_model(finished):
    text = (finished / "table.md").read_text()
    assert "| CLD | SSCS \\| midpoint |" in text
    assert "(3)" in text  # evaluations, where the budget was not used up
    assert "| VP | ODE |" in text


def test_metrics_and_repeats_that_are_added_leave_the_others_as_they_are(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    found = compare(folder, metrics=["fd", "bpd"], repeats=3)
    assert {name: model["bits"]["is_bound"] for name, model in found["models"].items()} == {
        "CLD": True,
        "VP": False,
    }
    assert "≤ " in (folder / "table.md").read_text()
    before = read_results(finished / RESULTS)
    for row, old in zip(found["rows"], before["rows"], strict=True):
        for cell, one in zip(row["cells"], old["cells"], strict=True):
            assert len(cell["measures"]["fd"]) == 3
            assert cell["measures"]["fd"][:2] == one["measures"]["fd"]


class Killed(BaseException):
    """Nothing catches it but what catches everything."""


@pytest.mark.parametrize("survived", [2, 6, 10, 14])
def test_a_comparison_that_is_cut_off_at_any_file_ends_with_the_same_numbers(
    finished, tmp_path, monkeypatch, survived
):
    """Files of training, of cells and of results, one after the other."""
    left = survived
    write = RunFolder.write
    store = evaluation_results.write_whole

    def counted(function):
        def wrapped(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*arguments)

        return wrapped

    folder = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", counted(write))
        patch.setattr(evaluation_results, "write_whole", counted(store))
        patch.setattr("cldsde.images.compare.comparison.write_report", lambda *_, **__: None)
        with pytest.raises(Killed):
            compare(folder)
    compare(folder)
    assert numbers(folder / RESULTS) == numbers(finished / RESULTS)


def test_a_finished_comparison_draws_nothing_again(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(evaluation_table, "ImageSampler", lambda *_, **__: pytest.fail("drawn"))
    monkeypatch.setattr(evaluation_table, "likelihood", lambda *_, **__: pytest.fail("computed"))
    compare(folder)
    assert numbers(folder / RESULTS) == numbers(finished / RESULTS)


def test_rows_and_models_that_are_added_leave_the_others_as_they_are(
    finished, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    drawn = []
    draw = evaluation_table.ImageSampler
    monkeypatch.setattr(
        evaluation_table, "ImageSampler", lambda *a, **k: drawn.append(a[2]) or draw(*a, **k)
    )
    rows = [*TINY["rows"], {"model": "VE", "solver": "reverse-diffusion", "nfe": [3]}]
    models = {**TINY["models"], "VE": {"process": {"name": "VESDE"}}}
    found = compare(folder, rows=rows, models=models)
    assert {recipe.solver for recipe in drawn} == {"reverse-diffusion"}
    before = numbers(finished / RESULTS)
    assert [numbers(folder / RESULTS)["rows"][i] for i in range(3)] == before["rows"]
    assert found["rows"][3]["cells"][0]["nfe"] == 3


def test_a_model_that_was_trained_before_is_taken_up(tmp_path, monkeypatch):
    config = ComparisonConfig.from_dict(tiny())
    run = config.runs["VP"]
    folder = tmp_path / "run" / "models" / "VP"
    train(run, digits(), RunFolder(folder, run.to_dict()), device="cpu")
    before = (folder / MODEL).read_bytes()
    Comparison(config, tmp_path / "run").run()
    assert (folder / MODEL).read_bytes() == before


def test_one_classifier_serves_all_models_and_is_kept(tmp_path, monkeypatch):
    trained = []

    def untrained(*images, **options):
        trained.append(options)
        return ImageClassifier(1, 10).eval(), 0.1

    monkeypatch.setattr(reference, "train_classifier", untrained)
    found = compare(tmp_path / "run", features="classifier")
    assert len(trained) == 1
    assert found["reference"]["features"].startswith("cldsde.images.evaluation:ImageClassifier")
    (tmp_path / "run" / "evaluations" / "VP.json").unlink()
    again = compare(tmp_path / "run", features="classifier")
    assert len(trained) == 1
    assert again["reference"] == found["reference"]
    (tmp_path / "run" / "classifier.safetensors").unlink()
    (tmp_path / "run" / "evaluations" / "VP.json").unlink()
    with pytest.raises(ValueError, match="features of different classifiers"):
        compare(tmp_path / "run", features="classifier")


def test_the_classifier_is_there_before_any_model_is_trained(tmp_path, monkeypatch):
    order = []

    def untrained(*_, progress, **__):
        order.append(f"classifier, progress {progress}")
        return ImageClassifier(1, 10).eval(), 0.1

    training = comparison.train
    monkeypatch.setattr(reference, "train_classifier", untrained)
    monkeypatch.setattr(
        comparison, "train", lambda *a, **k: order.append("model") or training(*a, **k)
    )
    config = ComparisonConfig.from_dict(tiny(features="classifier"))
    Comparison(config, tmp_path / "run", progress=True).run()
    assert order == ["classifier, progress True", "model", "model"]
    (tmp_path / "run" / "classifier.safetensors").unlink()
    Comparison(config, tmp_path / "run").run()  # nothing is left to be measured
    assert len(order) == 5


def test_the_report_follows_every_row(tmp_path, monkeypatch):
    """A process that is killed writes none at its end."""
    folder, seen = tmp_path / "run", []
    training = comparison.train

    def watched(*arguments, **options):
        table = folder / "table.md"
        seen.append(table.read_text() if table.exists() else "")
        return training(*arguments, **options)

    monkeypatch.setattr(comparison, "train", watched)
    compare(folder)
    assert seen[0] == ""
    assert "| CLD | EM |" in seen[1]
    reports = []
    monkeypatch.setattr(comparison, "write_report", lambda *_: reports.append(1))
    compare(folder)
    assert len(reports) == 2  # and not after each row that was there


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(tmp_path):
    network = {"conditional": True, "label_dropout": 0.0}
    rows = [
        {
            "model": "CLD",
            "label": "short of breath",
            "solver": "probability-flow",
            "options": {"max_nfev": 20},
            "tolerances": [1e-6, 1e3],
        },
        TINY["rows"][0],
    ]
    found = compare(
        tmp_path / "run", metrics=["fd", "bpd"], models={"CLD": {"network": network}}, rows=rows
    )
    assert found["complete"]
    failed, fine = found["rows"][0]["cells"]
    assert "max_nfev: 20 evaluations did not reach the end" in failed["reason"]
    assert "measures" in fine
    assert "classes" in found["models"]["CLD"]["bits"]["reason"]
    text = (tmp_path / "run" / "table.md").read_text()
    assert failed["reason"] in text
    assert "CLD has no bits per dim" in text


def test_repeats_before_a_failure_are_kept(tmp_path, monkeypatch):
    draw = evaluation_table.ImageSampler
    asked = []

    def failing(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 2:
            msg = "not finite"
            raise FloatingPointError(msg)
        return draw(*arguments, **options)

    monkeypatch.setattr(evaluation_table, "ImageSampler", failing)
    found = compare(tmp_path / "run", models={"CLD": {}}, rows=TINY["rows"][:1])
    first, second = found["rows"][0]["cells"]
    assert (first["repeats"], first["reason"], second["repeats"]) == (1, "not finite", 2)
    count = len(asked)
    again = compare(tmp_path / "run", models={"CLD": {}}, rows=TINY["rows"][:1])
    assert again["rows"] == found["rows"]
    assert len(asked) == count  # a failure is a result
    assert "not finite" in (tmp_path / "run" / "table.md").read_text()


def test_numbers_keep_what_they_were_made_with(finished, tmp_path):
    """Whoever opens a finished comparison made none of its numbers."""
    folder, threads = tmp_path / "run", torch.get_num_threads()
    shutil.copytree(finished, folder)
    before = read_results(finished / RESULTS)["made"]
    assert [(one["device"], one["threads"]) for one in before] == [("cpu", threads)]
    assert set(before[0]["versions"]) == {"python", "cldsde", "torch"}
    try:
        torch.set_num_threads(threads + 1)
        assert compare(folder)["made"] == before
        row = {"model": "VP", "label": "EM", "solver": "euler-maruyama", "nfe": [3]}
        made = compare(folder, rows=[*TINY["rows"], row])["made"]
    finally:
        torch.set_num_threads(threads)
    assert [one["threads"] for one in made] == [threads, threads + 1]
    page = " ".join((folder / "report.html").read_text().split())
    assert all(f"cpu, {one['threads']} thread" in page for one in made)


def test_cells_of_a_solver_whose_defaults_have_changed_are_measured_again(
    finished, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    find, draw, drawn = sampling.find_solver, evaluation_table.ImageSampler, []
    changed = {"sscs-midpoint": SSCS(score_step="midpoint", merge=False)}
    monkeypatch.setattr(sampling, "find_solver", lambda name: changed.get(name) or find(name))
    monkeypatch.setattr(
        evaluation_table, "ImageSampler", lambda *a, **k: drawn.append(a[2]) or draw(*a, **k)
    )
    found = compare(folder)
    assert {recipe.solver for recipe in drawn} == {"sscs-midpoint"}
    assert len(drawn) == 3  # two repeats and the picture
    before = read_results(finished / RESULTS)
    assert found["rows"][:2] == before["rows"][:2]
    stored = json.loads((folder / "evaluations/CLD.json").read_text())["recipes"]
    solvers = {cell["sampling"]["solver"] for row in stored for cell in row["cells"].values()}
    assert solvers == {"EulerMaruyama()", repr(changed["sscs-midpoint"])}


def test_a_likelihood_that_fails_is_a_result_and_a_fault_is_none(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(evaluation_table, "likelihood", failing)
    error: Exception = ValueError("a fault")
    with pytest.raises(ValueError, match="a fault"):
        compare(folder, metrics=["fd", "bpd"])
    error = UnsolvedFlowError("did not reach T")
    found = compare(folder, metrics=["fd", "bpd"])
    assert found["complete"]
    assert found["models"]["VP"]["bits"] == {"reason": "did not reach T"}
    error = AssertionError("tried again")
    assert compare(folder, metrics=["fd", "bpd"])["models"] == found["models"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}'])
def test_results_that_are_damaged_or_of_something_else_are_refused(finished, tmp_path, content):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / RESULTS).write_text(content)
    with pytest.raises(ValueError, match=r"comparison.json is (damaged|not a comparison)"):
        compare(folder)
    assert (folder / RESULTS).read_text() == content


def halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edited(change):
    def edit(file: Path) -> None:
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return edit


def cell_of(found) -> dict:
    return next(iter(found["recipes"][0]["cells"].values()))


@pytest.mark.parametrize(
    "damage",
    [
        halve,
        lambda file: file.write_text("[]"),
        edited(lambda x: x.update(recipes=[5])),
        edited(lambda x: x.update(recipes={})),
        edited(lambda x: x.update(likelihood={"asked": 2})),
        edited(lambda x: x.pop("model")),
        edited(lambda x: x["recipes"][0].pop("cells")),
        edited(lambda x: x["recipes"][0]["cells"].update({"0-5": 3})),
        edited(lambda x: cell_of(x).pop("sampling")),
        edited(lambda x: cell_of(x)["sampling"].pop("nfe")),
        edited(lambda x: cell_of(x)["sampling"].update(made=[3])),
        edited(lambda x: cell_of(x).update({"fd flat_features:flat train": {}})),
        edited(lambda x: cell_of(x).update({"kid 0 train": {}})),
        edited(lambda x: cell_of(x).update(failed=3)),
    ],
)
def test_damaged_files_of_results_are_named_with_what_to_do(finished, tmp_path, damage):
    file = tmp_path / "CLD.json"
    shutil.copy(finished / "evaluations/CLD.json", file)
    digest = json.loads(file.read_text())["model"]
    stored_results(file, digest)
    damage(file)
    with pytest.raises(ValueError, match=r"CLD\.json is damaged \(.*\); delete it to have it made"):
        stored_results(file, digest)


@pytest.mark.parametrize("damage", [halve, flip])
def test_damaged_weights_are_named_with_what_to_do(finished, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage(folder / "models/CLD" / MODEL)
    with pytest.raises(
        ValueError, match=r"CLD/model\.safetensors is damaged .*, or delete it to repeat"
    ):
        compare(folder)
    file = folder / "classifier.safetensors"
    save_classifier(ImageClassifier(1, 10), file)
    damage(file)
    evaluation = Evaluation(data=digits(), samples=6, folder=folder)
    with pytest.raises(ValueError, match=r"classifier\.safetensors is damaged.*; delete it to"):
        evaluation.prepare()


@pytest.mark.parametrize("damage", [halve, flip, lambda file: file.write_bytes(b"")])
def test_damaged_pictures_are_not_shown_and_made_again(finished, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = next((folder / "samples").glob("CLD-em-*.png"))
    whole = file.read_bytes()
    damage(file)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == len(TINY["rows"]) - 1
    compare(folder)
    assert file.read_bytes() == whole


def test_folders_of_something_else_are_refused(finished, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no run"):
        compare(tmp_path / "notes")
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        compare(finished, seed=1)
    base = {**TINY["base"], "training": {**TINY["base"]["training"], "batch": 8}}
    with pytest.raises(ValueError, match=r"models/CLD holds a run with other settings \(training"):
        compare(finished, base=base)


def test_a_refused_comparison_makes_no_folder_of_any_model(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "models" / "VP")  # which comes first
    models = dict(TINY["models"])
    models["CLD"] = {**models["CLD"], "process": {"name": "PSLD"}}
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=r"models/CLD holds a run with other settings \(process"):
        compare(tmp_path / "run", models={"VP": models["VP"], "CLD": models["CLD"]})
    assert sorted((tmp_path / "run").rglob("*")) == before
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "samples").touch()
    with pytest.raises(ValueError, match="samples is not a folder"):
        compare(tmp_path / "file")
    assert [path.name for path in (tmp_path / "file").iterdir()] == ["samples"]


def test_a_model_that_is_being_trained_is_left_alone(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = ComparisonConfig.from_dict(tiny()).runs["VP"]
    elsewhere = RunFolder(folder / "models/VP", config.to_dict())
    half = elsewhere / ".partial-model.safetensors"
    half.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"models/VP is in use by another process"):
        compare(folder)
    assert half.exists()


def test_weights_that_are_not_those_that_were_measured_are_refused(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    run = RunConfig.from_dict(json.loads((folder / "models/CLD/config.json").read_text()))
    for name in (MODEL, STATE):
        (folder / "models/CLD" / name).unlink()
    train(run, digits(seed=1), RunFolder(folder / "models/CLD", run.to_dict()), device="cpu")
    with pytest.raises(ValueError, match=r"evaluations/CLD.json holds results of other weights"):
        compare(folder)
