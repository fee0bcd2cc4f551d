"""Noise sources: streams of samples, recorded draws, and sources of users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cldsde import CLD, HOLD, VESDE, VPSDE, GaussianMixture, ReverseProcess, solvers
from cldsde.solvers import SampleNoise
from cldsde.solvers.authoring import Stages
from probes import Smooth, generator, initial, start
from strategies import shapes
from tolerances import rounding, standard_error

SDE = CLD(1.0)
PROCESS = ReverseProcess(SDE, Smooth(SDE))
EM, SSCS = solvers.EulerMaruyama(), solvers.SSCS()
GRID = solvers.root_times(1.0, 0.05, 4)
SEEDS = [11, 3, 2**31, 0, 5, 8, 13]
# Tests of distributions fail for one seed in so many; seeds are fixed.
RARE = 1e-5


class Own(solvers.NoiseSource):
    """A user's source: it returns the draw that it was made with."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def normal(self, z: torch.Tensor, rows: int) -> Any:
        return self.draw


class TestSourcesOfUsers:
    """Draws are checked, because a draw of a wrong shape might be broadcast."""

    @pytest.mark.parametrize(
        ("draw", "error", "message"),
        [
            (torch.zeros(1, 1, 2), ValueError, r"shape \(3, 1, 2\) on cpu; got \(1, 1, 2\)"),
            (torch.zeros(3, 2, 2), ValueError, r"shape \(3, 1, 2\) on cpu; got \(3, 2, 2\)"),
            (torch.zeros(3, 1, 2, device="meta"), ValueError, r"on cpu; got \(3, 1, 2\) on meta"),
            (torch.zeros(3, 1, 2).double(), TypeError, "of torch.float32; got torch.float64"),
            (None, TypeError, "tensor of torch.float32; got NoneType"),
        ],
        ids=str,
    )
    def test_draws_that_do_not_fit_are_rejected(
        self, draw: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            solvers.solve(PROCESS, EM, torch.zeros(3, 2, 2), GRID, noise=Own(draw))

    @pytest.mark.parametrize("nothing", [None, [[[], []]] * 4], ids=["none", "columns"])
    def test_an_affine_solver_may_draw_nothing(self, nothing: Any) -> None:
        class Still(solvers.EulerMaruyama):
            def prepare(self, process: ReverseProcess, times: torch.Tensor) -> Stages:
                (stage,) = super().prepare(process, times).stages
                return Stages.of(stage._replace(noise=nothing))

        z, zero = torch.ones(3, 2, 2), Own(torch.zeros(3, 1, 2))
        found = solvers.solve(PROCESS, Still(), z, GRID, noise=Own(None)).state
        assert torch.equal(found, solvers.solve(PROCESS, EM, z, GRID, noise=zero).state)


def test_fresh_noise_is_the_stream_of_its_generator() -> None:
    noise, g = solvers.FreshNoise(generator(3)), generator(3)
    for z, rows in ((torch.zeros(4, 2, 3), 1), (torch.zeros(5, 1, 2, 2), 2)):
        expected = torch.randn(rows, len(z), *z.shape[2:], generator=g).transpose(0, 1)
        assert torch.equal(noise.normal(z, rows), expected)


class TestRecordedNoise:
    """Draws that are replayed."""

    @pytest.mark.parametrize("solver", [EM, SSCS], ids=repr)
    def test_it_replays_fresh_noise(self, solver: Any) -> None:
        class Recorder(solvers.FreshNoise):
            def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
                draws.append(super().normal(z, rows))
                return draws[-1]

        draws: list[torch.Tensor] = []
        z = start(SDE)
        first = solvers.solve(PROCESS, solver, z, GRID, noise=Recorder(generator())).state
        fresh = solvers.solve(PROCESS, solver, z, GRID, generator=generator()).state
        again = solvers.solve(PROCESS, solver, z, GRID, noise=solvers.RecordedNoise(draws)).state
        assert torch.equal(first, fresh)
        assert torch.equal(first, again)
        # EM draws for the driven component, SSCS for all and once more than it steps.
        shape, number = ((3, 1, 2), 4) if solver == EM else ((3, 2, 2), 5)
        assert [draw.shape for draw in draws] == [shape] * number

    @pytest.mark.parametrize(
        ("draws", "got"),
        [
            ([], r"\d recorded draws"),
            ([torch.zeros(3, 1, 2)] * 3, r"\d recorded draws"),
            ([torch.zeros(3, 2, 2)] * 4, r"\(3, 2, 2\)"),
            ([torch.zeros(2, 1, 2)] * 4, r"\(2, 1, 2\)"),
        ],
        ids=["none", "few", "rows", "samples"],
    )
    def test_a_record_that_does_not_fit_is_rejected(self, draws: Any, got: str) -> None:
        with pytest.raises(ValueError, match=rf"shape \(3, 1, 2\).*; got {got}"):
            solvers.solve(PROCESS, EM, start(SDE), GRID, noise=solvers.RecordedNoise(draws))


class TestStreams:
    """`SampleNoise`: the numbers of one seed, however they are drawn."""

    @given(st.lists(st.integers(1, 9000), min_size=1, max_size=6))
    def test_draws_of_any_sizes_are_one_stream(self, sizes: list[int]) -> None:
        whole = SampleNoise([3, 4]).normal(torch.zeros(2, 1, sum(sizes)), 1)[:, 0]
        noise = SampleNoise([3, 4])
        parts = [noise.normal(torch.zeros(2, 1, size), 1)[:, 0] for size in sizes]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        block = torch.randn(4096, generator=generator(4))  # stored seeds keep their samples
        assert torch.equal(whole[1, :4096], block[: whole.shape[1]])

    @given(shapes(), st.integers(1, 3), st.sampled_from([torch.float16, torch.float64]))
    def test_rows_and_axes_are_filled_in_order(
        self, axes: tuple[int, ...], rows: int, dtype: torch.dtype
    ) -> None:
        found = SampleNoise([1, 2]).normal(torch.zeros(2, 3, *axes, dtype=dtype), rows)
        flat = SampleNoise([1, 2]).normal(torch.zeros(2, 1, found[0].numel()), 1)
        assert found.shape == (2, rows, *axes)
        assert found.dtype == dtype
        assert torch.equal(found.flatten(), flat.to(dtype).flatten())

    def test_draws_are_not_shared_and_the_start_is_the_first(self) -> None:
        noise, twin, z = SampleNoise([5]), SampleNoise([5]), torch.zeros(1, 1, 4)
        noise.start(VPSDE(), (4,)).zero_()
        whole = twin.normal(torch.zeros(1, 1, 8), 1)[..., 4:]
        assert torch.equal(noise.normal(z, 1), whole)

    @pytest.mark.parametrize("axes", [(), (3,), (1, 8, 8)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_starts_are_of_the_kind_asked_for(
        self, axes: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        z = SampleNoise([1, 2]).start(HOLD(), axes, dtype=dtype)
        assert (z.shape, z.dtype) == ((2, 3, *axes), dtype)

    def test_starts_below_the_prior_are_those_of_data_of_variance_one(self) -> None:
        normals = SampleNoise([1]).normal(torch.zeros(1, 3, 4, dtype=torch.float64), 3)
        for t, root in ((0.5, HOLD().marginal(0.5, initial(HOLD(), 1.0)).root), (1.0, None)):
            expected = (HOLD().prior.root if root is None else root) @ normals
            found = SampleNoise([1]).start(HOLD(), (4,), dtype=torch.float64, t=t)
            assert torch.allclose(found, expected, rtol=0, atol=rounding(32, 10.0))

    def test_global_settings_are_neither_used_nor_changed(self) -> None:
        before, wanted = torch.random.get_rng_state(), SampleNoise(SEEDS).start(CLD(), (3,))
        torch.set_default_dtype(torch.float64)
        try:
            found = SampleNoise(SEEDS).start(CLD(), (3,), dtype=torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, wanted)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_equal_seeds_give_equal_samples_and_others_do_not(self) -> None:
        noise = SampleNoise([4, 4, 5])
        one, same, other = solvers.solve(
            PROCESS, EM, noise.start(SDE, (2,)), GRID, noise=noise
        ).state
        assert torch.equal(one, same)
        assert (one != other).all()

    @pytest.mark.parametrize("solver", [EM, solvers.ExponentialMultistep(stochasticity=1.0)])
    def test_a_mixture_score_changes_no_more_than_rounding_with_the_batch(
        self, solver: Any
    ) -> None:
        data = GaussianMixture([1, 1], [[-1.0, 0.3], [0.8, 0.0]], [[[0.1, 0.0], [0.0, 0.1]]] * 2)
        process = ReverseProcess(SDE, data.score(SDE))

        def sample(seeds: list[int]) -> torch.Tensor:
            noise = SampleNoise(seeds)
            z = noise.start(SDE, (2,), dtype=torch.float64)
            return solvers.solve(process, solver, z, GRID, noise=noise).state

        together = sample(SEEDS)
        for chosen in ([2], [4, 0], [6, 5, 4, 3, 2, 1, 0]):
            other = sample([SEEDS[i] for i in chosen])
            # Products of matrices sum in another order; four steps amplify it a thousandfold.
            assert torch.allclose(other, together[chosen], rtol=0, atol=rounding(1e4, 10.0))


class TestDistribution:
    """Independent standard normals."""

    def test_each_stream_is_normal(self) -> None:
        draws = SampleNoise(list(range(20))).normal(torch.zeros(20, 1, 10_000), 1)[:, 0]
        least = min(stats.kstest(row.double().numpy(), "norm").pvalue for row in draws)
        assert least > RARE / 20

    def test_first_numbers_of_neighbouring_seeds_are_normal(self) -> None:
        draws = SampleNoise(list(range(5000))).normal(torch.zeros(5000, 1, 3), 1)[:, 0]
        for column in draws.double().numpy().T:
            assert stats.kstest(column, "norm").pvalue > RARE / 3

    def test_samples_and_steps_are_uncorrelated(self) -> None:
        noise, n = SampleNoise(list(range(16))), 4096
        z = torch.zeros(16, 1, n, dtype=torch.float64)
        rows = torch.cat([noise.normal(z, 1)[:, 0], noise.normal(z, 1)[:, 0]])
        most = standard_error(1.0, n, 5)  # the largest of 496
        for x in (rows, rows.square(), rows.sign()):
            assert (torch.corrcoef(x) - torch.eye(32)).abs().max() <= most
        for lag in (1, 2, 4):
            assert (rows[:, :-lag] * rows[:, lag:]).mean(1).abs().max() <= most

    @pytest.mark.parametrize("make", [lambda: VESDE(0.05, 20.0), CLD, HOLD])
    def test_starts_are_drawn_from_the_prior(self, make: Any) -> None:
        sde, n = make(), 4000
        z = SampleNoise(list(range(n))).start(sde, (2,), dtype=torch.float64)
        white = torch.linalg.solve_triangular(sde.prior.root, z, upper=False).flatten(1).T
        for column in white:
            assert stats.kstest(column.numpy(), "norm").pvalue > RARE / 6
        most = standard_error(1.0, n, 5)
        assert (torch.corrcoef(white) - torch.eye(len(white))).abs().max() <= most


@pytest.mark.parametrize(
    ("seeds", "error"),
    [
        ([], ValueError),
        ([3, -1], ValueError),
        ([2**32], ValueError),
        ([1, 1.5], TypeError),
        ([1, "3"], TypeError),
        ([1, True], TypeError),
        ([1, None], TypeError),
    ],
    ids=str,
)
def test_bad_seeds_are_rejected(seeds: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"seeds must be integers in \[0, 2³²\)"):
        SampleNoise(seeds)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_of_another_size_are_rejected(batch: int) -> None:
    with pytest.raises(ValueError, match=f"one seed per sample, {batch}; got 2 seeds"):
        SampleNoise([1, 2]).normal(torch.zeros(batch, 1, 4), 1)
