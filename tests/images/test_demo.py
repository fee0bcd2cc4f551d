"""The demonstration: reproducible to the bit, and good enough."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from cldsde import ReverseProcess, solvers
from cldsde.images.data import digits, pixels_of
from cldsde.images.demo import DemoConfig, run_demo
from cldsde.images.digit_classifier import train_classifier
from cldsde.images.evaluate import frechet_distance
from cldsde.images.model import load_model
from cldsde.images.runs import RunFolder


def tiny(seed: int) -> DemoConfig:
    """Everything runs, nothing is learnt."""
    config = DemoConfig.quick(seed=seed, channels=(16, 16), nfe=(3, 5), samples=80)
    training = dataclasses.replace(
        config.training, images=48, batch=8, log_every=16, save_every=16, sample_every=48
    )
    return dataclasses.replace(config, training=training)


def demonstrate(config: DemoConfig, folder) -> np.ndarray:
    run_demo(config, RunFolder(folder, config.resolved()), progress=False)
    return np.load(folder / "samples.npz")["images"]


def test_one_seed_gives_the_same_images_and_another_gives_others(tmp_path):
    first = demonstrate(tiny(0), tmp_path / "a")
    assert np.array_equal(first, demonstrate(tiny(0), tmp_path / "b"))
    assert not np.array_equal(first, demonstrate(tiny(1), tmp_path / "c"))


def test_every_cell_of_the_table_is_filled(tmp_path):
    demonstrate(tiny(0), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    cells = {name: sorted(map(int, row)) for name, row in results["distances"].items()}
    assert cells == {"EM": [3, 5], "SSCS": [3, 5]}
    assert sum(results["class_shares"]) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_full_demonstration_draws_digits_of_every_class(tmp_path, seed):
    config = DemoConfig(seed=seed)
    report = run_demo(config, RunFolder(tmp_path / "run", config.resolved()))
    assert report.accuracy >= 0.97
    assert all(0.04 <= share <= 0.18 for share in report.class_shares)
    assert report.distances["SSCS"][200] <= report.baseline / 4
    # One set of 1,000 images says little about 25 evaluations: for two models and six sets each the
    # ratio of SSCS to Euler–Maruyama was 0.41 … 0.99. The means of four sets differ by more than
    # they scatter.
    data = digits()
    classifier, _ = train_classifier(data, seed=seed)
    features = classifier.features(torch.cat([pixels_of(data.train), pixels_of(data.held_out)]))
    model = load_model(tmp_path / "run" / "model").score
    process = ReverseProcess(model.sde, model)

    def distance(solver: solvers.Solver, set_of_seeds: int) -> float:
        generator = torch.Generator().manual_seed(set_of_seeds)
        start = model.sde.prior.sample((1000, 1, 8, 8), generator=generator)
        times = solvers.root_times(model.sde.T, config.t_end, 24)
        solution = solvers.solve(process, solver, start, times, generator=generator, denoise=True)
        return frechet_distance(classifier.features(solution.data.clamp(-1, 1)), features)

    em, sscs = (
        sum(distance(solver, number) for number in range(4))
        for solver in (solvers.EulerMaruyama(), solvers.SSCS())
    )
    assert sscs < em
