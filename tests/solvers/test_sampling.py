"""`cldsde.sample`: samples in one call."""

import dataclasses
import math
from functools import partial

import pytest
import torch

import cldsde
from cldsde import CLD, HOLD, VPSDE, DenoiserScore, LinearSDE, solvers
from cldsde.linear.kappa import vp_time
from cldsde.score import ConditionalScore, Observation, PosteriorScore, ReverseProcess
from cldsde.solvers import SampleNoise
from cldsde.solvers.recommended import recommended_plan, resolved, window
from probes import Recording, generator, hidden_times, tensor
from score.cases import TWO as DATA
from score.cases import UNDERDAMPED, normal_denoiser
from tolerances import rounding, standard_error

PROCESSES = {
    "VP": VPSDE,
    "VE": cldsde.VESDE,
    "CLD": CLD,
    "PSLD": cldsde.PSLD,
    "HOLD": HOLD,
    "rectified flow": cldsde.RectifiedFlow,
    "matrices": lambda: LinearSDE.from_matrices(
        [[-1, 1, 0], [0, -1, 1], [0, 0, -1]], [[0], [0], [1]], (0.1, 20)
    ),
}
# κ that CMA-ES found for five evaluations of a CLD network of Fashion-MNIST.
FITTED = (-3.0, -1.35, -0.33, 0.6, 2.35)
# A few evaluations of float32 scores.
SINGLE = {"rtol": rounding(100, dtype=torch.float32), "atol": rounding(100, dtype=torch.float32)}


def moments():
    mean = DATA.weights @ DATA.means
    second = torch.einsum(
        "n,nij->ij", DATA.weights, DATA.covariances + DATA.means[:, :, None] * DATA.means[:, None]
    )
    return mean, second - mean[:, None] * mean


def check_moments(x):
    (mean, covariance), relative = moments(), standard_error(1.0, len(x))
    assert ((x.mean(0) - mean).abs() <= relative * covariance.diagonal().sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert ((products.mean(0) - covariance).abs() <= relative * products.std(0)).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", PROCESSES)
def test_moments_are_exact_at_sixty_evaluations(name):
    sde = PROCESSES[name]()
    x = cldsde.sample(sde, DATA.score(sde), (2000, 2), nfe=60, dtype=torch.float64)
    assert (x.dtype, x.shape) == (torch.float64, (2000, 2))
    check_moments(x)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("nfe", [5, 6, 7, 9, 10, 20])
def test_evaluations_keep_the_budget_and_the_window_of_levels(name, nfe):
    sde = PROCESSES[name]()
    score = Recording(DATA.score(sde))
    cldsde.sample(sde, score, (3, 2), nfe=nfe)
    assert score.calls == nfe
    levels = sde.kappa(torch.cat(score.times).double().clamp_max(1.0))
    rounded = 1e-3  # times in float32: 6e-8 of t, where kappa changes by 1e4 per unit of t
    single = sde.components == 1
    first = -3.0 if nfe <= 6 and not single else -3.3
    last = 1.7 if nfe <= 6 - single else (2.6 if single else 3.0) if nfe <= 9 else 3.3
    assert levels.min() == pytest.approx(max(first, float(sde.kappa(1.0))), abs=rounded)
    assert levels.max() == pytest.approx(last, abs=rounded)


def test_a_sample_depends_on_its_seed_and_number_alone():
    sde = CLD()
    score = DATA.score(sde)
    before = torch.random.get_rng_state()
    many = cldsde.sample(sde, score, (10, 2), nfe=5, seed=3)
    some = cldsde.sample(sde, score, (4, 2), nfe=5, seed=3, batch=3)
    torch.testing.assert_close(some, many[:4], **SINGLE)
    other = cldsde.sample(sde, score, (10, 2), nfe=5, seed=4)
    assert (other != many).all()
    assert torch.equal(before, torch.random.get_rng_state())
    # Seeds that a start of 32 bits, or words without their number, would confuse.
    alike = [cldsde.sample(sde, score, (9, 2), nfe=5, seed=3 + n) for n in (0, 2**32, 2**128)]
    assert len(torch.cat(alike).unique(dim=0)) == 27


def test_a_process_whose_score_does_not_determine_the_data_is_sampled_by_sscs():
    process, regular = (ReverseProcess(sde, DATA.score(sde)) for sde in (UNDERDAMPED, CLD()))
    plan, _ = recommended_plan(process, nfe=20)
    assert (plan.solver, plan.denoise) == (solvers.SSCS(), "step")
    assert resolved(regular, solvers.SSCS()).denoise is True
    # At this end the driven score says nothing about the data.
    times = tensor([1.0, hidden_times(UNDERDAMPED)[0]])
    assert resolved(process, solvers.SSCS(), times).denoise == "step"
    assert resolved(process, None, times).denoise == "step"
    # The bias at 400 steps of order 1 is 0.06 standard deviations, a third of the tolerance.
    check_moments(cldsde.sample(UNDERDAMPED, process.score, (500, 2), nfe=400))


@pytest.mark.parametrize(
    ("name", "nfe", "order", "noise", "variable"),
    [
        *(("VP", nfe, 3, 0.5, "vp_time") for nfe in (5, 9)),
        ("VP", 10, 2, 1.0, "vp_time"),
        ("CLD", 6, 3, 1.0, "vp_time"),
        *(("CLD", nfe, order, 1.0, "time") for nfe, order in ((7, 3), (9, 3), (10, 2))),
    ],
)
def test_order_and_noise_depend_on_evaluations_and_components(name, nfe, order, noise, variable):
    sde = PROCESSES[name]()
    found = solvers.recommend(ReverseProcess(sde, DATA.score(sde)), nfe)
    assert (found.order, found.corrector, found.variable) == (order, order == 2, variable)
    assert (set(found.stochasticity), found.denoise) == ({noise}, True)


@pytest.mark.parametrize(
    ("name", "nfe", "spread"), [("VP", 3, 0.75), ("VP", 5, 1.08), ("CLD", 5, 1.18)]
)
def test_few_evaluations_widen_normal_data_as_documented(name, nfe, spread):
    n, sde = 20_000, PROCESSES[name]()
    score = cldsde.GaussianMixture([1.0], [[0.0]], [[[1.0]]]).score(sde)
    x = cldsde.sample(sde, score, (n, 1), nfe=nfe, seed=0)
    error = 5 * spread / math.sqrt(2 * n) + 0.01  # five standard errors, and rounding to per cents
    assert float(x.std()) == pytest.approx(spread, rel=0, abs=error)


@pytest.mark.parametrize(
    ("name", "nfe"), [("VP", 5), ("VP", 9), ("CLD", 5), ("HOLD", 5), ("rectified flow", 9)]
)
def test_few_evaluations_take_the_fitted_levels(name, nfe):
    sde = PROCESSES[name]()
    times = recommended_plan(ReverseProcess(sde, DATA.score(sde)), nfe=nfe)[0].times
    levels = sde.kappa(times[:: (nfe - 1) // 4])  # nine evaluations have them at every second time
    # Roots of VP's time, as shares of the way from start to end
    expected, found = (
        (roots - roots[0]) / (roots[-1] - roots[0])
        for roots in (vp_time(x).sqrt() for x in (tensor(FITTED), levels))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(2**14))


def test_a_grid_may_end_at_the_data():
    """At t = 0 nothing is left to denoise. 200 steps have a bias of 0.01 standard deviations."""
    sde, times = CLD(), solvers.quadratic_times(1.0, 0.0, 200)
    em = solvers.EulerMaruyama()
    check_moments(cldsde.sample(sde, DATA.score(sde), (2000, 2), times=times, solver=em))


SLOW = LinearSDE.from_matrices([[0, 1], [-4, -1.2]], [[0.5, 0], [0, 1.5]])


LEVELS = (0.02, 14.6)  # of a network
BRIGHTNESS = r"mean of data of shape \(1, 64, 64\) .* 40\.7 or more"


@pytest.mark.parametrize(
    ("sde", "levels", "shape", "message"),
    [
        (SLOW, None, (2,), r"is 0\.8\d+ there, and should be 7\.39 or more\. Use a larger noise"),
        (VPSDE(), (0.002, 0.09), (2,), "the noise does not hide the data"),
        (cldsde.VESDE(1.0, 50.0), None, (2,), "ends at the noise level 1, because process or sc"),
        (CLD(), (0.15, 80.0), (2,), "ends at the noise level 0.15, because process or score"),
        (HOLD(), None, (1, 64, 64), BRIGHTNESS),
        *((sde, LEVELS, (1, 64, 64), BRIGHTNESS) for sde in (CLD(), VPSDE())),
    ],
)
def test_a_process_with_too_little_noise_first_or_too_much_last_is_pointed_out(
    sde, levels, shape, message
):
    score = DenoiserScore(lambda u, sigma: 0 * u, sde, noise_levels=levels)
    with pytest.warns(UserWarning, match=message):
        assert cldsde.sample(sde, score, (1, *shape)).shape == (1, *shape)


def test_dropout_in_training_mode_is_pointed_out():
    class Score(torch.nn.Dropout):
        def forward(self, z, t):
            return -super().forward(z)

    with pytest.warns(UserWarning, match="call its eval"):
        cldsde.sample(VPSDE(), Score(), (2, 3), nfe=3)


def test_an_error_inside_a_denoiser_in_place_of_a_score_says_how_to_wrap_it():
    denoiser = torch.nn.Conv2d(3, 3, 3).forward
    with pytest.raises(RuntimeError, match="conv2d") as raised:
        cldsde.sample(CLD(), lambda x, sigma: denoiser(x), (4, 3, 8, 8))
    (note,) = raised.value.__notes__
    assert "states (4, 2, 3, 8, 8). If it is a denoiser, wrap it: DenoiserScore" in note


def allocate_too_much(z, t):
    torch.empty(2**57, dtype=torch.uint8)


def fail(error):
    def score(z, t):
        raise error

    return score


TOO_LARGE = {
    "CPU": (allocate_too_much, "DefaultCPUAllocator"),
    "GPU": (fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), "2 GiB"),
    "driver": (fail(RuntimeError("CUDA error: out of memory")), "CUDA error"),
    "cuBLAS": (fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")), "CUBLAS"),
}


@pytest.mark.parametrize("device", TOO_LARGE)
def test_an_error_of_memory_inside_a_score_says_nothing_of_denoisers(device):
    score, message = TOO_LARGE[device]
    with pytest.raises(RuntimeError, match=message) as raised:
        cldsde.sample(CLD(), score, (4, 3, 8, 8))
    assert not hasattr(raised.value, "__notes__")


VARIANCES = torch.logspace(-3, 1, 4, dtype=torch.float64)
SEEN = torch.linspace(-2, 2, 4, dtype=torch.float64).unsqueeze(1)


def by_condition(sde, rows):
    return ConditionalScore(DenoiserScore(normal_denoiser, sde), variance=VARIANCES[rows])


def by_place(sde, rows):
    """A function that takes the variance of a sample from its place in the batch."""
    return DenoiserScore(lambda u, s: normal_denoiser(u, s, VARIANCES[rows][: len(u)]), sde)


def by_observation(sde, rows):
    base = DenoiserScore(partial(normal_denoiser, variance=tensor(1.0)), sde)
    return PosteriorScore(base, Observation(lambda x: x, SEEN[rows], 0.1, (1,)))


OWN_TIMES = {
    "flow": (solvers.ProbabilityFlow(pace="sample", rtol=1e-3, atol=1e-3), CLD()),
    "Gotta Go Fast": (solvers.GottaGoFast(rtol=0.1, atol=0.05), VPSDE()),
}


@pytest.mark.parametrize("known", [by_condition, by_place, by_observation])
@pytest.mark.parametrize("name", OWN_TIMES)
def test_samples_with_times_of_their_own_keep_what_is_known_of_each(name, known):
    solver, sde = OWN_TIMES[name]

    def solved(rows, solver=solver):
        noise, process = SampleNoise(rows), ReverseProcess(sde, known(sde, rows))
        start = noise.start(sde, (1,), dtype=torch.float64)
        ends = tensor([1.0, 1e-2])
        return solvers.solve(process, solver, start, ends, noise=noise, denoise=True, warn=False)

    found, alone = solved(range(4)), [solved([i]) for i in range(4)]
    counts = [one.nfev for one in alone]
    assert found.success
    assert found.stats["nfev"].tolist() == counts
    assert len(set(counts)) > 1
    # Rounding grows along some dozens of steps.
    close = {"rtol": 0, "atol": rounding(2**20)}
    torch.testing.assert_close(found.data, torch.cat([one.data for one in alone]), **close)
    # Samples that fail keep their places, too.
    most = max(counts) - 2
    short = solved(range(4), dataclasses.replace(solver, max_nfev=most))
    arrived = torch.tensor([count - 1 <= most for count in counts])
    assert torch.equal(short.stats["success"], arrived)
    assert 0 < arrived.sum() < 4
    torch.testing.assert_close(short.data[arrived], found.data[arrived], **close)


KNOWN = torch.randn(10, 3, generator=generator())


@pytest.mark.parametrize(
    "mask", [torch.tensor([True, False, True]), KNOWN > 0], ids=["one", "each"]
)
def test_conditions_and_known_data_of_a_sample_follow_it_into_its_batch(mask):
    base = DenoiserScore(normal_denoiser, CLD())
    score = ConditionalScore(base, variance=torch.linspace(0.1, 4, 10))
    options = {"nfe": 3, "solver": solvers.Imputation(solvers.SSCS(), KNOWN, mask)}
    whole = cldsde.sample(CLD(), score, (10, 3), **options)
    parts = cldsde.sample(CLD(), score, (10, 3), batch=6, **options)
    torch.testing.assert_close(parts, whole, **SINGLE)


def test_processes_of_one_component_have_the_samples_of_vp():
    """They differ in clock and scale alone.

    Times of κ = −5 have few digits of 1 − t under rectified flow, and each step carries them on.
    """
    denoiser = partial(normal_denoiser, variance=tensor(0.25))
    found = [
        cldsde.sample(sde, DenoiserScore(denoiser, sde), (50, 2), dtype=torch.float64)
        for sde in (VPSDE(), cldsde.VESDE(), cldsde.RectifiedFlow())
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=rounding(2**30))


def brightness_ratio(sde, D, brightness, count):
    """Standard deviation of the mean of an image of D pixels, by its exact value.

    All directions of Gaussian data are independent: one number with the variance of the mean
    direction has the distribution of √D times the mean.
    """
    strong = 1 + brightness**2 * (D - 1)
    process = ReverseProcess(
        sde, DenoiserScore(lambda u, s: u * (strong / (strong + s.square().unsqueeze(1))), sde)
    )
    plan, _ = recommended_plan(process, shape=(1, D))
    noise = solvers.FreshNoise(generator())
    like = torch.empty(count, sde.components, 1, dtype=torch.float64)
    initial = sde.initial_covariance.clone()
    # Variance of the start of `sample` in this direction, see `SampleNoise.start`.
    initial[0, 0] += 1 - 0.52**2 + 0.52**2 * D
    root = sde.marginal(float(plan.times[0]), initial).root
    start = torch.einsum("ij,bjd->bid", root, noise.normal(like, sde.components))
    x = plan.solve(start, noise=noise).data
    return float(x.std()) / strong**0.5


# The promises for the standard deviation of the mean. The start has a brightness of .52: data with
# another one lose accuracy, as the page on solvers says.
PROMISES = [(0.5, 0.03), (0.25, 0.09), (0.7, 0.13)]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["CLD", "VP", "rectified flow"])
@pytest.mark.parametrize("side", [16, 64, 256])
@pytest.mark.parametrize(("brightness", "promise"), PROMISES)
def test_large_images_keep_their_brightness(name, side, brightness, promise):
    count = 20_000
    error = abs(brightness_ratio(PROCESSES[name](), side**2, brightness, count) - 1)
    # An estimate from n samples has a standard error of 1/√(2n).
    assert error < promise + standard_error(1.0, 2 * count, 2.0)


@pytest.mark.parametrize("nfe", [5, 10])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 32)])
def test_small_images_with_few_evaluations_start_as_small_data(shape, nfe):
    """More noise than κ = −3.3 would take steps away from what they need."""
    start = window(ReverseProcess(CLD(), DATA.score(CLD())), shape=shape, nfe=nfe)[0]
    # For 3 × 32 × 32 and 10 evaluations it is −½ log(3072/4).
    expected = min(-3.3, -0.5 * math.log(math.prod(shape) * nfe / 40))
    assert CLD().kappa(start) == pytest.approx(expected, abs=rounding(2**14))
