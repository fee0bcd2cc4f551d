"""Streams of noise for each sample: the same bits in any company, and normal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats

from cldsde import CLD, HOLD, VESDE, VPSDE, LinearSDE, ReverseProcess, solvers
from cldsde.solvers import SampleNoise
from cldsde.solvers.authoring import Solver, Stages
from score import exact

MULTISTEP = solvers.ExponentialMultistep
SOLVERS: dict[str, Solver] = {
    "EM": solvers.EulerMaruyama(),
    "SSCS, euler": solvers.SSCS(),
    "SSCS, midpoint": solvers.SSCS(score_step="midpoint"),
    "SSCS, gaussian": solvers.SSCS(score_step="gaussian", data_variance=0.5),
    "Heun": solvers.StochasticHeun(),
    "exponential Euler": solvers.ExponentialEuler(),
    "ancestral": solvers.Ancestral(),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "multistep": MULTISTEP(order=3),
    "multistep, stochastic": MULTISTEP(order=2, stochasticity=1.0),
    "multistep, corrector": MULTISTEP(order=2, stochasticity=0.5, corrector=True),
    "multistep, noise": MULTISTEP(order=2, prediction="noise"),
    "PC": solvers.PredictorCorrector(solvers.ReverseDiffusion(), solvers.Langevin(steps=2)),
}
FAMILIES: dict[str, Any] = {"VP": VPSDE, "CLD": CLD}
SEEDS = [11, 3, 2**31, 0, 5, 8, 13]
GRID = solvers.root_times(1.0, 1e-2, 6)

every_solver = pytest.mark.parametrize("method", list(SOLVERS))
every_family = pytest.mark.parametrize("name", list(FAMILIES))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def elementwise(sde: LinearSDE) -> Any:
    driven = list(sde.driven)
    return lambda z, t: -(z[:, driven] + 0.1 * z[:, driven].sin())


def of_mixture(sde: LinearSDE) -> Any:
    return exact.mixture().score(sde)


class Own(solvers.NoiseSource):
    """A user's source: returns what it was made with."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def normal(self, z: torch.Tensor, rows: int) -> Any:
        return self.draw


@pytest.mark.parametrize("score", [elementwise, of_mixture])
@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (
            torch.zeros(1, 1, 2),
            ValueError,
            r"must return shape \(3, 1, 2\) on cpu; got \(1, 1, 2\)",
        ),
        (
            torch.zeros(3, 2, 2),
            ValueError,
            r"must return shape \(3, 1, 2\) on cpu; got \(3, 2, 2\)",
        ),
        (torch.zeros(3, 1, 2, device="meta"), ValueError, r"on cpu; got \(3, 1, 2\) on meta"),
        (torch.zeros(3, 1, 2).double(), TypeError, "tensor of torch.float32; got torch.float64"),
        (None, TypeError, "tensor of torch.float32; got NoneType"),
    ],
)
def test_what_somebody_s_source_draws_is_looked_at(
    draw: Any, error: type[Exception], message: str, score: Any
) -> None:
    process, z = ReverseProcess(CLD(), score(CLD())), torch.zeros(3, 2, 2)
    with pytest.raises(error, match=message):
        solvers.solve(process, solvers.EulerMaruyama(), z, GRID, noise=Own(draw))


def test_seeds_mean_the_same_whatever_torch_makes_by_default() -> None:
    wanted = SampleNoise(SEEDS).start(CLD(), (3,))
    torch.set_default_dtype(torch.float64)
    try:
        found = SampleNoise(SEEDS).start(CLD(), (3,), dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("nothing", [None, [[[], []]] * (len(GRID) - 1)], ids=["none", "columns"])
def test_an_affine_solver_may_draw_nothing(nothing: Any) -> None:
    class Still(solvers.EulerMaruyama):
        def prepare(self, process: ReverseProcess, times: torch.Tensor) -> Stages:
            (stage,) = super().prepare(process, times).stages
            return Stages.of(stage._replace(noise=nothing))

    process, z = ReverseProcess(CLD(), elementwise(CLD())), torch.ones(3, 2, 2)
    found = solvers.solve(process, Still(), z, GRID, noise=Own(None)).state
    zero = Own(torch.zeros(3, 1, 2))
    assert torch.equal(
        found, solvers.solve(process, solvers.EulerMaruyama(), z, GRID, noise=zero).state
    )


def test_a_batch_of_another_size_is_refused_before_a_score_is_asked_for() -> None:
    def untouchable(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        pytest.fail("the score was asked")

    process, z = ReverseProcess(CLD(), untouchable), torch.zeros(3, 2, 2)
    for solver in SOLVERS.values():
        with pytest.raises(ValueError, match="one seed per sample, 3; got 7 seeds"):
            solvers.solve(process, solver, z, GRID, noise=SampleNoise(SEEDS))


def sample(
    sde: LinearSDE,
    score: Any,
    method: str,
    seeds: list[int],
    shape: tuple[int, ...] = (3, 5),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    noise = SampleNoise(seeds)
    state = noise.start(sde, shape, dtype=dtype)
    solution = solvers.solve(
        ReverseProcess(sde, score), SOLVERS[method], state, GRID, noise=noise, denoise=True
    )
    assert solution.success
    return solution.data


class TestCompany:
    """A sample is that of its seed, alone and in any batch."""

    @every_dtype
    @every_solver
    @every_family
    def test_bits_depend_on_no_other_sample(
        self, name: str, method: str, dtype: torch.dtype
    ) -> None:
        sde = FAMILIES[name]()
        score = elementwise(sde)
        together = sample(sde, score, method, SEEDS, dtype=dtype)
        for chosen in ([2], [6], [4, 0], [6, 5, 4, 3, 2, 1, 0], [1, 3, 5, 1]):
            other = sample(sde, score, method, [SEEDS[i] for i in chosen], dtype=dtype)
            assert torch.equal(other, together[chosen])

    @every_solver
    @every_family
    def test_a_mixture_score_changes_no_more_than_rounding(self, name: str, method: str) -> None:
        # Its matrix products may sum in another order for another batch.
        sde = FAMILIES[name]()
        score = exact.mixture().score(sde)
        options: dict[str, Any] = {"shape": (2,), "dtype": torch.float64}
        together = sample(sde, score, method, SEEDS, **options)
        for chosen in ([2], [4, 0], [6, 5, 4, 3, 2, 1, 0]):
            other = sample(sde, score, method, [SEEDS[i] for i in chosen], **options)
            # Roundings of a score, 1e-13 of states up to 1e2, that the coarse steps of a mixture
            # may lengthen a hundredfold. They are too long for exponential Euler, whose states
            # reach 1e6: a hundred roundings of these.
            size = float(together.abs().max())
            assert torch.allclose(other, together[chosen], rtol=0, atol=max(1e-9, 1e-14 * size))

    @every_solver
    def test_other_seeds_give_other_samples(self, method: str) -> None:
        sde = CLD()
        together = sample(sde, elementwise(sde), method, [0, 1, 2, 3])
        assert all((together[i] != together[j]).all() for i in range(4) for j in range(i))

    def test_equal_seeds_give_equal_samples(self) -> None:
        sde = CLD()
        together = sample(sde, elementwise(sde), "EM", [4, 4])
        assert torch.equal(together[0], together[1])


class TestStream:
    """Numbers of one seed, however they are asked for."""

    @pytest.mark.parametrize("size", [1, 7, 1000, 4095, 4096, 4097, 8192, 10_000])
    def test_sizes_of_draws_do_not_change_the_stream(self, size: int) -> None:
        total = 20_000
        whole = SampleNoise([3, 4]).normal(torch.zeros(2, 1, total), 1)[:, 0]
        noise = SampleNoise([3, 4])
        draws = [noise.normal(torch.zeros(2, 1, size), 1)[:, 0]]
        more = min(total // size, 50) - 1
        draws += [noise.normal(torch.zeros(2, 1, size), 1)[:, 0] for _ in range(more)]
        stream = torch.cat(draws, dim=1)
        assert torch.equal(stream, whole[:, : stream.shape[1]])

    def test_draws_of_many_sizes_are_one_stream(self) -> None:
        sizes = [4000, 90, 6, 1, 4095, 2, 9000, 3]
        whole = SampleNoise([7]).normal(torch.zeros(1, 1, sum(sizes)), 1)[0, 0]
        noise = SampleNoise([7])
        parts = [noise.normal(torch.zeros(1, 1, size), 1)[0, 0] for size in sizes]
        assert torch.equal(torch.cat(parts), whole)

    def test_rows_and_axes_are_filled_in_order(self) -> None:
        flat = SampleNoise([1, 2]).normal(torch.zeros(2, 1, 24), 1)
        shaped = SampleNoise([1, 2]).normal(torch.zeros(2, 3, 3, 4), 2)
        assert shaped.shape == (2, 2, 3, 4)
        assert torch.equal(shaped.flatten(), flat.flatten())
        assert SampleNoise([1, 2]).normal(torch.zeros(2, 5), 3).shape == (2, 3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_numbers_have_the_type_of_the_state(self, dtype: torch.dtype) -> None:
        draw = SampleNoise([1]).normal(torch.zeros(1, 1, 9, dtype=dtype), 1)
        assert draw.dtype == dtype
        assert torch.equal(draw, SampleNoise([1]).normal(torch.zeros(1, 1, 9), 1).to(dtype))

    def test_draws_are_not_shared(self) -> None:
        noise, twin = SampleNoise([1]), SampleNoise([1])
        z = torch.zeros(1, 1, 5)
        noise.normal(z, 1).zero_()
        twin.normal(z, 1)
        assert torch.equal(noise.normal(z, 1), twin.normal(z, 1))

    @pytest.mark.parametrize("seed", [2**32, 2**33 + 5, 2**63])
    def test_large_seeds_are_refused_or_streams_of_their_own(self, seed: int) -> None:
        # The generator of the host keeps 32 bits of its seed.
        z = torch.zeros(1, 1, 100)
        twin = SampleNoise([seed % 2**32]).normal(z, 1)
        try:
            draw = SampleNoise([seed]).normal(z, 1)
        except ValueError:
            return
        assert (draw != twin).any()

    def test_no_global_generator_is_touched(self) -> None:
        before = torch.random.get_rng_state()
        SampleNoise([1, 2]).start(CLD(), (5000,))
        assert torch.equal(torch.random.get_rng_state(), before)


class TestLaw:
    """Independent standard normals."""

    def test_each_stream_is_normal(self) -> None:
        draws = SampleNoise(list(range(20))).normal(torch.zeros(20, 1, 10_000), 1)[:, 0]
        # One in a hundred thousand for the worst of twenty.
        least = min(stats.kstest(row.double().numpy(), "norm").pvalue for row in draws)
        assert least > 1e-5 / 20

    def test_streams_of_many_seeds_together_are_normal(self) -> None:
        # The first numbers of neighbouring seeds.
        draws = SampleNoise(list(range(5000))).normal(torch.zeros(5000, 1, 3), 1)[:, 0]
        for column in draws.double().numpy().T:
            assert stats.kstest(column, "norm").pvalue > 1e-5 / 3

    def test_samples_and_steps_are_uncorrelated(self) -> None:
        noise, n = SampleNoise(list(range(16))), 4096
        z = torch.zeros(16, 1, n, dtype=torch.float64)
        first, second = noise.normal(z, 1)[:, 0], noise.normal(z, 1)[:, 0]
        rows = torch.cat([first, second])
        for x in (rows, rows.square(), rows.sign()):
            correlation = torch.corrcoef(x) - torch.eye(32)
            # Of 496 pairs none beyond 5 standard errors, n^-1/2.
            assert correlation.abs().max() <= 5 / math.sqrt(n)
        # And along a stream.
        for lag in (1, 2, 4):
            pairs = (rows[:, :-lag] * rows[:, lag:]).mean(1)
            assert pairs.abs().max() <= 5 / math.sqrt(n)

    @pytest.mark.parametrize("make", [VPSDE, lambda: VESDE(0.05, 20.0), CLD, HOLD])
    def test_starts_are_drawn_from_the_prior(self, make: Any) -> None:
        sde, n = make(), 4000
        z = SampleNoise(list(range(n))).start(sde, (2,), dtype=torch.float64)
        assert z.shape == (n, sde.components, 2)
        deviations = sde.prior.covariance.diagonal().sqrt()
        white = z / deviations[:, None]
        for column in white.flatten(1).T:
            assert stats.kstest(column.numpy(), "norm").pvalue > 1e-5 / 6
        correlation = torch.corrcoef(white.flatten(1).T)
        expected = sde.prior.covariance / torch.outer(deviations, deviations)
        expected = torch.kron(expected, torch.eye(2, dtype=torch.float64))
        assert (correlation - expected).abs().max() <= 5 / math.sqrt(n)

    @pytest.mark.parametrize("shape", [(), (3,), (1, 8, 8)])
    @every_dtype
    def test_starts_have_the_shape_and_type_asked_for(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        z = SampleNoise([1, 2]).start(HOLD(), shape, dtype=dtype)
        assert z.shape == (2, 3, *shape)
        assert z.dtype == dtype
        assert SampleNoise([1]).start(CLD(), (2,)).dtype == torch.float32

    def test_numbers_of_the_start_are_not_used_again(self) -> None:
        noise, whole = SampleNoise([5]), SampleNoise([5])
        noise.start(VPSDE(), (4,))
        after = noise.normal(torch.zeros(1, 1, 4), 1).flatten()
        assert torch.equal(after, whole.normal(torch.zeros(1, 1, 8), 1).flatten()[4:])


class TestRefusals:
    """Seeds and batches that do not fit."""

    @pytest.mark.parametrize("seeds", [[], (), [-1], [3, -1]])
    def test_seeds_that_are_negative_or_missing(self, seeds: Any) -> None:
        with pytest.raises(ValueError, match="seeds must be integers in "):
            SampleNoise(seeds)

    @pytest.mark.parametrize("seed", [1.5, "3", True, None, math.nan])
    def test_seeds_that_are_no_integers(self, seed: Any) -> None:
        # 1.2 and 1.7 would silently be one stream.
        with pytest.raises((TypeError, ValueError)):
            SampleNoise([1, seed])

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batches_of_another_size(self, batch: int) -> None:
        with pytest.raises(ValueError, match=f"one seed per sample, {batch}; got 2 seeds"):
            SampleNoise([1, 2]).normal(torch.zeros(batch, 1, 4), 1)

    def test_solving_a_batch_of_another_size(self) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match="one seed per sample, 3; got 2 seeds"):
            solvers.solve(
                ReverseProcess(sde, elementwise(sde)),
                SOLVERS["EM"],
                torch.zeros(3, 2, 4),
                GRID,
                noise=SampleNoise([1, 2]),
            )
