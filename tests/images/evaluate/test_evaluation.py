"""Evaluations measure what they say, with a classifier of the very data."""

from __future__ import annotations

import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.images.data import DataSet
from cldsde.images.data.samples import all_bytes
from cldsde.images.evaluate import evaluation as table
from cldsde.images.evaluate import frechet, images_sha256, reference
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.evaluate.results import markdown_table, stored_results
from cldsde.images.model import ImageSpace
from cldsde.images.sample.sampler import Samples
from image_data import noise
from tiny_runs import noise_images

MODEL = type("Model", (), {"digest": "abc", "space": ImageSpace((1, 8, 8))})()


def data_set(seed=0, classes=2, count=40):
    return DataSet(*[noise_images(count, seed, (1, 8, 8), classes)] * 2)


@pytest.fixture(autouse=True)
def untrained(monkeypatch, untrained_classifier):
    """Samples that are noise; returns the trainings of classifiers, which train nothing."""

    def noise(_, model, recipe, seeds):
        images = noise_images(len(seeds), recipe.nfe, (1, 8, 8)).load(torch.arange(len(seeds)))
        return iter([Samples(images, torch.full((len(seeds),), recipe.nfe))])

    monkeypatch.setattr(Evaluation, "stream", noise)
    return untrained_classifier


def measured(evaluation, nfe=4):
    """Measure a recipe, as in a process of its own."""
    recipes = [SamplingConfig(solver="sscs", nfe=nfe)]
    return evaluation.of_run(MODEL, recipes, evaluation.folder / "results.json")


class PixelFeatures:
    """Features in place of Inception's."""

    name, sha256 = "flat", "0" * 64

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.flatten(1).double()


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """Make an evaluation in a folder, with a stand-in for the metrics of Inception."""
    monkeypatch.setattr(table, "check_inception_weights", lambda _: "0" * 64)
    monkeypatch.setattr(table, "inception_metrics", inception)
    monkeypatch.setattr(reference, "InceptionFeatures", lambda *_: PixelFeatures())

    def make(data=None, **options):
        given = {"samples": 20, "folder": tmp_path, "weights": tmp_path / "unread", **options}
        return Evaluation(data=data or data_set(), **given)

    return make


def test_a_classifier_serves_only_the_data_that_it_was_trained_on(evaluation, untrained):
    measured(evaluation())
    features = [
        cell["fd classifier train"]["features"]
        for row in measured(evaluation(), nfe=5)["recipes"]
        for cell in row["cells"].values()
    ]
    assert len(features) == 2
    assert len(set(features)) == len(untrained) == 1
    message = r"classifier\.safetensors was trained on other images"
    for other in (data_set(seed=1), data_set(classes=1)):
        with pytest.raises(ValueError, match=message):
            measured(evaluation(other), nfe=6)


def test_distances_in_other_features_or_to_other_images_are_not_mixed(evaluation, tmp_path):
    measured(evaluation())
    before = (tmp_path / "results.json").read_text()
    (tmp_path / "classifier.safetensors").unlink()
    again = evaluation()
    with pytest.raises(ValueError, match="in the features of different classifiers"):
        measured(again, nfe=5)
    assert (tmp_path / "results.json").read_text() == before
    found = json.loads(before)
    (cell,) = found["recipes"][0]["cells"].values()
    other = {"features": again._network.name, "reference_sha256": "0" * 64}
    cell["fd classifier train"] |= other
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="holds fd to other images"):
        measured(again, nfe=5)


def inception(images, reference, *_, metrics, **__):
    """Metrics of Inception without the network."""
    numbers = {"fid": {"fid": 1.0}, "kid": {"kid": 1.0}, "isc": {"isc": 1.0}}
    numbers["prc"] = {"precision": 1.0, "recall": 1.0}
    (metric,) = metrics
    values = {name: {"value": value} for name, value in numbers[metric].items()}
    return {"metrics": values, "reference_sha256": images_sha256(reference)}


@pytest.mark.parametrize("metric", ["fid", "kid", "prc", "isc"])
def test_inception_metrics_to_other_images_are_not_mixed(evaluation, tmp_path, metric):
    measured(evaluation(metrics=[metric]))
    measured(evaluation(metrics=[metric]), nfe=5)
    before = (tmp_path / "results.json").read_text()
    other = evaluation(data_set(seed=1), metrics=[metric])
    if metric == "isc":  # the only one that depends on samples alone
        measured(other, nfe=6)
        return
    with pytest.raises(ValueError, match=f"holds {metric} to other images"):
        measured(other, nfe=6)
    assert (tmp_path / "results.json").read_text() == before
    stale = json.loads(before)
    for row in stale["recipes"]:
        (cell,) = row["cells"].values()
        del next(value for key, value in cell.items() if key != "sampling")["reference_sha256"]
    (tmp_path / "results.json").write_text(json.dumps(stale))
    with pytest.raises(ValueError, match=r"damaged .*reference_sha256 is missing"):
        measured(other, nfe=6)


def test_a_likelihood_of_other_images_is_computed_again(evaluation, tmp_path, monkeypatch):
    computed: list = []
    config = RunConfig.from_dict({"training": {"images": 64}})
    space = ImageSpace((1, 8, 8))
    model = SimpleNamespace(digest="abc", space=space, config=config, vae=None, score=None)

    def likelihood(score, images, **_):
        computed.append(images)
        if len(images) == 3:
            msg = "not finite"
            raise FloatingPointError(msg)
        bits = {"bits_per_dim": 3.0, "is_bound": True, "quantity": "bound", "settings": {}}
        return {**bits, "images_sha256": images_sha256(images)}

    monkeypatch.setattr(table, "likelihood", likelihood)
    for count in (2, 3):  # a number, and a failure
        for seed in (0, 0, 1, 2, 2):
            one = evaluation(data_set(seed=seed), metrics=["bpd"], likelihood_images=count)
            with suppress(FloatingPointError):
                one.of_run(model, [], tmp_path / "results.json")
        held = [data_set(seed=seed).held_out.load(torch.arange(count)) for seed in range(3)]
        assert list(map(images_sha256, computed)) == list(map(images_sha256, held))
        computed.clear()


def test_simultaneous_evaluations_of_a_run_share_a_file_of_results(
    evaluation, untrained, tmp_path, monkeypatch
):
    """Each samples when the others have read the file, and before they write to it."""
    together, draw = threading.Barrier(3), Evaluation.stream

    def meeting(*arguments):
        together.wait()
        return draw(*arguments)

    monkeypatch.setattr(Evaluation, "stream", meeting)
    each = [("fd", 0, 4), ("fd", 100, 5), ("isc", 0, 4)]
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(measured, evaluation(metrics=[metric], first_seed=seed), nfe)
            for metric, seed, nfe in each
        ]
        last = max((job.result() for job in jobs), key=lambda found: len(str(found)))
    found = stored_results(tmp_path / "results.json", "abc")
    assert found == last
    cells = {
        (row["sampling"]["nfe"], seeds): {key.split()[0] for key in cell}
        for row in found["recipes"]
        for seeds, cell in row["cells"].items()
    }
    assert cells == {(4, "0-19"): {"fd", "isc", "sampling"}, (5, "100-119"): {"fd", "sampling"}}
    assert len(untrained) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_stored_failure_is_reported_with_what_to_do(evaluation, tmp_path, monkeypatch):
    failing = mock.Mock(side_effect=FloatingPointError("sscs failed: not finite"))
    monkeypatch.setattr(Evaluation, "stream", failing)
    with pytest.raises(FloatingPointError, match=r"not finite$"):
        measured(evaluation())
    with pytest.raises(FloatingPointError, match=r"found before, delete .*results\.json to have"):
        measured(evaluation())
    failing.assert_called_once()
    assert "sscs" in markdown_table(stored_results(tmp_path / "results.json", "abc"))


@pytest.mark.parametrize(
    ("metric", "images", "reference", "words"),
    [
        ("fd", 20, 1, "fd needs at least 2 images to compare with; got 1"),
        ("prc", 3, 40, "prc needs at least 4 images; got 3"),
        ("prc", 20, 3, "prc needs at least 4 images to compare with; got 3"),
        ("isc", 9, 40, "isc needs at least 10 images; got 9"),
    ],
)
def test_too_few_images_for_a_metric_are_rejected(evaluation, metric, images, reference, words):
    with pytest.raises(ValueError, match=words):
        evaluation(data_set(count=reference), metrics=[metric]).check(images)


@pytest.mark.parametrize("metric", ["fd", "fid", "isc"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 7)])
def test_images_of_another_size_are_rejected(evaluation, metric, shape):
    words = rf"compared with, 1×8×8 .*; got {'×'.join(map(str, shape))}"
    with pytest.raises(ValueError, match=words):
        evaluation(metrics=[metric]).check(20, shape=shape)


@pytest.mark.parametrize("metric", ["fid", "kid"])
def test_inception_metrics_of_two_channels_are_rejected_before_sampling(tmp_path, metric):
    data = DataSet(*[noise_images(40, 0, (2, 8, 8))] * 2)
    options = {"part": "train", "folder": tmp_path, "weights": tmp_path / "weights.pth"}
    with pytest.raises(ValueError, match="1 or 3 channels; got 2"):
        Evaluation(data=data, metrics=[metric], **options).check()


@pytest.mark.parametrize(("images", "reference", "size"), [(20, 40, 20), (20, 6, 6)])
def test_subsets_of_kid_fit_into_both_sets(evaluation, monkeypatch, images, reference, size):
    made = evaluation(data_set(count=reference), metrics=["kid"])
    metrics = mock.Mock(return_value={})
    monkeypatch.setattr(table, "inception_metrics", metrics)
    made.check(images)
    made.measure(torch.zeros(images, 1, 8, 8, dtype=torch.uint8), ["kid"])
    assert [call.kwargs["kid_subset_size"] for call in metrics.mock_calls] == [size]


def test_images_of_a_fid_are_not_kept_and_the_reference_is_measured_once(
    evaluation, tmp_path, monkeypatch
):
    made, alive, batches = [], [], noise(60, 1, (1, 8, 8)).split(5)

    def features(*_):
        made.append(PixelFeatures())
        return made[-1]

    def stream(*_):
        for images in map(torch.clone, batches):
            alive.append(weakref.ref(images))
            assert sum(image() is not None for image in alive) <= 2
            yield Samples(images, torch.full((5,), 4))

    monkeypatch.setattr(reference, "InceptionFeatures", features)
    monkeypatch.setattr(Evaluation, "stream", stream)
    expected = frechet(torch.cat(batches), all_bytes(data_set().train), PixelFeatures())
    for number in range(2):
        found = measured(evaluation(metrics=["fid"], samples=60), nfe=4 + number)
        cell = found["recipes"][number]["cells"]["0-59"]
        assert cell["sampling"]["nfe"] == 4
        measure = cell["fid 00000000 train"]
        # Sums of 60 numbers, in batches of other sizes.
        value = pytest.approx(expected["frechet_distance"], rel=1e-10)
        assert measure["metrics"]["fid"]["value"] == value
        for name in ("samples_sha256", "reference_sha256"):
            assert measure[name] == expected[name]
    assert [some.seen for some in made] == [60 + 40, 60]
    # A damaged file is made again.
    [file] = (tmp_path / "inception").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    measured(evaluation(metrics=["fid"], samples=60), nfe=6)
    assert made[-1].seen == 60 + 40
