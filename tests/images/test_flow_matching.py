"""Flow matching of image models by configuration."""

from __future__ import annotations

import pytest
import torch

from cldsde import VPSDE, GuidedScore, MixedScore, RectifiedFlow
from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.images.data import DataSet
from cldsde.images.model import ImageSpace, data_statistics, load_model, make_model
from cldsde.images.runs import RunFolder
from cldsde.images.sample.sampler import ImageSampler, make_solver
from cldsde.images.train import train
from cldsde.images.train.objectives import Batch, Times, make_objective
from cldsde.score import ConditionalScore, PerturbedData
from tiny_runs import NETWORK, noise_images


def values(**sections):
    standard = {
        "process": {"name": "RectifiedFlow"},
        "network": {"options": NETWORK},
        "score": {"prediction": "flow"},
        "training": {"images": 64, "batch": 32},
    }
    return {key: {**standard.get(key, {}), **sections.get(key, {})} for key in standard | sections}


def objective_and_batch(config):
    data = noise_images()
    model = make_model(config, ImageSpace.of(data, config), data_statistics(config, data))
    objective = make_objective(model, config)
    t, weight = objective.samplers[0].sample(16, generator=torch.Generator().manual_seed(1))
    x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    return model, objective, Batch(x, None, (Times(t, weight),))


@pytest.mark.parametrize("times", ["uniform", "logit_normal", "mode"])
def test_the_loss_is_the_squared_error_of_the_flow_at_the_drawn_times(times):
    config = RunConfig.from_dict(values(training={"times": times}))
    model, objective, batch = objective_and_batch(config)
    g = torch.Generator()
    with torch.no_grad():
        found = objective.held_out(model, batch, g.manual_seed(3), 0)
        t, weight = batch.times[0]
        pair = PerturbedData.draw(RectifiedFlow(), batch.images, t, generator=g.manual_seed(3))
        flow = model.score(pair.z, t, prediction="flow")
        x0 = batch.images.unsqueeze(1)
        expected = (flow - (pair.noise - x0)).square().flatten(1).mean(1)
    # Uniform times have weights of 1 up to the density between knots; the rest is single
    # precision. The density between two of the sampler's 2,000 knots is their mean, and a
    # thousandth of its mass lies below t_min.
    if times == "uniform":
        assert torch.allclose(weight, torch.ones_like(weight), rtol=1e-6)
    assert torch.allclose(found, expected, rtol=1e-4 if times == "uniform" else 1e-2)


def test_a_trained_model_is_sampled_by_any_solver(tmp_path):
    config = RunConfig.from_dict(values(training={"ema_decay": 0.5}))
    data = DataSet(noise_images(), noise_images(16))
    train(config, data, RunFolder(tmp_path, config.to_dict()), device="cpu")
    model = load_model(tmp_path)
    assert isinstance(model.score.sde, RectifiedFlow)
    for solver in ("multistep-2", "multistep-2-sde", "em", "edm-heun", "probability-flow"):
        sampling = SamplingConfig(solver=solver, nfe=6, t_end=0.04)
        found = ImageSampler.of(model, sampling).sample([0, 1])
        assert bool(found[0].isfinite().all())


def test_guidance_is_linear_in_the_predictions_of_the_data():
    class Classes(torch.nn.Module):
        def forward(self, x, clock, condition):
            return x * condition.reshape(-1, 1, 1, 1)

    score = MixedScore(Classes(), VPSDE(), 0.0, 1.0)
    z = torch.randn(3, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    given, free = (score.data_prediction(z, 0.5, condition=torch.tensor(label)) for label in (1, 3))
    pair = (ConditionalScore(score, condition=torch.tensor(label)) for label in (1, 3))
    found = GuidedScore(*pair, 2.5).data_prediction(z, 0.5)
    # Single precision.
    assert torch.allclose(found, free + 2.5 * (given - free), rtol=1e-5, atol=1e-5)


def test_stochasticity_is_an_option_of_the_solver():
    options = {"stochasticity": 0.5}
    solver = make_solver(SamplingConfig(solver="multistep-2", options=options))
    assert solver.stochasticity == 0.5
    for wrong in ("a lot", [1.0], None):
        with pytest.raises(ValueError, match=r"options\.stochasticity: must be .*number"):
            make_solver(SamplingConfig(solver="multistep-2", options={"stochasticity": wrong}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"process": {"name": "CLD"}}, r"score.prediction: must be 'noise' .* CLD, which has 2"),
        ({"score": {"prediction": "speed"}}, r"score.prediction: must be"),
        ({"score": {"mixing": -3.0}}, r"score.mixing: must be None if prediction is 'flow'"),
        ({"training": {"conditioning": "all"}}, "training.conditioning: must be 'data' if score"),
        (
            {"training": {"times": "mode", "weighting": "likelihood"}},
            r"training.weighting: must be 'reweighted' if times is 'mode'",
        ),
        ({"training": {"mode_scale": 2.0}}, r"training.mode_scale: .* equal to 1.75"),
        ({"training": {"logit_std": 0.0}}, r"training.logit_std: .* equal to 0.01"),
    ],
)
def test_settings_that_do_not_go_together_are_rejected(sections, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values(**sections))
