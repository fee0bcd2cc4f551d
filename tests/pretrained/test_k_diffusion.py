"""The sampler for k-diffusion and ComfyUI has their conventions, and samples the data."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cldsde import VESDE, VPSDE, GaussianMixture, NoisePath, RectifiedFlow, solvers
from cldsde.pretrained import sample_k_diffusion
from cldsde.solvers import SampleNoise
from probes import generator
from references import denoised
from tolerances import rounding, standard_error, standard_error_of_variance

MULTISTEP = solvers.ExponentialMultistep
EULER = MULTISTEP(order=1)
DPMPP_2M = MULTISTEP(order=2, variable="kappa", weights="published")
# Thirty steps, each a combination of x and a data prediction of size 1, from levels up to 5,000.
EXACT = rounding(2**11)
# Six steps, whose states have entries up to 4 times the level.
EXACT32 = rounding(2**10, dtype=torch.float32)


def karras(n, low=0.03, high=14.6):
    """Levels of Karras et al. (2022, equation 5), and 0."""
    ramp = torch.linspace(high ** (1 / 7), low ** (1 / 7), n, dtype=torch.float64) ** 7
    return torch.cat([ramp, ramp.new_zeros(1)])


def denoiser(x, sigma):
    return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1).square()))


def start(level):
    return level * torch.randn(3, 2, 4, generator=generator(3), dtype=torch.float64)


# The update formulas of Karras et al. (2022, algorithm 2) and of DPM-Solver++(2M), from the papers.
# On these levels, the functions of k-diffusion 0.1.1 gave the same numbers to 5e-16.


def published_euler(model, x, sigmas):
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * (x - model(x, now.expand(len(x)))) / now
    return x


def published_dpmpp_2m(model, x, sigmas):
    last = None
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        data = used = model(x, now.expand(len(x)))
        if last is not None and then > 0:
            share = (now / then).log() / (2 * (sigmas[i - 1] / now).log())
            used = (1 + share) * data - share * last
        x, last = (then / now) * x + (1 - then / now) * used, data
    return x


METHODS = [(published_euler, EULER), (published_dpmpp_2m, DPMPP_2M)]
PROCESSES = (VPSDE(), VESDE(), RectifiedFlow())
LEVELS = [(process, 14.6, *pair) for process in PROCESSES for pair in METHODS]
# Rectified flow reaches every level.
LEVELS += [(RectifiedFlow(), 5000.0, *METHODS[0])]


@pytest.mark.parametrize(("process", "most", "published", "solver"), LEVELS)
def test_deterministic_samples_are_those_of_k_diffusion(process, most, published, solver):
    sigmas = karras(30, high=most)
    x = start(sigmas[0])
    found = sample_k_diffusion(denoiser, x, sigmas, process=process, solver=solver)
    torch.testing.assert_close(found, published(denoiser, x, sigmas), rtol=0, atol=EXACT)


@pytest.mark.parametrize("process", [RectifiedFlow(), VPSDE()])
def test_flow_models_see_the_linear_path(process):
    """Euler steps of the flow (1 − t) x_0 + t n, from pure noise, as ComfyUI takes them."""
    times, x = torch.linspace(1, 0, 21, dtype=torch.float64), start(1.0)
    options = {"process": process, "solver": EULER, "path": NoisePath.linear()}
    found = sample_k_diffusion(denoiser, x, times, **options)
    torch.testing.assert_close(found, published_euler(denoiser, x, times), rtol=0, atol=EXACT)


# Velocities are drawn anew at the start of each part of a sampling.
PARTS = [("CLD", [0, 30]), ("VPSDE", [0, 30]), ("CLD", [0, 11, 21, 30])]


@pytest.mark.parametrize(("process", "ends"), PARTS)
def test_samples_of_a_mixture_have_its_moments_in_one_or_several_parts(process, ends):
    """Within 3 standard errors; a mixture of two has less kurtosis than a normal distribution."""
    count, sigmas = 4000, karras(30, high=80.0).float()
    data = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.4]], [0.05 * torch.eye(2)] * 2)
    x = 80 * torch.randn(count, 2, generator=generator(1))
    for first, last in itertools.pairwise(ends):
        part = sigmas[first : last + 1]
        x = sample_k_diffusion(partial(denoised, data), x, part, process=process)
    mean, variance = torch.tensor([0.26, -0.13]), 0.05 + 0.21 * torch.tensor([1.8, 0.9]).square()
    for i in range(2):
        spread = float(variance[i])
        assert abs(float(x[:, i].mean() - mean[i])) < standard_error(spread**0.5, count, 3.0)
        assert abs(float(x[:, i].var()) - spread) < standard_error_of_variance(spread, count, 3.0)


# Conventions


def test_parts_of_a_deterministic_solver_are_the_whole():
    sigmas, options = karras(12), {"process": "VPSDE", "solver": EULER}
    x = start(sigmas[0])
    whole = sample_k_diffusion(denoiser, x, sigmas, **options)
    for part in (sigmas[:5], sigmas[4:9], sigmas[8:], sigmas[-1:]):
        x = sample_k_diffusion(denoiser, x, part, **options)
    torch.testing.assert_close(x, whole, rtol=0, atol=EXACT)


def test_model_and_callback_see_the_same():
    sigmas, calls, seen = karras(6).float(), [], []
    x = start(sigmas[0]).float()

    def model(x, sigma, *, factor):
        calls.append((x.clone(), sigma.clone()))
        return factor * denoiser(x, sigma)

    def callback(state):
        seen.append({name: x.clone() if torch.is_tensor(x) else x for name, x in state.items()})

    found = sample_k_diffusion(model, x, sigmas, {"factor": 0.9}, callback, True)
    assert len(calls) == len(seen) == len(sigmas) - 1
    assert torch.equal(calls[0][0], x)
    for i, (state, (given, level)) in enumerate(zip(seen, calls, strict=True)):
        assert set(state) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert state["i"] == i
        assert state["sigma"] == state["sigma_hat"] == sigmas[i]
        assert torch.equal(state["x"], given)
        assert torch.equal(level, sigmas[i].expand(3))
    assert torch.equal(found, seen[-1]["denoised"])


def test_callbacks_may_change_data_prediction_and_state():
    sigmas = karras(6)
    x = start(sigmas[0])

    def change(state):
        state["denoised"].clamp_(-0.1, 0.1)
        if state["i"] == 2:
            state["x"].add_(1.0)

    found = sample_k_diffusion(denoiser, x, sigmas, callback=change, process="VESDE", solver=EULER)
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        data = denoiser(x, now.expand(3)).clamp(-0.1, 0.1)
        x = x + 1.0 if i == 2 else x
        x = data + then / now * (x - data)
    torch.testing.assert_close(found, x, rtol=0, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_keep_the_type_of_x(dtype):
    types = set()

    def model(x, sigma):
        types.update((x.dtype, sigma.dtype))
        return denoiser(x, sigma)

    found = sample_k_diffusion(model, start(14.6).to(dtype), karras(5).float())
    assert types == {dtype}
    assert found.dtype == dtype
    assert bool(found.isfinite().all())


# Noise


def test_noise_depends_on_each_sample_alone():
    sigmas, x = karras(6).float(), start(14.6).float()
    together = sample_k_diffusion(denoiser, x, sigmas)
    assert torch.equal(together, sample_k_diffusion(denoiser, x, sigmas))
    alone = sample_k_diffusion(denoiser, x[1:2], sigmas)
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=EXACT32)
    same_x = sample_k_diffusion(denoiser, x[[0, 0, 1]], sigmas)
    assert torch.equal(same_x[0], same_x[1])


def test_noise_may_be_a_seed_a_generator_or_a_source():
    sigmas, x = karras(6).float(), start(14.6).float()

    def found(**noise):
        return sample_k_diffusion(denoiser, x, sigmas, **noise)

    assert torch.equal(found(seed=4), found(noise=SampleNoise(range(3), key=4)))
    assert torch.equal(found(generator=generator(4)), found(generator=generator(4)))
    assert not torch.equal(found(seed=4), found(seed=5))


def test_noise_sampler_draws_for_one_component():
    sigmas, x, levels = karras(6).float(), start(14.6).float(), []
    draws = [torch.randn(3, 2, 4, generator=generator(i)) for i in range(5)]
    noise = solvers.RecordedNoise([draw.unsqueeze(1) for draw in draws])

    def sampler(sigma, following):
        levels.append((float(sigma), float(following)))
        return draws[len(levels) - 1]

    options = {"process": "VPSDE", "solver": MULTISTEP(order=2, stochasticity=1.0)}
    found = sample_k_diffusion(denoiser, x, sigmas, noise_sampler=sampler, **options)
    assert torch.equal(found, sample_k_diffusion(denoiser, x, sigmas, noise=noise, **options))
    assert levels == list(zip(sigmas[:-2].tolist(), sigmas[1:-1].tolist(), strict=True))


# ComfyUI


def comfy(kind, model, **options):
    """A model of ComfyUI's samplers: a wrapper with masks, a guider, and the model."""
    sampling = type("ModelSampling", (type(kind, (), {}),), options)()
    guider = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
    wrapper = partial(model)
    wrapper.inner_model = guider
    return wrapper


def test_path_is_that_of_comfyui_model():
    """Of flow models, whose class is CONST, and of others, such as EPS."""
    times, x = torch.linspace(1, 0, 9, dtype=torch.float64), start(1.0)
    linear = sample_k_diffusion(denoiser, x, times, path=NoisePath.linear())
    plain = sample_k_diffusion(denoiser, x, times)
    assert torch.equal(sample_k_diffusion(comfy("CONST", denoiser), x, times), linear)
    assert torch.equal(sample_k_diffusion(comfy("EPS", denoiser), x, times), plain)
    assert not torch.equal(linear, plain)
    doubled = sample_k_diffusion(
        denoiser, x, times, path=NoisePath(lambda t: 1 - t, lambda t: 2 * t)
    )
    scaled = sample_k_diffusion(comfy("CONST", denoiser, noise_scale=2.0), x, times)
    torch.testing.assert_close(scaled, doubled, rtol=0, atol=EXACT)


# Errors


def unevaluated(x, sigma):
    pytest.fail("the model must not be evaluated before an error")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"sigmas": [2.0, 2.0, 0.0]}, ValueError, "must decrease"),
        ({"sigmas": [2.0, 1.0, -1.0]}, ValueError, "not negative"),
        ({"sigmas": [math.nan, 1.0, 0.0]}, ValueError, "finite"),
        ({"sigmas": [[2.0, 1.0]]}, ValueError, "one axis"),
        ({"sigmas": "levels"}, TypeError, "sequence of numbers"),
        ({"sigmas": [1000, 0]}, ValueError, r"247.6 or less for CLD.* it: RectifiedFlow.*, VESDE"),
        ({"sigmas": [1e2, 0], "process": "HOLD"}, ValueError, r"22.25 or less.* CLD\(.* VPSDE\("),
        ({"noise_sampler": lambda a, b: a}, ValueError, "2 components"),
        ({"noise_sampler": lambda a, b: a, "seed": 1}, ValueError, "alternatives"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"seed": 1, "generator": generator()}, ValueError, "seed and generator are alternatives"),
        ({"noise": "seed"}, TypeError, "noise must be"),
        ({"noise": SampleNoise([1, 2])}, ValueError, "one seed per sample"),
        ({"path": "linear"}, TypeError, "NoisePath"),
        ({"path": NoisePath.linear()}, ValueError, "times of the path"),
        ({"callback": 3}, TypeError, "callback"),
        ({"process": VESDE(sigma_min=0.1)}, ValueError, "noise levels down to"),
        ({"model": 3}, TypeError, "model"),
        ({"model": lambda x, sigma: x[:1]}, ValueError, "like x"),
        ({"x": torch.zeros(3)}, TypeError, "x must be"),
    ],
)
def test_bad_arguments_are_rejected(changes, error, text):
    given = {"model": unevaluated, "x": start(10.0).float(), "sigmas": karras(4).float()}
    with pytest.raises(error, match=text):
        sample_k_diffusion(**given | changes)


def test_progress_bar_is_switched_by_disable(capsys):
    sample_k_diffusion(denoiser, start(10.0), karras(4), disable=True)
    assert not capsys.readouterr().err
    sample_k_diffusion(denoiser, start(10.0), karras(4), disable=False)
    assert "4/4" in capsys.readouterr().err
