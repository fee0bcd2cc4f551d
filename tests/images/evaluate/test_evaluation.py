"""Evaluations measure what they say, with a classifier of the very data."""

from __future__ import annotations

import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.data.samples import all_bytes
from cldsde.images.evaluate import ImageClassifier, frechet, images_sha256, reference
from cldsde.images.evaluate import evaluation as evaluation_table
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.evaluate.results import markdown_table, stored_results
from cldsde.images.model import ImageSpace
from cldsde.images.sample.sampler import Samples
from image_data import noise

MODEL = type("Model", (), {"digest": "abc", "space": ImageSpace((1, 8, 8))})()


def data_set(seed=0, classes=2, count=40):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return DataSet(*(ArrayImages(pixels, labels=labels, classes=classes) for _ in range(2)))


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Classifiers that are not trained, and samples that are noise."""

    def classifier(*images, **options):
        return ImageClassifier(1, 2).eval(), 0.5

    def noise(model, recipe, seeds):
        generator = torch.Generator().manual_seed(recipe.nfe)
        images = torch.randint(256, (len(seeds), 1, 8, 8), generator=generator, dtype=torch.uint8)
        return iter([Samples(images, torch.full((len(seeds),), recipe.nfe))])

    monkeypatch.setattr(reference, "train_classifier", classifier)
    monkeypatch.setattr(Evaluation, "stream", lambda _, *arguments: noise(*arguments))


def measured(evaluation, nfe=4):
    """Measure a recipe, as in a process of its own."""
    recipes = [SamplingConfig(solver="sscs", nfe=nfe)]
    return evaluation.of_run(MODEL, recipes, evaluation.folder / "results.json")


def test_a_classifier_is_used_for_the_data_that_it_was_trained_on_alone(tmp_path):
    first = Evaluation(data=data_set(), samples=20, folder=tmp_path)
    measured(first)
    again = Evaluation(data=data_set(), samples=20, folder=tmp_path)
    features = [
        cell["fd classifier train"]["features"]
        for row in measured(again, nfe=5)["recipes"]
        for cell in row["cells"].values()
    ]
    assert len(features) == 2
    assert len(set(features)) == 1
    for other in (data_set(seed=1), data_set(classes=1)):
        stale = Evaluation(data=other, samples=20, folder=tmp_path)
        with pytest.raises(
            ValueError, match=r"classifier\.safetensors was trained on other images"
        ):
            measured(stale, nfe=6)


def test_distances_in_other_features_or_to_other_images_are_not_put_side_by_side(tmp_path):
    measured(Evaluation(data=data_set(), samples=20, folder=tmp_path))
    before = (tmp_path / "results.json").read_text()
    (tmp_path / "classifier.safetensors").unlink()
    again = Evaluation(data=data_set(), samples=20, folder=tmp_path)
    with pytest.raises(ValueError, match="in the features of different classifiers"):
        measured(again, nfe=5)
    assert (tmp_path / "results.json").read_text() == before
    found = json.loads(before)
    (cell,) = found["recipes"][0]["cells"].values()
    cell["fd classifier train"] |= {
        "features": again._network.name,
        "reference_sha256": "0" * 64,
    }
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="holds fd to other images"):
        measured(again, nfe=5)


def inception(images, reference, *_, metrics, **__):
    """What Inception metrics give, without the network."""
    numbers = {"fid": {"fid": 1.0}, "kid": {"kid": 1.0}, "isc": {"isc": 1.0}}
    numbers["prc"] = {"precision": 1.0, "recall": 1.0}
    (metric,) = metrics
    values = {name: {"value": value} for name, value in numbers[metric].items()}
    return {"metrics": values, "reference_sha256": images_sha256(reference)}


@pytest.mark.parametrize("metric", ["fid", "kid", "prc", "isc"])
def test_inception_metrics_to_other_images_are_not_put_side_by_side(tmp_path, monkeypatch, metric):
    monkeypatch.setattr(evaluation_table, "check_inception_weights", lambda _: "0" * 64)
    monkeypatch.setattr(evaluation_table, "inception_metrics", inception)
    monkeypatch.setattr(reference, "InceptionFeatures", lambda *_: PixelFeatures())
    asked = {"metrics": [metric], "weights": tmp_path / "x", "samples": 20, "folder": tmp_path}
    measured(Evaluation(data=data_set(), **asked))
    measured(Evaluation(data=data_set(), **asked), nfe=5)
    before = (tmp_path / "results.json").read_text()
    other = Evaluation(data=data_set(seed=1), **asked)
    if metric == "isc":  # the one that looks at samples alone
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


def test_a_likelihood_of_other_images_is_computed_again(tmp_path, monkeypatch):
    def likelihood(score, images, **_):
        computed.append(images)
        bits = {"bits_per_dim": 3.0, "is_bound": True, "quantity": "bound", "settings": {}}
        return {**bits, "images_sha256": images_sha256(images)}

    def failing(score, images, **_):
        computed.append(images)
        msg = "not finite"
        raise FloatingPointError(msg)

    computed: list = []
    model = SimpleNamespace(
        digest="abc",
        space=ImageSpace((1, 8, 8)),
        config=RunConfig.from_dict({"training": {"images": 64}}),
        vae=None,
        score=None,
    )
    for function, count in ((likelihood, 2), (failing, 3)):
        monkeypatch.setattr(evaluation_table, "likelihood", function)
        for seed in (0, 0, 1, 2, 2):
            asked = {"metrics": ["bpd"], "likelihood_images": count, "folder": tmp_path}
            evaluation = Evaluation(data=data_set(seed=seed), **asked)
            with suppress(FloatingPointError):
                evaluation.of_run(model, [], tmp_path / "results.json")
        held = [data_set(seed=seed).held_out.load(torch.arange(count)) for seed in range(3)]
        assert list(map(images_sha256, computed)) == list(map(images_sha256, held))
        computed.clear()


def test_several_evaluations_of_a_run_at_a_time_share_a_file_of_results(tmp_path, monkeypatch):
    """Each is at its images when the others have read the file, and before they write to it."""
    trained = []
    together, draw = threading.Barrier(3), Evaluation.stream
    train = reference.train_classifier
    monkeypatch.setattr(
        reference, "train_classifier", lambda *a, **b: trained.append(1) or train(*a, **b)
    )

    def meeting(*arguments):
        together.wait()
        return draw(*arguments)

    monkeypatch.setattr(Evaluation, "stream", meeting)
    monkeypatch.setattr(evaluation_table, "check_inception_weights", lambda _: "0" * 64)
    monkeypatch.setattr(evaluation_table, "inception_metrics", inception)
    each = [("fd", 0, 4), ("fd", 100, 5), ("isc", 0, 4)]
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(
                measured,
                Evaluation(
                    data=data_set(),
                    metrics=[metric],
                    weights=tmp_path / "unread",
                    samples=20,
                    first_seed=seed,
                    folder=tmp_path,
                ),
                nfe,
            )
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
    assert cells == {
        (4, "0-19"): {"fd", "isc", "sampling"},
        (5, "100-119"): {"fd", "sampling"},
    }
    assert len(trained) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_failure_that_was_kept_is_told_with_what_to_do(tmp_path, monkeypatch):
    def failing(*_):
        msg = "sscs failed: not finite"
        raise FloatingPointError(msg)

    monkeypatch.setattr(Evaluation, "stream", failing)
    evaluation = Evaluation(data=data_set(), samples=20, folder=tmp_path)
    with pytest.raises(FloatingPointError, match=r"not finite$"):
        measured(evaluation)
    monkeypatch.setattr(Evaluation, "stream", lambda *_: pytest.fail("drawn"))
    with pytest.raises(FloatingPointError, match=r"found before, delete .*results\.json to have"):
        measured(evaluation)
    found = stored_results(tmp_path / "results.json", "abc")
    assert "sscs" in markdown_table(found)


@pytest.mark.parametrize(
    ("metric", "images", "reference", "words"),
    [
        ("fd", 20, 1, "fd needs at least 2 images to compare with; got 1"),
        ("prc", 3, 40, "prc needs at least 4 images; got 3"),
        ("prc", 20, 3, "prc needs at least 4 images to compare with; got 3"),
        ("isc", 9, 40, "isc needs at least 10 images; got 9"),
    ],
)
def test_too_few_images_for_a_metric_are_refused(tmp_path, metric, images, reference, words):
    evaluation = Evaluation(
        data=data_set(count=reference),
        metrics=[metric],
        weights=tmp_path / "unread",
        folder=tmp_path,
    )
    with pytest.raises(ValueError, match=words):
        evaluation.check(images)


@pytest.mark.parametrize("metric", ["fd", "fid", "isc"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 7)])
def test_images_of_another_size_are_refused(tmp_path, metric, shape):
    evaluation = Evaluation(
        data=data_set(), metrics=[metric], weights=tmp_path / "unread", folder=tmp_path
    )
    words = rf"compared with, 1×8×8 .*; got {'×'.join(map(str, shape))}"
    with pytest.raises(ValueError, match=words):
        evaluation.check(20, shape=shape)


class PixelFeatures:
    """Features in place of Inception's."""

    name, sha256 = "flat", "0" * 64

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.flatten(1).double()


def test_images_of_a_fid_are_not_kept_and_the_reference_is_measured_once(tmp_path, monkeypatch):
    data, made, alive, batches = data_set(), [], [], noise(60, 1, (1, 8, 8)).split(5)

    def features(*_):
        made.append(PixelFeatures())
        return made[-1]

    def stream(*_):
        for images in map(torch.clone, batches):
            alive.append(weakref.ref(images))
            assert sum(image() is not None for image in alive) <= 2
            yield Samples(images, torch.full((5,), 4))

    monkeypatch.setattr(reference, "InceptionFeatures", features)
    monkeypatch.setattr(evaluation_table, "check_inception_weights", lambda _: "0" * 64)
    monkeypatch.setattr(Evaluation, "stream", stream)
    asked = {"data": data, "metrics": ["fid"], "weights": tmp_path / "x", "folder": tmp_path}
    expected = frechet(torch.cat(batches), all_bytes(data.train), PixelFeatures())
    for number in range(2):
        found = measured(Evaluation(samples=60, **asked), nfe=4 + number)
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
    measured(Evaluation(samples=60, **asked), nfe=6)
    assert made[-1].seen == 60 + 40


@pytest.mark.parametrize(("images", "reference", "size"), [(20, 40, 20), (20, 6, 6)])
def test_subsets_of_kid_fit_into_both_sets(tmp_path, monkeypatch, images, reference, size):
    asked = []
    monkeypatch.setattr(evaluation_table, "check_inception_weights", lambda _: "0" * 64)
    monkeypatch.setattr(
        evaluation_table, "inception_metrics", lambda *_, **options: asked.append(options) or {}
    )
    evaluation = Evaluation(
        data=data_set(count=reference),
        metrics=["kid"],
        weights=tmp_path / "unread",
        folder=tmp_path,
    )
    evaluation.check(images)
    evaluation.measure(torch.zeros(images, 1, 8, 8, dtype=torch.uint8), ["kid"])
    assert [options["kid_subset_size"] for options in asked] == [size]
