"""Objectives: of flow matching, and of latent models, which train, resume and sample."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cldsde import RectifiedFlow
from cldsde.images import Run
from cldsde.images.config import RunConfig
from cldsde.images.data import to_unit
from cldsde.images.evaluate.likelihoods import UndefinedLikelihoodError, latent_likelihood
from cldsde.images.latent import Batch, negative_evidence_lower_bound
from cldsde.images.model import DiffusionModel, ImageSpace, load_model, make_model
from cldsde.images.train import learner, objectives
from cldsde.images.train.objectives import Objective
from cldsde.score import (
    PerturbedData,
    TimeSampler,
    kappa_density,
    logit_normal_density,
    mode_density,
)
from probes import generator as seeded
from tiny_runs import NETWORK, SHORT, noise_images
from tolerances import EPS, order_of, rounding, standard_error
from trainings import DATA, assert_same_bits, configured, interrupt, metrics, trained

CONFIG = {
    "seed": 5,
    "data": {"flip": True},
    "process": {"name": "CLD", "options": {"velocity_scale": 1.0}},
    "network": {"options": NETWORK},
    "latent": {**NETWORK, "latent_channels": 2, "pretraining": 32, "annealing": 32},
    "training": {**SHORT, "t_min": 1e-2},
    "sampling": {"solver": "euler-maruyama", "nfe": 3},
}
FLOW = {"process": {"name": "RectifiedFlow", "options": {}}, "score": {"prediction": "flow"}}
FLOW |= {"latent": None}
# The default densities of times.
DENSITIES = {"uniform": torch.ones_like, "logit_normal": logit_normal_density()}
DENSITIES |= {"mode": mode_density()}
T_MIN = 1e-2
SPACE = ImageSpace((1, 4, 4))
PIXELS = 16
# Single precision: sums of some thousand terms of a network, and of the images' losses.
SINGLE = rounding(100, dtype=torch.float32)


def config(**sections) -> RunConfig:
    return configured(CONFIG, **sections)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with a learnt mixing of its score, and its model."""
    folder = tmp_path_factory.mktemp("latent") / "run"
    return folder, trained(folder, config(score={"mixing": -3.0}))


def batch(model: DiffusionModel, settings: RunConfig, count: int, dtype=torch.float32) -> Batch:
    x = to_unit(noise_images(seed=2).load(torch.arange(count)), 256).to(dtype)
    samplers = Objective(model, settings).samplers
    times = [torch.stack(sampler.sample(count, generator=seeded(3))) for sampler in samplers]
    return Batch(x, None, torch.stack(times))


@pytest.mark.parametrize("times", DENSITIES)
def test_the_loss_is_the_squared_error_of_the_flow_at_the_drawn_times(times):
    settings = config(**FLOW, training={"times": times})
    model = make_model(settings, SPACE)
    objective, given = Objective(model, settings), batch(model, settings, 16)
    x, (t, weight) = given.images, given.times[0]
    with torch.no_grad():
        found = objective.held_out(model, given, seeded(), 0)
        pair = PerturbedData.draw(RectifiedFlow(), x, t, generator=seeded())
        flow = model.score(pair.z, t, prediction="flow")
        error = (flow - (pair.noise - x.unsqueeze(1))).square().flatten(1).mean(1)
    u = torch.linspace(0, 1, 50, dtype=torch.float64)
    wanted = TimeSampler(DENSITIES[times], T_MIN).quantiles(u)
    assert torch.equal(objective.samplers[0].quantiles(u)[0], wanted[0])
    expected = weight * DENSITIES[times](t) * error
    assert torch.allclose(found.double(), expected, rtol=SINGLE, atol=0)


def test_a_model_of_flow_matching_is_sampled_by_any_solver(tmp_path):
    trained(tmp_path, config(**FLOW))
    run = Run.load(tmp_path)
    assert isinstance(run.process, RectifiedFlow)
    for solver in ("recommended", "multistep-2-sde", "edm-heun", "probability-flow"):
        found = run.sample([0, 1], solver=solver, t_end=0.04)
        assert found.images.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("name", ["VPSDE", "CLD", "PSLD"])
def test_with_an_exact_prior_the_bound_is_the_bound_of_the_autoencoder(name):
    """The untrained score belongs to a standard normal distribution, as in the first stage."""
    settings = config(process={"name": name, "options": {}})
    model, n = make_model(settings, SPACE).eval(), 1000
    x = batch(model, settings, 1).images.expand(n, 1, 4, 4)
    sampler = TimeSampler.importance(model.score.sde, T_MIN, weighting="likelihood")
    times = torch.stack(sampler.sample(n, generator=seeded()))
    given = Batch(x, None, times.expand(2, 2, -1))
    with torch.no_grad():
        bound, known = (
            negative_evidence_lower_bound(model, given, seeded(1), t_min)[0].double()
            for t_min in (T_MIN, None)
        )
    # Both draw the same latent variables first; the difference is the prior's part.
    difference = bound - known
    dimension = math.prod(model.vae.latent_shape)
    # Decoding at t_min adds noise of variance 1/I to z_0 of variance 1, and the prior is the
    # process's, not the distribution at T: mean and spread e^{−B/2} = 0.007 of both for VP, which
    # the divergence of Gaussians squares.
    noise = math.exp(-2 * float(model.score.sde.kappa(T_MIN)))
    slack = dimension * (noise + 0.007**2)
    error = standard_error(float(difference.std()), n)
    assert abs(float(difference.mean())) <= error + slack


@pytest.mark.parametrize(("name", "mixing"), [("VPSDE", None), ("CLD", -1.0), ("PSLD", None)])
def test_gradients_of_the_encoder_agree_with_differences(name, mixing):
    settings = config(process={"name": name, "options": {}}, score={"mixing": mixing})
    model = make_model(settings, SPACE).double().eval()
    generator = seeded(4)
    with torch.no_grad():  # the network's output is zero at first
        for parameter in model.score.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    given = batch(model, settings, 4, torch.float64)

    def bound(*_: torch.Tensor) -> torch.Tensor:
        return negative_evidence_lower_bound(model, given, seeded(1), T_MIN)[0].mean()

    last = model.vae.encoder.conv_out
    h = EPS ** (1 / 3)  # balances the errors of central differences, h² f'''/6 and eps f / h
    how = {"eps": h, "atol": order_of(h, 2, 1e4), "rtol": 0, "fast_mode": True}
    assert torch.autograd.gradcheck(bound, (last.weight, last.bias), **how)


def test_the_autoencoder_is_trained_by_the_bound_and_the_score_by_its_loss():
    """The score with times and weights by noise levels."""
    kappa = {"weighting": "kappa", "kappa_mean": 0.3, "kappa_std": 2.0}
    settings = config(training=kappa)
    model = make_model(settings, SPACE)
    objective, given = Objective(model, settings), batch(model, settings, 8)
    losses = objective.losses(model, given, seeded(), settings.pretraining_steps, nullcontext)
    part, bound = next(losses)
    wanted, _ = negative_evidence_lower_bound(model, given, seeded(), T_MIN)
    assert torch.allclose(bound, wanted / (PIXELS * math.log(2)), rtol=SINGLE, atol=0)
    bound.sum().backward()
    assert part == "autoencoder"
    before = [p.grad.clone() for p in model.vae.parameters()]
    assert all(bool(g.any()) for g in before if g.ndim > 1)

    sde, generator = model.score.sde, seeded()
    u = torch.linspace(0, 1, 50, dtype=torch.float64)
    quantiles = TimeSampler(kappa_density(sde, mean=0.3, std=2.0), T_MIN).quantiles(u)
    assert torch.equal(objective.samplers[0].quantiles(u)[0], quantiles[0])
    x0 = model.vae.encode(given.images).sample(generator).detach()
    PerturbedData.draw(sde, x0, given.times[1, 0], generator=generator)  # of the bound
    t, weight = given.times[0]
    pair = PerturbedData.draw(sde, x0, t, generator=generator)
    weighting = model.score.kappa_weighting(mean=0.3, std=2.0)
    part, loss = next(losses)
    expected = weight.float() * model.score.loss(pair, weighting=weighting)
    assert torch.allclose(loss, expected, rtol=SINGLE, atol=0)
    loss.sum().backward()
    assert part == "score"
    after = [p.grad for p in model.vae.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert next(losses, None) is None


def test_the_divergence_is_annealed_in_the_first_stage():
    settings = config(latent={"annealing": 64})
    model = make_model(settings, SPACE)
    objective, given = Objective(model, settings), batch(model, settings, 8)
    losses = []
    for step in (0, 1):
        [(part, found)] = objective.losses(model, given, seeded(), step, nullcontext)
        assert part == "autoencoder"
        losses.append(found.detach())
    divergence = model.vae.encode(given.images).kl_to_standard_normal().detach()
    expected = 16 / 64 * divergence / (PIXELS * math.log(2))
    found = losses[1] - losses[0]
    assert torch.allclose(found, expected, rtol=0, atol=SINGLE * float(losses[1].max()))


@pytest.mark.slow
def test_a_latent_model_that_was_interrupted_in_either_stage_ends_with_the_same_bits(
    whole, tmp_path
):
    settings = config(score={"mixing": -3.0})
    for seen in (32, 80):
        interrupt(tmp_path, settings, seen)
    assert_same_bits(whole[1], trained(tmp_path, settings))
    loaded = load_model(whole[0])
    assert torch.equal(loaded.score.mixing_logits, whole[1].score.mixing_logits)
    assert bool((whole[1].score.mixing_logits != -3).any())


def test_score_and_autoencoder_have_rates_limits_and_averages_of_their_own(tmp_path, monkeypatch):
    """A limit below both norms is then the norm of each, and neither scales the other."""
    latent = {"learning_rate": 3e-3, "joint_learning_rate": 7e-4}
    training = {"learning_rate": 2e-3, "clip": 1e-3, "micro_batch": 16, "log_every": 96}
    settings = config(latent=latent, training=training)
    rates, norms, decays = [], [], []
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        for group in self.param_groups:
            rates.append(group["lr"])
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(
        learner,
        "get_ema_multi_avg_fn",
        lambda decay: decays.append(decay) or get_ema_multi_avg_fn(decay),
    )
    trained(tmp_path, settings)
    assert rates == [2e-3, 3e-3] * 2 + [2e-3, 7e-4] * 4
    # The average starts anew in the second stage.
    assert decays == [1 / 10, 2 / 11, 1 / 10, 2 / 11, 3 / 12, 4 / 13]
    clipping = 1e-2  # which divides by the norm plus 1e-6, for norms above 1e-4
    limited = pytest.approx(1e-3, rel=clipping, abs=0)
    assert norms == [0.0, limited] * 2 + [limited] * 8


@pytest.mark.slow
@pytest.mark.parametrize("mixing", [None, -3.0])
def test_the_bound_leaves_the_score_alone_in_training(tmp_path, monkeypatch, mixing):
    """A bound that counts nothing trains the same score, if the autoencoder stands still."""
    still = {"learning_rate": 1e-30, "joint_learning_rate": 1e-30, "pretraining": 16}
    settings = config(latent=still, training={"images": 48}, score={"mixing": mixing})
    counted = trained(tmp_path / "counted", settings)
    monkeypatch.setattr(objectives, "bit_per_dim", lambda _: 0.0)
    assert_same_bits(counted.score, trained(tmp_path / "ignored", settings).score)


def test_metrics_hold_the_losses_and_norms_of_score_and_autoencoder(whole):
    *first, last = metrics(whole[0])
    assert "score_loss" not in first[0]
    assert first[0]["gradient_norm"] == first[0]["autoencoder_gradient_norm"] > 0
    both = last["score_loss"] + last["autoencoder_loss"]
    assert last["loss"] == pytest.approx(both, rel=SINGLE, abs=0)
    norms = last["score_gradient_norm"], last["autoencoder_gradient_norm"]
    assert min(norms) > 0
    assert last["gradient_norm"] == pytest.approx(math.hypot(*norms), rel=SINGLE, abs=0)


def test_a_latent_model_of_classes_and_black_and_white_pixels_trains(tmp_path):
    changes = {"network": {"conditional": True}, "latent": {"likelihood": "bernoulli"}}
    training = {"conditioning": "all", "times": "uniform", "images": 48}
    model = trained(tmp_path, config(**changes, training=training))
    assert all(bool(x.isfinite().all()) for x in model.state_dict().values())
    assert load_model(tmp_path).space.classes == 3


def test_bits_of_a_latent_model_are_its_bound_on_the_images(whole):
    model = load_model(whole[0]).model
    pixels = DATA.held_out.load(torch.arange(16))
    found, again = (latent_likelihood(model, pixels, t_min=T_MIN, samples=2) for _ in range(2))
    assert found == again
    assert found["is_bound"]
    # No less than the eight bits of uniform noise, which no model knows anything about, but for
    # four standard errors of the estimate.
    assert found["bits_per_dim"] >= 8 - 4 * found["standard_error"]


def test_a_distribution_of_black_and_white_pixels_gives_no_bits_of_grey_ones():
    """Of bytes it would give a tenth of the bits that any distribution of them needs."""
    settings = config(latent={"likelihood": "bernoulli"})
    grey = DATA.held_out.load(torch.arange(4))
    with pytest.raises(UndefinedLikelihoodError, match="Bernoulli, is of 2 grey levels"):
        latent_likelihood(make_model(settings, SPACE).eval(), grey, t_min=T_MIN)
    binary = make_model(settings, ImageSpace((1, 4, 4), levels=2)).eval()
    found = latent_likelihood(binary, grey // 128, levels=2, t_min=T_MIN, samples=2)
    assert found["is_bound"]
