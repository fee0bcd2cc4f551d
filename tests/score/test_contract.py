"""Properties of all functions of scores: shapes, dtypes, batches and seeds."""

import math

import pytest
import torch

from cldsde import CLD, HOLD, VPSDE, score
from probes import generator
from score.cases import Constant, score_rounding

VP = VPSDE()


def data_of(size):
    means = torch.linspace(-1, 1, 2 * size, dtype=torch.float64).reshape(2, size)
    spread = 0.3 * torch.eye(size, dtype=torch.float64) + 0.1
    return score.GaussianMixture([1.0, 2.0], means, spread.expand(2, -1, -1))


def functions(sde, size):
    """Functions of states ``(B, k, *D)`` and times with one result per sample."""
    data = data_of(size)
    exact, all_rows = data.score(sde), data.score(sde, rows="all")
    process = score.ReverseProcess(sde, exact)
    seen = score.Observation(lambda x: x.flatten(1)[:, :1], torch.ones(1), 0.1)

    def converted(source, target, given):
        return lambda z, t: score.Conversion.at(sde, t, source, target)(z, given(z, t))

    return {
        "score": exact,
        "full score": all_rows,
        "density": lambda z, t: data.log_prob(sde, z, t),
        "posterior mean": lambda z, t: data.posterior_mean(sde, z, t),
        "drift": process.drift,
        "probability flow": process.probability_flow,
        "data prediction": process.data_prediction,
        "full score from the driven rows": process.full_score,
        "noise from a score": converted("score", "noise", exact),
        "full score from a noise": converted("noise", "full_score", exact),
        "mixed score": score.MixedScore(Constant(sde, 0.7), sde, 0.2, 0.5),
        "guided score": score.GuidedScore(exact, data.score(sde), 2.0),
        "posterior score": score.PosteriorScore(exact, seen, sde=sde),
        "denoiser": score.DenoiserScore(score.ScoreDenoiser(exact), sde),
    }


def random_functions(sde, size, seed=0):
    """Functions of states, a time and random numbers, with one result per sample."""
    exact = data_of(size).score(sde)
    process = score.ReverseProcess(sde, exact)
    coarse = {"rtol": 0.1, "atol": 0.1}

    def loss(z, t, conditioning="data"):
        options = {"conditioning": conditioning, "generator": generator(seed)}
        return score.score_matching_loss(exact, sde, z[:, 0], t, **options)

    def flow(z, t, divergence="hutchinson"):
        options = {"divergence": divergence, "generator": generator(seed), **coarse}
        return score.flow_log_prob(process, z, t, **options).log_prob

    def likelihood(z, t, start="perturb"):
        options = {"start": start, "generator": generator(seed), **coarse}
        return score.log_likelihood(process, z[:, 0], t, **options).log_prob

    return {
        "loss": loss,
        "denoising loss": lambda z, t: loss(z, t, "all"),
        "bound": lambda z, t: score.evidence_lower_bound(
            exact, sde, z[:, 0], t, 0.7, t_min=0.01, generator=generator(seed)
        ),
        "flow density": lambda z, t: flow(z, t, "exact"),
        "flow density, estimated": flow,
        "likelihood": likelihood,
        "likelihood, replaced": lambda z, t: likelihood(z, t, "replace"),
    }


NAMES = [*functions(VP, 1), *random_functions(VP, 1)]
every_process = pytest.mark.parametrize("sde", [VP, HOLD()], ids=["VP", "HOLD"])


def function(name, sde, size):
    return {**functions(sde, size), **random_functions(sde, size)}[name]


@pytest.mark.covering
@pytest.mark.parametrize("name", NAMES)
@every_process
def test_data_have_any_axes(sde, name):
    # Networks and observations need an axis of data.
    scalar = [] if name in ("mixed score", "posterior score") else [()]
    for axes in [(1, 2, 1), *scalar]:
        size = math.prod(axes)
        z = torch.randn(3, sde.components, size, generator=generator(), dtype=torch.float64)
        call = function(name, sde, size)
        flat, found = call(z, 0.6), call(z.reshape(*z.shape[:2], *axes), 0.6)
        assert found.shape == (flat.shape if flat.ndim == 1 else (*flat.shape[:-1], *axes))
        # Sums over the data may be made in another order.
        lost = score_rounding(sde, 0.6) * float(flat.abs().max())
        assert torch.allclose(found.reshape(flat.shape), flat, rtol=0, atol=lost)


@pytest.mark.covering
@pytest.mark.parametrize("name", functions(VP, 1))
@every_process
def test_samples_and_their_times_are_independent(sde, name):
    t = torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64)
    z = sde.perturb(torch.ones(3, 2, dtype=torch.float64), t, generator=generator())[0]
    call = function(name, sde, 2)
    together = call(z, t)
    for i, single in enumerate(t.tolist()):
        # One time as a number, a tensor, or one per sample: rounding of the coefficients, which
        # the inverse root of the kernel amplifies once more in full scores and data predictions.
        stretch = 1 + float(torch.linalg.inv(sde.marginal(single).root).norm())
        for time in (single, t[i], t[i : i + 1]):
            alone = call(z[i : i + 1], time)
            lost = score_rounding(sde, single) * stretch * (1 + float(alone.abs().max()))
            assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=lost)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_dtype_of_the_states_and_an_empty_batch_has_none(name, dtype):
    z, call = torch.zeros(1, 2, 3, dtype=dtype), function(name, CLD(), 3)
    found = call(z, 0.6)
    # Densities of flows are integrated in double precision.
    integrated = "flow density" in name or "likelihood" in name
    assert found.dtype == (torch.float64 if integrated else dtype)
    assert call(z[:0], 0.6).shape == (0, *found.shape[1:])


SAMPLERS = {
    "mixture": lambda g: data_of(2).sample(4, generator=g),
    "times": lambda g: score.TimeSampler(lambda t: 1 / t, t_min=1e-3).sample(4, generator=g)[0],
    "levels": lambda g: score.dequantise(torch.zeros(4, dtype=torch.long), generator=g),
}


@pytest.mark.covering
@pytest.mark.parametrize("name", [*SAMPLERS, *random_functions(VP, 1)])
def test_a_seed_decides_all_random_numbers(name):
    def result(seed):
        if name in SAMPLERS:
            return SAMPLERS[name](generator(seed))
        return random_functions(CLD(), 2, seed)[name](torch.zeros(4, 2, 2), 0.95)

    first, again, other = map(result, (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "flow density")
