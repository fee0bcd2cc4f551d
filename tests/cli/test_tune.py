"""The command ``cldsde tune``."""

import shutil
import sys

import numpy as np
import pytest
import torch

from cldsde import ReverseProcess, solvers
from cldsde.images import tuning
from cldsde.images.data import to_levels
from cldsde.images.model import load_model
from cldsde.solvers import SamplerSettings, fitting
from command import command, rejected
from tiny_runs import train_digits

pytestmark = pytest.mark.usefixtures("untrained_classifier")
# The fewest tries, of few images: the search is tested beside the solvers.
SHORT = ["--nfe", 3, "--tries", 55, "--images", 16, "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_sets(monkeypatch):
    """Two sets in a report, which is enough for a standard error."""
    monkeypatch.setattr(tuning, "SETS", 2)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run with VP, whose plans take the least time: the search makes one for each try."""
    options = ("--set", "process.name=VPSDE", "--set", "sampling.solver=multistep-2")
    return train_digits(tmp_path_factory.mktemp("tuned") / "run", *options)


@pytest.fixture
def run(digits_run, tmp_path):
    """A copy of that run, which a test may change."""
    return shutil.copytree(digits_run, tmp_path / "run")


def test_settings_are_kept_in_the_run_and_measured_with_new_seeds(run, capsys):
    assert command("tune", run, *SHORT) == 0
    found = SamplerSettings.load(run / "sampler-3.json")
    assert found.nfe == 3
    assert found.process_name.startswith("VPSDE")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 evaluations, Fréchet distances of {tuning.SETS} sets of 16 new images:"
    assert lines[1].startswith("  in geometric mean of the next two: default ")
    # The other commands take the settings.
    out, few = run / "images.npz", ["--settings", run / "sampler-3.json", "--device", "cpu"]
    assert command("sample", run, *few, "--seeds", "0-3", "--out", out) == 0
    score = load_model(run).score.eval()
    plan = solvers.plan(ReverseProcess(score.sde, score), found.solver, found.times(score.sde))
    noise = solvers.SampleNoise(range(4))
    start = noise.start(score.sde, (1, 8, 8), t=float(plan.times[0]))
    data = plan.solve(start, noise=noise, denoise=True).data
    # Files have channels last.
    assert (np.load(out)["images"] == to_levels(data, 17).movedim(1, -1).numpy()).all()
    assert command("evaluate", run, *few, "--samples", 6) == 0
    assert "| settings" in capsys.readouterr().out
    # Nothing is replaced without being asked, nor before any work.
    error = rejected(capsys, "tune", run, *SHORT)
    assert "sampler-3.json is there already; name another place, or set --overwrite" in error
    assert SamplerSettings.load(run / "sampler-3.json") == found


def test_the_search_minimises_the_distances_of_two_networks(digits_run, tmp_path):
    model = load_model(digits_run)
    tuned = tuning.Tuning(model, model.config.data.load(), tmp_path / "classifier", images=16)
    tuned.__dict__["_distances"] = {"a": lambda _: 2.0, "b": lambda _: 8.0, "c": lambda _: 1e9}
    search = tuned.search(3, 40)
    assert search.distance(torch.zeros(tuned.shape)) == 4.0
    found = tuned.report(search.best, 3)
    assert [float(sets.fitted[0]) for sets in found.values()] == [4.0, 2.0, 8.0, 1e9]


@pytest.mark.slow
def test_a_model_of_diffusers_is_compared_with_its_own_images(
    diffusers_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tuning, "_REFERENCE", 16)  # 2,000 images of 50 evaluations take long
    out = tmp_path / "few.json"
    arguments = ["--model", diffusers_model, "--process", "VPSDE", "--out", out, *SHORT]
    assert command("tune", *arguments) == 0
    assert SamplerSettings.load(out).process.startswith("VPSDE")
    assert "  in random features 2: default " in capsys.readouterr().out


def test_an_interrupted_search_keeps_its_best_settings(run, monkeypatch, capsys):
    tried, distance = [], fitting.Search._distance

    def interrupted(self, settings, *others):
        tried.append((distance(self, settings, *others), settings))
        if len(tried) == 12:
            raise KeyboardInterrupt
        return tried[-1][0]

    monkeypatch.setattr(fitting.Search, "_distance", interrupted)
    assert command("tune", run, *SHORT) == 130
    best = min(tried[:11], key=lambda one: one[0])[1]
    assert SamplerSettings.load(run / "sampler-3.json") == best
    assert "the best settings so far are kept" in capsys.readouterr().err


def test_a_missing_library_is_named_before_any_work(digits_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cma", None)
    assert "pip install 'cldsde[tune]'" in rejected(capsys, "tune", digits_run, *SHORT)
    assert not (digits_run / "classifier.safetensors").exists()
