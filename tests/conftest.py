"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

import simulated_device  # noqa: F401 -- which registers the device before the first gradient

# "ci" takes the same examples on every machine and in every run. "deep" looks further, at random:
# `tox -e slow` sets HYPOTHESIS_PROFILE=deep, and runs all properties besides the slow tests.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=12)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=300)
settings.load_profile(PROFILE)

# A collection of doctests would import it, but a device can be registered only once.
collect_ignore = ["simulated_device.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count most cases of large tables, and properties with many examples, among the slow tests.

    The type check, which takes longest, is the first test, so that no worker waits for it.
    """
    items.sort(key=lambda item: item.path.name != "test_types.py")
    cases: Counter[str] = Counter()
    values: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for item in items:
        name = item.nodeid.partition("[")[0]
        if rare := item.get_closest_marker("one_in"):
            if cases[name] % rare.args[0]:
                item.add_marker("slow")
            cases[name] += 1
        if item.get_closest_marker("covering") and not item.get_closest_marker("slow"):
            own = {(key, repr(value)) for key, value in item.callspec.params.items()}
            if own <= values[name]:
                item.add_marker("slow")
            values[name] |= own
        if PROFILE == "deep" and is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Collect garbage seldom, without the objects of libraries: it took a sixth of the tests."""
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.fixture(autouse=True, scope="session")
def files_in_memory() -> Iterator[None]:
    """No test survives a failure of the machine, so that none waits for its disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def defaults() -> Iterator[None]:
    """The test may change torch's default device and dtype."""
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    yield
    torch.set_default_device(device if device.type != "cpu" else None)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two training steps on digits; a test that changes it works on a copy."""
    from tiny_runs import train_digits

    return train_digits(tmp_path_factory.mktemp("digits") / "run")


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of the run of digits, which a test may change."""
    return shutil.copytree(digits_run, tmp_path / "run")


@pytest.fixture(scope="session")
def labelled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on colour images of the classes dot, stripe and 7."""
    from tiny_runs import train_labelled

    return train_labelled(tmp_path_factory.mktemp("labelled") / "run")


@pytest.fixture(scope="session")
def diffusers_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers with a model of images of one channel and three classes."""
    from tiny_runs import save_diffusers

    return save_diffusers(tmp_path_factory.mktemp("diffusers"))


@pytest.fixture
def undrawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of figures are empty, since drawing takes most of the time of a comparison."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda _, file, **options: Path(file).touch())


@pytest.fixture
def untrained_classifier(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Classifiers of evaluations keep random weights; the options of each call are returned."""
    from cldsde.images.evaluate import classifier
    from cldsde.images.evaluate.classifier import ImageClassifier

    calls: list[dict[str, Any]] = []

    def untrained(data: Any, **options: Any) -> Any:
        calls.append(options)
        channels, classes = data.train.shape[0], max(data.train.classes, 2)
        return ImageClassifier(channels, classes, width=4, size=8).eval(), 0.5

    monkeypatch.setattr(classifier, "train_classifier", untrained)
    return calls
