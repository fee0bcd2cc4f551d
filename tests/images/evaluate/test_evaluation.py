"""Evaluations measure what they say, and their results resume, add up and are not mixed."""

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from cldsde import CLD, MixedScore
from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.images.data import DataSet, digits
from cldsde.images.evaluate import evaluation as module
from cldsde.images.evaluate import frechet, inception
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.evaluate.results import Result, add_results, markdown_table, read_results
from cldsde.images.model import ImageModel, ImageSpace, load_model
from cldsde.images.sample.sampler import Samples
from comparisons import feature_module
from image_data import noise
from tiny_runs import noise_images
from tolerances import rounding

CONFIG = RunConfig.from_dict({"training": {"images": 64}})
MODEL = ImageModel(
    score=MixedScore(torch.nn.Identity(), CLD(), 0.0, 1.0),
    space=ImageSpace((1, 8, 8)),
    digest="abc",
    sampling=CONFIG.sampling,
    t_min=1e-3,
)


def data_set(seed=0, classes=2, count=40):
    return DataSet(*[noise_images(count, seed, (1, 8, 8), classes)] * 2)


class Inception:
    """Features and logits in place of the network's."""

    name, sha256, file, published = "flat", "0" * 64, "unread", False

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return (images.flatten(1).double() / 255).repeat(1, 2)


@pytest.fixture
def networks(monkeypatch):
    """Stand-ins of Inception with few features, one for each evaluation that needs it."""
    made = []
    monkeypatch.setattr(inception, "_FEATURES", 64)
    monkeypatch.setattr(
        module.inception, "InceptionFeatures", lambda *_: made.append(Inception()) or made[-1]
    )
    return made


class NoiseSampler(SimpleNamespace):
    """Noise in place of samples of a model."""

    @classmethod
    def of(cls, model, recipe, **_):
        return cls(recipe=recipe)

    def batches(self, seeds):
        return [(None, seeds)]

    def start(self, seeds):
        return None

    def draw(self, seeds, *_):
        nfe, n = self.recipe.nfe, len(seeds)
        images = noise_images(n, nfe, (1, 8, 8)).load(torch.arange(n))
        return Samples(images, torch.full((n,), nfe))


@pytest.fixture
def evaluation(tmp_path, monkeypatch, untrained_classifier, networks):
    """Make an evaluation in a folder, of samples that are noise."""
    monkeypatch.setattr(module, "ImageSampler", NoiseSampler)

    def make(data=None, **options):
        given = {"samples": 20, "folder": tmp_path, "weights": tmp_path / "unread", **options}
        return Evaluation(data=data or data_set(), **given)

    return make


def measured(evaluation, nfe=4):
    """Measure a recipe, as in a process of its own."""
    recipes = [SamplingConfig(solver="sscs", nfe=nfe)]
    return evaluation.of_run(MODEL, recipes, evaluation.folder / "results.jsonl")


def test_a_classifier_serves_only_the_data_that_it_was_trained_on(
    evaluation, untrained_classifier, tmp_path
):
    """Distances in the features of two classifiers are not mixed."""
    results = [*measured(evaluation()), *measured(evaluation(), nfe=5)]
    assert len({result.features for result in results}) == len(untrained_classifier) == 1
    message = r"classifier\.safetensors was trained on other images"
    for other in (data_set(seed=1), data_set(classes=1)):
        with pytest.raises(ValueError, match=message):
            measured(evaluation(other), nfe=6)
    before = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "classifier.safetensors").unlink()
    with pytest.raises(ValueError, match="in the features of different classifiers"):
        measured(evaluation(), nfe=6)
    assert (tmp_path / "results.jsonl").read_text() == before


@pytest.mark.parametrize("metric", ["fd", "fid", "kid", "prc", "isc"])
def test_metrics_to_other_images_are_not_mixed(evaluation, tmp_path, monkeypatch, metric):
    # Features that fit any data, so that only the images differ.
    monkeypatch.setattr(module.distances, "load_features", lambda _: PIXELS)
    options = {"metrics": [metric], "features": "some:pixels"}
    measured(evaluation(**options))
    before = (tmp_path / "results.jsonl").read_text()
    other = evaluation(data_set(seed=1), **options)
    if metric == "isc":  # the only one that depends on samples alone
        measured(other, nfe=6)
        return
    monkeypatch.setattr(NoiseSampler, "of", mock.Mock(side_effect=AssertionError("sampled")))
    with pytest.raises(ValueError, match=f"holds {metric} to other images"):
        measured(other, nfe=6)
    assert (tmp_path / "results.jsonl").read_text() == before


def PIXELS(images):  # noqa: N802
    return images.flatten(1).double()


def test_features_of_another_name_are_measured_beside_the_old_ones(
    evaluation, tmp_path, monkeypatch
):
    for name, scale in (("first", 1.0), ("second", 16.0)):
        features = mock.Mock(side_effect=lambda x, scale=scale: scale * PIXELS(x))
        features.name = name
        monkeypatch.setattr(module.distances, "load_features", lambda _, x=features: x)
        measured(evaluation(metrics=["fd"], features="some:pixels"))
    first, second = read_results(tmp_path / "results.jsonl").values()
    assert [first.against, second.against] == ["first train", "second train"]
    assert second.numbers["fd"] == 256 * first.numbers["fd"]  # a power of two is exact


def test_likelihoods_are_computed_once_for_the_same_images(evaluation, tmp_path, monkeypatch):
    compute = mock.Mock(return_value={"bits_per_dim": 3.0, "images": 2})
    monkeypatch.setattr(module.likelihoods, "likelihood", compute)
    for seed in (0, 0, 1, 2, 2):
        one = evaluation(data_set(seed=seed), metrics=["bpd"], likelihood_images=2)
        [result] = one.of_run(MODEL, [], tmp_path / "results.jsonl")
        assert result.numbers == {"bpd": 3.0}
    for seed, call in zip(range(3), compute.call_args_list, strict=True):
        assert torch.equal(call.args[1], data_set(seed=seed).held_out.load(torch.arange(2)))


def test_simultaneous_evaluations_of_a_run_share_a_file_of_results(
    evaluation, untrained_classifier, tmp_path, monkeypatch
):
    """Each samples when the others have read the file, and before they write to it."""
    together, draw = threading.Barrier(3, timeout=60), NoiseSampler.draw

    def meeting(*arguments):
        together.wait()
        return draw(*arguments)

    monkeypatch.setattr(NoiseSampler, "draw", meeting)
    each = [("fd", 0, 4), ("fd", 100, 5), ("isc", 0, 4)]
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(measured, evaluation(metrics=[metric], first_seed=seed), nfe)
            for metric, seed, nfe in each
        ]
        made = [result for job in jobs for result in job.result()]
    found = read_results(tmp_path / "results.jsonl", "abc")
    assert found == {result.key: result for result in made}
    assert len(untrained_classifier) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_failure_is_a_result_that_is_not_repeated_and_does_not_end_the_others(
    evaluation, tmp_path, monkeypatch
):
    draw, calls = NoiseSampler.draw, []

    def failing(self, *arguments):
        calls.append(self.recipe.nfe)
        if self.recipe.nfe == 4:
            raise FloatingPointError("sscs failed: not finite")
        return draw(self, *arguments)

    monkeypatch.setattr(NoiseSampler, "draw", failing)
    recipes = [SamplingConfig(solver="sscs", nfe=4, t_end=0.01)]
    recipes += [SamplingConfig(solver="sscs", nfe=5, t_end=0.01, options={"merge": False})]
    for _ in range(2):
        failed, fine = evaluation().of_run(MODEL, recipes, tmp_path / "results.jsonl")
        assert failed.failed == "sscs failed: not finite"
        assert fine.numbers["fd"] > 0
    assert calls == [4, 5]
    first, second = markdown_table([failed, fine]).splitlines()[2:4]
    assert first.startswith("| sscs | 4 | root, 0.01 |  |")
    assert second.startswith("| sscs, merge=False | 5 | root, 0.01 | 20 |")


def test_a_run_has_one_bar_with_a_total(tmp_path, capsys, monkeypatch, digits_run):
    monkeypatch.syspath_prepend(feature_module(tmp_path))
    options = {"metrics": ["fd"], "features": "flat_features:flat", "samples": 4, "repeats": 2}
    evaluation = Evaluation(data=digits(), folder=tmp_path, progress=True, **options)
    recipes = [SamplingConfig(solver="euler-maruyama", nfe=n) for n in (3, 4)]
    for _ in range(2):  # measured, and found again
        evaluation = dataclasses.replace(evaluation)
        evaluation.of_run(load_model(digits_run), recipes, tmp_path / "x.jsonl")
        shown = capsys.readouterr().err
        assert "evaluation: 100%" in shown
        assert "16/16" in shown
        assert "sampling" not in shown


def test_a_full_disk_is_reported_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"results\.jsonl cannot be written \(No space left"):
        add_results(tmp_path / "results.jsonl", [LINE])


LINE = Result(
    model="abc",
    recipe={"solver": "em"},
    sampler={"solver": "EulerMaruyama()", "times": [1.0, 0.1]},
    metric="fd",
    against="x",
    numbers={"fd": 1.0},
)


def test_a_line_that_was_cut_off_is_measured_and_written_again(tmp_path):
    file = tmp_path / "results.jsonl"
    second = dataclasses.replace(LINE, seeds=(0, 9))
    add_results(file, [LINE, second])
    whole = file.read_bytes()
    for cut in (1, 30, len(whole) // 2 - 5):
        file.write_bytes(whole[:-cut])
        assert list(read_results(file, "abc").values()) == [LINE]
        add_results(file, [second])
        assert file.read_bytes() == whole
    # A later line about the same measurement counts.
    better = dataclasses.replace(LINE, numbers={"fd": 2.0})
    add_results(file, [better])
    assert list(read_results(file, "abc").values()) == [better, second]
    # A recipe whose solver or levels have changed has new results. Sets of other sizes are not
    # averaged. Nor are those that share seeds.
    for seeds, value in (((10, 19), 8.0), ((9, 18), 9.0), ((0, 9), 7.0), ((0, 99), 3.0)):
        how = {"seeds": seeds, "sampler": {**LINE.sampler, "denoise": True}}
        new = dataclasses.replace(LINE, **how, numbers={"fd": value})
        add_results(file, [new])
    *lines, _, remark = markdown_table(read_results(file).values()).splitlines()
    assert [line.split("|")[5] for line in lines[2:]] == [" 7.500 ± 0.707 ", " 3.000 "]
    assert remark == "The table leaves out repetitions that share seeds with another."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model": "abc"}\n', r"is damaged \(line 1: .*metric.*\); delete it"),
        (b"key = 1\n", "something else than results of cldsde; write to another file"),
        (
            b'{"model": "def", "sampler": {}, "metric": "fd", "against": ""}\n',
            "of other weights or images",
        ),
        (  # as version 0.2 wrote them
            b'{"model": "abc", "recipe": {"solver": "em"}, "times": {}, "numbers": {"fd": 1.0}}\n',
            "results of an older cldsde, which do not say their noise levels; delete it, or write",
        ),
    ],
)
def test_files_of_something_else_are_named_with_what_to_do_and_kept(tmp_path, content, words):
    file = tmp_path / "results.jsonl"
    file.write_bytes(content)
    for use in (lambda: read_results(file, "abc"), lambda: add_results(file, [LINE])):
        with pytest.raises(ValueError, match=rf"results\.jsonl .*({words})"):
            use()
    assert file.read_bytes() == content


def test_too_few_images_for_a_metric_are_rejected(evaluation):
    with pytest.raises(ValueError, match="prc needs at least 4 images to compare with; got 3"):
        evaluation(data_set(count=3), metrics=["prc"]).check(20)
    with pytest.raises(ValueError, match="isc needs at least 10 images; got 9"):
        evaluation(metrics=["isc"]).check(9)


def test_images_of_two_channels_have_no_features_of_inception(evaluation):
    data = DataSet(*[noise_images(40, 0, (2, 8, 8))] * 2)
    with pytest.raises(ValueError, match="1 or 3 channels; got 2"):
        evaluation(data, metrics=["kid"]).check()


@pytest.mark.parametrize(("images", "count", "size"), [(20, 40, 20), (20, 6, 6)])
def test_subsets_of_kid_fit_into_both_sets(evaluation, images, count, size):
    made = evaluation(data_set(count=count), metrics=["kid"])
    made.check(images)
    found = made.measure(noise(images, 0, (1, 8, 8)), ["kid"])["kid"]
    assert found["settings"]["kid_subset_size"] == size


def test_images_to_compare_with_are_measured_once(evaluation, tmp_path, networks):
    def assert_measured(nfe, seen, metrics=("fid",)):
        found = measured(evaluation(metrics=metrics, samples=60), nfe)[0]
        images = noise_images(60, nfe, (1, 8, 8)).load(torch.arange(60))
        known = data_set().train.load(torch.arange(40))
        expected = frechet(images, known, lambda x: Inception()(x)[:, :64])["frechet_distance"]
        # Sums in batches of other sizes, and a small difference of large numbers.
        assert found.numbers == {"fid": pytest.approx(expected, rel=rounding(scale=1e4), abs=0)}
        assert networks[-1].seen == seen

    assert_measured(4, 60 + 40)
    assert_measured(5, 60)
    [file] = (tmp_path / "inception").iterdir()
    file.write_bytes(file.read_bytes()[:100])  # damaged: made again
    assert_measured(6, 60 + 40)
    # Precision needs the features of each image.
    assert_measured(7, 60 + 40, ("fid", "prc"))
    assert_measured(8, 60, ("fid", "prc", "isc"))
