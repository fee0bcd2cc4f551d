"""Flow matching of image models by configuration."""

import math

import pytest
import torch

from cldsde import RectifiedFlow
from cldsde.images.config import SamplingConfig
from cldsde.images.latent import Batch
from cldsde.images.model import ImageSpace, data_statistics, load_model, make_model
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.train.objectives import Objective
from cldsde.score import PerturbedData, logit_normal_density, mode_density
from probes import generator
from tiny_runs import NETWORK
from tolerances import rounding
from trainings import DATA, configured, trained

CONFIG = {
    "process": {"name": "RectifiedFlow"},
    "network": {"options": NETWORK},
    "score": {"prediction": "flow"},
    "training": {"images": 64, "batch": 32},
}
SINGLE = rounding(50, dtype=torch.float32)  # a mean of 16 numbers, and some layers.
# The default densities of times.
DENSITIES = {"uniform": torch.ones_like, "logit_normal": logit_normal_density()}
DENSITIES |= {"mode": mode_density()}


@pytest.mark.parametrize("times", DENSITIES)
def test_the_loss_is_the_squared_error_of_the_flow_at_the_drawn_times(times):
    config = configured(CONFIG, training={"times": times})
    statistics = data_statistics(config, DATA.train)
    model = make_model(config, ImageSpace.of(DATA.train, config), statistics)
    objective = Objective(model, config)
    t, weight = objective.samplers[0].sample(16, generator=generator(1))
    x = torch.randn(16, 1, 4, 4, generator=generator(2)).clamp(-1, 1)
    batch = Batch(x, None, torch.stack([t, weight])[None])
    with torch.no_grad():
        found = objective.held_out(model, batch, generator(3), 0)
        pair = PerturbedData.draw(RectifiedFlow(), x, t, generator=generator(3))
        flow = model.score(pair.z, t, prediction="flow")
        expected = (flow - (pair.noise - x.unsqueeze(1))).square().flatten(1).mean(1)
    density, t_min = DENSITIES[times], torch.tensor([1e-3], dtype=torch.float64)
    share = weight * density(t)
    # The density of the draws is constant in each of 2,000 cells of log t, and zero below t_min.
    slope = (density(0.999 * t) / density(t)).log().abs() / 0.001
    cell = slope * math.log(1 / t_min) / 2000 + t_min * abs(1 - density(t_min))
    assert bool(((share - 1).abs() <= cell + SINGLE).all())
    assert torch.allclose(found.double(), share * expected, rtol=SINGLE, atol=0)


def test_a_trained_model_is_sampled_by_any_solver(tmp_path):
    trained(tmp_path, configured(CONFIG, training={"images": 32, "sample_grid": 4}))
    model = load_model(tmp_path)
    assert isinstance(model.score.sde, RectifiedFlow)
    for solver in ("multistep-2", "multistep-2-sde", "em", "edm-heun", "probability-flow"):
        sampling = SamplingConfig(solver=solver, nfe=6, t_end=0.04)
        found = ImageSampler.of(model, sampling).sample([0, 1])
        assert bool(found[0].isfinite().all())


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("process", {"name": "CLD"}, r"score.prediction: must be 'noise' .* CLD, which has 2"),
        ("score", {"mixing": -3.0}, r"score.mixing: must be None if prediction is 'flow'"),
        ("training", {"conditioning": "all"}, "training.conditioning: must be 'data' if score"),
        ("training", {"times": "mode", "weighting": "likelihood"}, "'reweighted' if times is 'mo"),
        ("training", {"mode_scale": 2.0}, r"training.mode_scale: .* equal to 1.75"),
    ],
)
def test_settings_that_do_not_go_together_are_rejected(section, options, message):
    with pytest.raises(ValueError, match=message):
        configured(CONFIG, **{section: options})
