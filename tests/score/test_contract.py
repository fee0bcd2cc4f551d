"""Properties of all functions of scores: shapes, dtypes, batches, seeds and representations."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cldsde import (
    CLD,
    HOLD,
    VPSDE,
    DenoiserScore,
    GaussianMixture,
    GuidedScore,
    LinearSDE,
    MixedScore,
    ReverseProcess,
)
from cldsde.score import (
    Conversion,
    Observation,
    PosteriorScore,
    ScoreDenoiser,
    TimeSampler,
    dequantise,
    evidence_lower_bound,
    flow_log_prob,
    log_likelihood,
    score_matching_loss,
)
from probes import generator
from score.cases import Constant, score_rounding

VP = VPSDE()
Function = Callable[[Tensor, Any], Tensor]


def data_of(size: int) -> GaussianMixture:
    means = torch.linspace(-1, 1, 2 * size, dtype=torch.float64).reshape(2, size)
    spread = 0.3 * torch.eye(size, dtype=torch.float64) + 0.1
    return GaussianMixture([1.0, 2.0], means, spread.expand(2, -1, -1))


def functions(sde: LinearSDE, size: int) -> dict[str, Function]:
    """Functions of states ``(B, k, *D)`` and times with one result per sample."""
    data = data_of(size)
    score = data.score(sde)
    process = ReverseProcess(sde, score)
    guided = GuidedScore(score, data.score(sde), 2.0)
    seen = Observation(lambda x: x.flatten(1)[:, :1], torch.ones(1), 0.1)
    mixed = MixedScore(Constant(sde, 0.7), sde, 0.2, 0.5)
    all_rows = data.score(sde, rows="all")

    def converted(source: Any, target: Any) -> Function:
        return lambda z, t: Conversion.at(sde, t, source, target)(z, score(z, t))

    return {
        "score": score,
        "full score": all_rows,
        "density": lambda z, t: data.log_prob(sde, z, t),
        "posterior mean": lambda z, t: data.posterior_mean(sde, z, t),
        "drift": process.drift,
        "probability flow": process.probability_flow,
        "data prediction": process.data_prediction,
        "full score from the driven rows": process.full_score,
        "noise from a score": converted("score", "noise"),
        "data from a score": converted("score", "data"),
        "full score from a noise": converted("noise", "full_score"),
        "score from a full score": lambda z, t: Conversion.at(sde, t, "full_score", "score")(
            z, all_rows(z, t)
        ),
        "noise from data": lambda z, t: Conversion.at(sde, t, "data", "noise")(z, z[:, 0]),
        "mixed score": mixed,
        "guided score": guided,
        "posterior score": PosteriorScore(score, seen, sde=sde),
        "denoiser": DenoiserScore(ScoreDenoiser(score), sde),
    }


def random_functions(sde: LinearSDE, size: int) -> dict[str, Function]:
    """Functions of states, a time and random numbers, with one result per sample."""
    score = data_of(size).score(sde)
    process = ReverseProcess(sde, score)
    coarse: Any = {"rtol": 0.1, "atol": 0.1}
    return {
        "loss": lambda z, t: score_matching_loss(score, sde, z[:, 0], t, generator=generator()),
        "bound": lambda z, t: evidence_lower_bound(
            score, sde, z[:, 0], t, 0.7, t_min=0.01, generator=generator()
        ),
        "flow density": lambda z, t: flow_log_prob(process, z, t, **coarse).log_prob,
        "likelihood": lambda z, t: (
            log_likelihood(process, z[:, 0], t, generator=generator()).log_prob
        ),
        "likelihood, replaced": lambda z, t: (
            log_likelihood(process, z[:, 0], t, start="replace", generator=generator()).log_prob
        ),
    }


NAMES = [*functions(VP, 1), *random_functions(VP, 1)]
every_process = pytest.mark.parametrize("sde", [VP, HOLD()], ids=["VP", "HOLD"])


def function(name: str, sde: LinearSDE, size: int) -> Function:
    return {**functions(sde, size), **random_functions(sde, size)}[name]


@pytest.mark.parametrize("name", NAMES)
@every_process
def test_data_have_any_axes(sde: LinearSDE, name: str) -> None:
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


@pytest.mark.parametrize("name", functions(VP, 1))
@every_process
def test_samples_and_their_times_are_independent(sde: LinearSDE, name: str) -> None:
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


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_no_values(name: str) -> None:
    z = torch.zeros(1, 2, 3, dtype=torch.float64)
    call = function(name, CLD(), 3)
    assert call(z[:0], 0.6).shape == (0, *call(z, 0.6).shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_dtype_of_the_states(name: str, dtype: torch.dtype) -> None:
    z = torch.zeros(1, 2, 3, dtype=dtype)
    # Densities of flows are integrated in double precision.
    integrated = name == "flow density" or "likelihood" in name
    assert function(name, CLD(), 3)(z, 0.6).dtype == (torch.float64 if integrated else dtype)


DATA = GaussianMixture([1.0, 1.0], [[-1.0, 0.0], [1.0, 0.5]], [torch.eye(2).tolist()] * 2)
PROCESS = ReverseProcess(VP, DATA.score(VP))
LANGEVIN = ReverseProcess(CLD(), DATA.score(CLD()))
X = torch.zeros(4, 2)
COARSE: Any = {"rtol": 0.1, "atol": 0.1}
HUTCHINSON: Any = {"divergence": "hutchinson", **COARSE}
RANDOM: dict[str, Callable[[torch.Generator], Tensor]] = {
    "mixture": lambda g: DATA.sample(4, generator=g),
    "times": lambda g: TimeSampler(lambda t: 1 / t, t_min=1e-3).sample(4, generator=g)[0],
    "levels": lambda g: dequantise(torch.zeros(4, dtype=torch.long), generator=g),
    "loss": lambda g: score_matching_loss(PROCESS.score, VP, X, 0.5, generator=g),
    "denoising loss": lambda g: score_matching_loss(
        LANGEVIN.score, CLD(), X, 0.5, conditioning="all", generator=g
    ),
    "bound": lambda g: evidence_lower_bound(PROCESS.score, VP, X, 0.5, t_min=1e-3, generator=g),
    "flow": lambda g: flow_log_prob(PROCESS, X[:, None], 0.1, generator=g, **HUTCHINSON).log_prob,
    "likelihood": lambda g: log_likelihood(LANGEVIN, X, 0.4, generator=g, **COARSE).log_prob,
    "likelihood, replaced": lambda g: (
        log_likelihood(LANGEVIN, X, 0.4, start="replace", generator=g).log_prob
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_decides_all_random_numbers(name: str) -> None:
    first, again, other = (RANDOM[name](generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def zero_score(z: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(z)


SDE = "VPSDE(beta_min=0.1, beta_max=20.0)"
MIXTURE = "GaussianMixture(modes=2, dimension=2)"
REPRESENTATIONS: dict[str, object] = {
    MIXTURE: DATA,
    f"MixtureScore(data={MIXTURE}, sde={SDE}, rows=[0])": DATA.score(VP),
    f"ReverseProcess(sde={SDE}, score=MixtureScore(data={MIXTURE}, sde={SDE}, rows=[0]))": PROCESS,
    f"ReverseProcess(sde={SDE}, score=<function zero_score>)": ReverseProcess(VP, zero_score),
    f"ReverseProcess(sde={SDE}, score=MixedScore(…))": ReverseProcess(
        VP, MixedScore(torch.nn.Identity(), VP, 0.0, 1.0)
    ),
}


@pytest.mark.parametrize("text", REPRESENTATIONS)
def test_representations_show_the_parts_in_one_line(text: str) -> None:
    made = REPRESENTATIONS[text]
    assert repr(made) == repr(copy.deepcopy(made)) == repr(pickle.loads(pickle.dumps(made))) == text


def test_a_mixed_score_shows_its_process_and_its_network() -> None:
    text = repr(MixedScore(torch.nn.Identity(), CLD(), 0.0, 1.0, inputs="estimate"))
    assert f"sde={CLD()!r}, inputs='estimate'" in text
    assert "(network): Identity()" in text
