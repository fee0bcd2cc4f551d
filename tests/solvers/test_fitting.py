"""Samplers that are fitted to a network."""

import math
import sys

import numpy as np
import pytest
import torch

from cldsde import VESDE, VPSDE, DenoiserScore, GuidedScore, ReverseProcess, sample, solvers
from cldsde.linear import same_process
from cldsde.solvers import fitting, recommend

BEST, CENTRE = 1.6, 0.5  # κ at which the network below has no error, and its data, a point
SHAPE, TRIES = (4, 3), 65


def process(sde=None, seen=None, **options):
    """A network for point data; its last evaluation decides the samples."""

    def denoiser(u, sigma):
        if seen is not None:
            seen.append(float(sigma.max()))
        error = (-sigma.log() - BEST).square()
        return (CENTRE + error).reshape(-1, 1).expand_as(u)

    sde = sde or VPSDE()
    return ReverseProcess(sde, DenoiserScore(denoiser, sde, **options))


def distance(x):
    return abs(float(x.mean()) - CENTRE)


def fitted(nfe=2, tries=TRIES, by=distance, reverse=None, **options):
    budget = tries * nfe * SHAPE[0]
    reverse = reverse or process()
    how = {"nfe": nfe, "samples": SHAPE[0], "budget": budget, **options}
    return solvers.fit_sampler(reverse, SHAPE[1:], distance=by, **how)


def noting(tries):
    """The distance, which notes its values in a list."""

    def noted(x):
        tries.append(distance(x))
        return tries[-1]

    return noted


@pytest.fixture(scope="module")
def search():
    """The settings of a whole search, and the distances of its tries."""
    np.random.seed(1)  # noqa: NPY002 the generator that must not change
    tries, before = [], torch.get_rng_state()
    found = fitted(by=noting(tries), network="of a point")
    assert np.random.random() == np.random.RandomState(1).random()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before)
    return found, tries


def test_the_best_level_is_found(search):
    found, _ = search
    # The error is (κ − best)², and 41 tries in 3 dimensions reach 0.06 with every one of ten seeds.
    assert abs(found.kappa[-1] - BEST) < 0.1
    assert (found.nfe, found.network) == (2, "of a point")
    assert same_process(VPSDE(), found.process)


def test_the_same_seed_tries_the_same_settings_and_ctrl_c_leaves_the_best_so_far(search):
    tries = []
    note = noting(tries)

    def interrupted(x):
        if len(tries) == 20:  # in the second generation
            raise KeyboardInterrupt
        return note(x)

    with pytest.raises(KeyboardInterrupt):
        fitted(by=interrupted)
    assert tries == search[1][:20]
    tries.clear()
    one = fitting.Search(process(), SHAPE[1:], 2, SHAPE[0], interrupted, most=TRIES)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    again = distance(sample(VPSDE(), process().score, SHAPE, settings=one.best))
    assert again == min(tries)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=repr)
def test_the_network_is_evaluated_within_its_levels_and_budget(sde):
    seen = []
    found = fitted(tries=51, reverse=process(sde, seen, noise_levels=(0.3, 10.0)))
    rounding = 1e-6  # of σ in float32
    assert min(seen) >= 0.3 * (1 - rounding)
    assert max(seen) <= 10 * (1 + rounding)
    assert len(seen) <= 51 * 2
    # The search starts at the largest level.
    assert found.kappa[0] >= -math.log(10.0) - 1e-9
    assert -found.kappa[-1] >= math.log(0.3) - rounding


def test_guidance_in_an_interval_keeps_the_number_of_evaluations():
    sde, seen, spent = VPSDE(), [], []
    pair = (process(sde, seen).score for _ in range(2))
    reverse = ReverseProcess(sde, GuidedScore(*pair, 2.0, interval=(0.3, 3.0)))

    def counted(x):
        spent.append(len(seen))
        seen.clear()
        return distance(x)

    fitted(nfe=4, tries=57, reverse=reverse, by=counted)
    assert max(spent) == 4


def test_a_distance_that_is_never_finite_is_rejected():
    with pytest.raises(ValueError, match="distance must be finite for some samples"):
        fitted(tries=51, by=lambda _: math.nan)


def test_settings_no_better_in_the_mean_of_eight_new_sets_are_not_taken(monkeypatch):
    first = recommend(process(), 2, shape=SHAPE[1:])
    # The search finds smaller distances, and so do the first and the last new set, by chance.
    lucky = {0: 0.5, 1: 0.1, 8: 0.1}

    def by_chance(search, settings, seed, bar):
        search.tries += 1
        return 1.0 if settings == first else lucky.get(seed, 2.0)

    monkeypatch.setattr(fitting.Search, "_distance", by_chance)
    assert fitted(tries=51) == first


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"pip install 'cldsde\[tune\]'"):
        fitted()
