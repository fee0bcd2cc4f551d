"""The demonstration: reproducible to the bit, and good enough."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cldsde.images.demo import DemoConfig, run_demo
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
    assert cells == {name: [3, 5] for name in ("EM", "SSCS", "multistep")}
    assert all(len(sets) == 3 for row in results["distances"].values() for sets in row.values())
    assert sum(results["class_shares"]) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_full_demonstration_draws_digits_of_every_class(tmp_path, seed):
    config = DemoConfig(seed=seed)
    report = run_demo(config, RunFolder(tmp_path / "run", config.resolved()))
    assert report.accuracy >= 0.97
    assert all(0.04 <= share <= 0.18 for share in report.class_shares)
    means = {
        name: {nfe: sum(sets) / len(sets) for nfe, sets in row.items()}
        for name, row in report.distances.items()
    }
    assert means["SSCS"][100] <= report.baseline / 4
    # Three sets of 800 images scatter by a tenth of their mean.
    assert means["multistep"][10] < 1.2 * min(means[name][50] for name in ("EM", "SSCS"))
