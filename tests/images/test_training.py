"""Training is reproducible and resumes to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from cldsde import CLD, MixedScore
from cldsde.images.networks import UNet
from cldsde.images.runs import RunFolder
from cldsde.images.training import TrainingConfig, train

IMAGES = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
HELD_OUT = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
SETTINGS = {
    "steps": 12,
    "batch": 8,
    "learning_rate": 1e-3,
    "warmup": 2,
    "ema_decay": 0.9,
    "t_min": 1e-3,
    "log_every": 2,
    "save_every": 4,
}


def fresh_model() -> MixedScore:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet((1, 8, 8), 2, 1, channels=(8, 8))
    return MixedScore(network, CLD(), IMAGES.mean(), IMAGES.var())


class StopTrainingError(Exception):
    pass


class InterruptedRun(RunFolder):
    """A run that stops when metrics of a step are logged."""

    def log(self, record):
        super().log(record)
        if record["step"] == 10:
            raise StopTrainingError


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path):
    config = TrainingConfig(**SETTINGS)
    whole = train(fresh_model(), IMAGES, HELD_OUT, config, RunFolder(tmp_path / "a", {}), seed=5)
    with pytest.raises(StopTrainingError):
        train(fresh_model(), IMAGES, HELD_OUT, config, InterruptedRun(tmp_path / "b", {}), seed=5)
    run = RunFolder(tmp_path / "b", {})
    resumed = train(fresh_model(), IMAGES, HELD_OUT, config, run, seed=5)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    def metrics(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_another_seed_trains_another_model(tmp_path):
    config = TrainingConfig(**SETTINGS)
    a = train(fresh_model(), IMAGES, HELD_OUT, config, RunFolder(tmp_path / "a", {}), seed=5)
    b = train(fresh_model(), IMAGES, HELD_OUT, config, RunFolder(tmp_path / "b", {}), seed=6)
    assert not torch.equal(a.network.network.conv_out.weight, b.network.network.conv_out.weight)


def test_training_leaves_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    config = TrainingConfig(**SETTINGS)
    train(fresh_model(), IMAGES, HELD_OUT, config, RunFolder(tmp_path, {}), seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_untrained_model_has_the_loss_of_its_reference_on_gaussian_data(tmp_path):
    """Held-out loss of the untrained model: the noise that a Gaussian leaves open."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.5 * torch.randn(4000, 1, 8, 8, generator=generator)
    model = MixedScore(
        UNet((1, 8, 8), 2, 1, channels=(8, 8)), CLD(), torch.tensor(0.3), torch.tensor(0.25)
    )
    run = RunFolder(tmp_path, {})
    settings = {**SETTINGS, "steps": 2, "learning_rate": 1e-12}
    train(model, images[:8], images, TrainingConfig(**settings), run, seed=0)
    measured = json.loads((run / "metrics.jsonl").read_text())["held_out_loss"]
    t = torch.linspace(1e-3, 1, 20001, dtype=torch.float64)
    expected = torch.trapezoid(model.residual_variance(t), t) / (1 - 1e-3)
    # 4,000 images of 64 pixels, weighted so that each has the same expected share, relative
    # standard deviation √2 a pixel: five standard errors.
    assert measured == pytest.approx(float(expected), rel=5 * 2**0.5 / (4000 * 64) ** 0.5)


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_state(tmp_path):
    run = RunFolder(tmp_path, {})
    images = IMAGES.clone()
    config = TrainingConfig(**{**SETTINGS, "learning_rate": 1e30, "warmup": 0})
    with pytest.raises(FloatingPointError, match="learning_rate"):
        train(fresh_model(), images, HELD_OUT, config, run, seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup", -1),
        ("ema_decay", 1.5),
        ("t_min", 0.0),
        ("t_min", 0.9),
        ("save_every", 3),
    ],
)
def test_settings_that_cannot_train_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TrainingConfig(**{**SETTINGS, name: value})
