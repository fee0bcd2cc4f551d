"""Score matching: targets, their expectations and minimisers, losses, and what is left of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import mpmath as mp
import pytest
import torch
from scipy import integrate

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, SubVPSDE
from cldsde.linear.random import standard_normal
from cldsde.score import Conversion, MixedScore, PerturbedData, optimal_loss, score_matching_loss
from cldsde.score.conversion import Conditioning
from score import exact
from score.exact import EPS, Constant

PROCESSES: dict[str, Callable[[], LinearSDE]] = {
    "VP": VPSDE,
    "sub-VP": SubVPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD": CLD,
    "CLD, underdamped": lambda: CLD(friction=0.5),
    "CLD, position noise": lambda: CLD(position_noise=0.3),
    "PSLD": PSLD,
    "HOLD": HOLD,
    "first of two driven": lambda: LinearSDE.from_matrices(
        [[-1.0, -4.0], [4.0, 0.0]],
        [[8**0.5], [0.0]],
        4.0,
        initial_covariance=[[0.0, 0.0], [0.0, 0.04]],
    ),
    # Moved to the end by a cycle, which is not its own inverse.
    "first two of three driven": lambda: LinearSDE.from_matrices(
        [[-1.0, 1.0, 0.0], [-1.0, -2.0, 1.0], [0.0, -1.0, -1.0]],
        [[1.0, 0.0], [0.5, 2.0], [0.0, 0.0]],
        2.0,
        initial_covariance=[[0.0, 0.0, 0.0], [0.0, 0.04, 0.02], [0.0, 0.02, 0.1]],
    ),
    "first and last driven": lambda: LinearSDE.from_matrices(
        [[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, -1.0, -2.0]],
        [[1.0, 0.5], [0.0, 0.0], [0.5, 2.0]],
        2.0,
        initial_covariance=[[0.0, 0.0, 0.0], [0.0, 0.04, 0.02], [0.0, 0.02, 0.1]],
    ),
}
every_process = pytest.mark.parametrize("name", list(PROCESSES))
# Those in which the driven score determines the data.
determined = pytest.mark.parametrize(
    "name", ["VP", "sub-VP", "VE", "CLD", "PSLD", "HOLD", "first two of three driven"]
)
every_conditioning = pytest.mark.parametrize("conditioning", get_args(Conditioning))
every_time = pytest.mark.parametrize("t", [1e-3, 0.1, 1.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Maps:
    """State and target of one number as linear maps of what they are drawn from.

    z = Z u and target = T u with u = (x_0, the normals of z_0, the normals of z_t), found by
    drawing with unit vectors in place of the normals; covariances are then exact, in 50 digits.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        sde: LinearSDE,
        t: float,
        conditioning: Any,
        prediction: Any = "score",
    ) -> None:
        k = sde.components
        starts = k if conditioning == "all" else 0
        units = torch.eye(1 + starts + k, dtype=torch.float64).unsqueeze(-1)
        draws: Iterator[torch.Tensor] = iter(
            [*([units[:, 1 : 1 + k]] if starts else []), units[:, 1 + starts :]]
        )
        with monkeypatch.context() as patch:
            for module in ("cldsde.linear.kernel", "cldsde.linear.sde"):
                patch.setattr(f"{module}.standard_normal", lambda *_, **__: next(draws))
            pair = PerturbedData.draw(sde, units[:, 0], t, conditioning=conditioning)
        assert next(draws, None) is None
        self.size = len(units)
        self.Z = mp.matrix(pair.z[..., 0].mT.tolist())
        self.T = mp.matrix(pair.target(prediction)[..., 0].mT.tolist())

    def covariance(self, a: Any, b: Any, data_variance: float) -> Any:
        """Of two linear maps of u, for data of the given variance."""
        scale = mp.diag([data_variance] + [1.0] * (self.size - 1))
        return a * scale * b.T

    def best(self, data_variance: float, known: Any = None) -> Any:
        """W of the best linear prediction of the target, W z; or of what else is known."""
        known = self.Z if known is None else known
        cross = self.covariance(self.T, known, data_variance)
        return cross * mp.inverse(self.covariance(known, known, data_variance))


def marginal_score(sde: LinearSDE, t: float, data_variance: float) -> Any:
    """S of the score S z of data N(0, data_variance), driven rows; mpmath."""
    kernel = sde.marginal(t)
    root, psi = mp.matrix(kernel.root.tolist()), mp.matrix(kernel.mean[:, :1].tolist())
    precision = mp.inverse(root * root.T + data_variance * psi * psi.T)
    return -mp.matrix([[precision[i, j] for j in range(sde.components)] for i in sde.driven])


def scaled_condition(sde: LinearSDE, t: float) -> float:
    """Largest condition number of a root, hybrid or denoising, its rows scaled to unit size."""
    roots = torch.stack([sde.marginal(t).root, sde.transition(0.0, t).root])
    return float(torch.linalg.cond(roots / roots.norm(dim=-1, keepdim=True)).max())


def close(found: Any, expected: Any, tolerance: float) -> bool:
    error = max(abs(x) for x in found - expected)
    return bool(error <= tolerance * max(abs(x) for x in expected))


class TestTargets:
    """What is to be learnt at one state."""

    @every_conditioning
    @every_time
    @every_process
    def test_the_target_is_the_gradient_of_the_conditional_density(
        self, name: str, t: float, conditioning: Any
    ) -> None:
        sde, x0 = PROCESSES[name](), data(5, 3)
        pair = PerturbedData.draw(sde, x0, t, conditioning=conditioning, generator=generator())
        # The same draws, one after the other.
        again = generator()
        start = sde.augment(x0, again) if conditioning == "all" else sde.embed(x0)
        assert torch.equal(pair.kernel.sample(start, generator=again), pair.z)
        leaf = pair.z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pair.kernel.log_prob(leaf, start).sum(), leaf)
        expected = gradient[:, list(sde.driven)]
        # The residual is rounded relative to its terms, and whitened twice.
        root = pair.kernel.root
        size = float(pair.z.abs().max() / root.norm(dim=-1).min())
        tolerance = 32 * EPS * (scaled_condition(sde, t) + size) * float(gradient.abs().max())
        assert pair.target().shape == expected.shape == (5, len(sde.driven), 3)
        assert (pair.target() - expected).abs().max() <= tolerance

    @every_conditioning
    @every_time
    @every_process
    def test_the_noise_is_that_of_the_target(self, name: str, t: float, conditioning: Any) -> None:
        sde = PROCESSES[name]()
        pair = PerturbedData.draw(
            sde, data(4, 2), t, conditioning=conditioning, generator=generator()
        )
        convert = Conversion.at(sde, t, "score", "noise", conditioning=conditioning)
        assert torch.equal(pair.target("noise"), pair.noise)
        # There and back by one triangular matrix.
        tolerance = 32 * EPS * scaled_condition(sde, t) * float(pair.noise.abs().max())
        assert (convert(pair.z, pair.target()) - pair.noise).abs().max() <= tolerance
        assert pair.target("data") is pair.x0

    @every_conditioning
    @every_process
    def test_the_noise_is_standard_normal(self, name: str, conditioning: Any) -> None:
        n, sde = 20_000, PROCESSES[name]()
        pair = PerturbedData.draw(
            sde, data(n), 0.2, conditioning=conditioning, generator=generator()
        )
        covariance = pair.noise.mT @ pair.noise / n
        # 5 standard errors of a second moment of normals, sqrt(2/n) and less.
        eye = torch.eye(len(sde.driven), dtype=torch.float64)
        assert (covariance - eye).abs().max() <= 5 * math.sqrt(2 / n)
        assert pair.noise.mean(0).abs().max() <= 5 / math.sqrt(n)

    @every_conditioning
    @every_process
    def test_the_state_is_that_of_perturb(self, name: str, conditioning: Any) -> None:
        sde, x0 = PROCESSES[name](), data(4, 3)
        pair = PerturbedData.draw(sde, x0, 0.3, conditioning=conditioning, generator=generator())
        z, epsilon = sde.perturb(x0, 0.3, conditioning=conditioning, generator=generator())
        assert torch.equal(pair.z, z)
        if sde.driven == tuple(range(sde.components - len(sde.driven), sde.components)):
            assert torch.equal(pair.noise, epsilon[:, list(sde.driven)])

    @pytest.mark.parametrize("t", [0.02, 0.3, 1.0])
    @every_process
    def test_the_denoising_target_averages_to_the_hybrid_one(
        self, name: str, t: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # E[denoising target | z_t, x_0], the best linear prediction from the two, is the hybrid
        # target -Sigma^-1 (z - psi x_0), driven rows: no more depends on the data's law.
        sde = PROCESSES[name]()
        maps = Maps(monkeypatch, sde, t, "all")
        with mp.workdps(exact.DIGITS):
            known = mp.matrix(sde.components + 1, maps.size)
            known[0, 0] = 1
            known[1:, :] = maps.Z
            found = maps.best(1.0, known)
            S, psi = marginal_score(sde, t, 0.0), mp.matrix(sde.marginal(t).mean[:, :1].tolist())
            expected = mp.matrix(len(sde.driven), sde.components + 1)
            expected[:, 0], expected[:, 1:] = -S * psi, S
            # Kernels with and without the initial covariance agree to 1e-12, and inverses of the
            # covariance amplify that by its condition number, rows scaled to unit size.
            assert close(found, expected, 1e-12 * scaled_condition(sde, t) ** 2)

    @every_conditioning
    @pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
    @pytest.mark.parametrize("t", [0.02, 0.3, 1.0])
    @every_process
    def test_the_best_prediction_of_either_target_is_the_score_of_the_marginal(
        self,
        name: str,
        t: float,
        variance: float,
        conditioning: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sde = PROCESSES[name]()
        maps = Maps(monkeypatch, sde, t, conditioning)
        with mp.workdps(exact.DIGITS):
            found, expected = maps.best(variance), marginal_score(sde, t, variance)
            # As above.
            assert close(found, expected, 1e-12 * scaled_condition(sde, t) ** 2)

    @every_conditioning
    @every_process
    def test_least_squares_on_a_sample_finds_the_score(self, name: str, conditioning: Any) -> None:
        sde, t, variance, n = PROCESSES[name](), 0.2, 0.25, 20_000
        x0 = math.sqrt(variance) * data(n)
        pair = PerturbedData.draw(sde, x0, t, conditioning=conditioning, generator=generator())
        target = pair.target()
        gram = pair.z.mT @ pair.z
        W = torch.linalg.solve(gram, pair.z.mT @ target).mT
        residual = (target - pair.z @ W.mT).square().mean(0)
        # Least squares with homoscedastic normal errors: Cov of a row is residual gram^-1.
        error = (residual[:, None] * torch.linalg.inv(gram).diagonal()).sqrt()
        with mp.workdps(exact.DIGITS):
            rows = [float(x) for x in marginal_score(sde, t, variance)]
        expected = torch.tensor(rows, dtype=torch.float64).reshape(W.shape)
        # 5 standard errors.
        assert ((W - expected).abs() <= 5 * error).all()
        assert error.max() <= 0.1 * expected.abs().max()


class TestLosses:
    """The loss of one function, however it is represented and weighted."""

    MIXTURE = GaussianMixture([0.4, 0.6], [[-1.0], [1.5]], [[[0.1]], [[0.3]]])

    @every_conditioning
    @pytest.mark.parametrize("weighting", ["reweighted", "likelihood", lambda t: 1 + t])
    @determined
    def test_a_function_has_one_loss_in_all_its_forms(
        self, name: str, weighting: Any, conditioning: Any
    ) -> None:
        sde = PROCESSES[name]()
        t = torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=torch.float64)
        x0 = data(4, 1)
        score = self.MIXTURE.score(sde)

        def model(prediction: Any) -> Any:
            def function(z: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
                if prediction == "score":
                    return score(z, times)
                if prediction == "data":
                    return self.MIXTURE.posterior_mean(sde, z, times)
                convert = Conversion.at(sde, times, "score", "noise", conditioning=conditioning)
                return convert(z, score(z, times))

            return function

        def loss(prediction: Any) -> torch.Tensor:
            return score_matching_loss(
                model(prediction),
                sde,
                x0,
                t,
                prediction=prediction,
                conditioning=conditioning,
                weighting=weighting,
                generator=generator(),
            )

        expected = loss("score")
        assert expected.shape == (4,)
        for prediction in ("noise", "data"):
            found = loss(prediction)
            for i, single in enumerate(t.tolist()):
                # Noises agree to the rounding of a score; errors are squared, and a small one is
                # the difference of two noises of size 4.
                lost = 16 * exact.rounding(sde, single) * scaled_condition(sde, single)
                assert abs(found[i] - expected[i]) <= lost * (1 + float(expected[i])) + 1e-12

    @every_conditioning
    @pytest.mark.parametrize("axes", [(), (3,), (2, 3)])
    @every_process
    def test_likelihood_weights_measure_the_error_that_noise_sees(
        self, name: str, axes: Any, conditioning: Any
    ) -> None:
        sde, t = PROCESSES[name](), torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
        pair = PerturbedData.draw(
            sde, data(4, *axes), t, conditioning=conditioning, generator=generator()
        )
        error = data(4, len(sde.driven), *axes, seed=3)
        found = pair.loss(pair.target() + error, "score", weighting="likelihood")
        G = sde.diffusion(t)[:, list(sde.driven)]
        pulled = torch.einsum("bir,bi...->br...", G, error)
        dimensions = math.prod(axes)
        expected = 0.5 * pulled.square().flatten(1).sum(1) / dimensions
        # The error is what is left of target + error, and goes through L_dd and back.
        for i, single in enumerate(t.tolist()):
            size = float(pair.target()[i].abs().max() / error[i].abs().min())
            tolerance = 64 * EPS * scaled_condition(sde, single) * (1 + size)
            assert found[i].item() == pytest.approx(expected[i].item(), rel=tolerance)

    @every_process
    def test_reweighted_is_the_mean_squared_noise(self, name: str) -> None:
        sde = PROCESSES[name]()
        pair = PerturbedData.draw(sde, data(4, 3), torch.rand(4) / 2 + 0.1, generator=generator())
        output = data(4, len(sde.driven), 3, seed=1)
        expected = (output - pair.noise).square().mean((1, 2))
        # One sum, perhaps in another order.
        assert torch.allclose(pair.loss(output), expected, rtol=16 * EPS, atol=0)

    def test_a_function_of_time_weighs_the_reweighted_loss(self) -> None:
        sde, t = CLD(), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
        pair = PerturbedData.draw(sde, data(3, 2), t, generator=generator())
        output = torch.zeros_like(pair.noise)
        expected = (t**2 + 1) * pair.loss(output)
        assert torch.equal(pair.loss(output, weighting=lambda t: t**2 + 1), expected)

    def test_a_weighting_gets_a_batch_of_times(self) -> None:
        # `Weighting`: a function of float64 times (n,) to (n,), such as a model's own variance.
        sde = CLD()
        model = MixedScore(Constant(sde), sde, torch.zeros(()), torch.ones(()))

        def weighting(t: torch.Tensor) -> torch.Tensor:
            return 1 / model.residual_variance(t)

        pair = PerturbedData.draw(sde, data(3, 2), 0.3, generator=generator())
        found = pair.loss(torch.zeros_like(pair.noise), weighting=weighting)
        one = weighting(torch.tensor([0.3], dtype=torch.float64))
        # One product.
        expected = one * pair.loss(torch.zeros_like(pair.noise))
        assert torch.allclose(found, expected, rtol=4 * EPS, atol=0)

    @pytest.mark.parametrize("weighting", ["reweighted", "likelihood"])
    @every_conditioning
    def test_single_precision_stays_single_precision(
        self, weighting: Any, conditioning: Any
    ) -> None:
        for make in PROCESSES.values():
            sde = make()
            x0 = data(3, 2).float()
            pair = PerturbedData.draw(sde, x0, 0.3, conditioning=conditioning)
            assert pair.z.dtype == pair.noise.dtype == pair.target().dtype == torch.float32
            assert pair.t.dtype == torch.float64
            for prediction in ("score", "noise", "data"):
                output = torch.zeros_like(pair.target(prediction))
                loss = pair.loss(output, prediction, weighting=weighting)
                assert loss.dtype == torch.float32
                assert loss.shape == (3,)

    @every_conditioning
    @every_process
    def test_a_seed_decides_the_loss(self, name: str, conditioning: Any) -> None:
        sde, x0 = PROCESSES[name](), data(3, 2)
        t = torch.tensor([0.1, 0.5, 0.9])

        def loss(seed: int) -> torch.Tensor:
            return score_matching_loss(
                lambda z, t: z[:, : len(sde.driven)],
                sde,
                x0,
                t,
                conditioning=conditioning,
                generator=generator(seed),
            )

        assert torch.equal(loss(0), loss(0))
        assert not torch.equal(loss(0), loss(1))

    def test_the_model_gets_one_time_a_sample_in_the_dtype_of_the_data(self) -> None:
        seen = []

        def model(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(t)
            return z[:, 1:]

        score_matching_loss(model, CLD(), data(3, 2).float(), 0.25)
        t = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
        score_matching_loss(model, CLD(), data(3, 2), t)
        assert seen[0].tolist() == [0.25] * 3
        assert seen[0].dtype == torch.float32
        assert torch.equal(seen[1], t)

    def test_gradients_reach_the_model(self) -> None:
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        for prediction in ("score", "noise", "data"):

            def model(z: torch.Tensor, t: torch.Tensor, kind: str = prediction) -> torch.Tensor:
                return weight * (z[:, 0] if kind == "data" else z[:, 1:])

            loss = score_matching_loss(model, CLD(), data(3, 2), 0.3, prediction=prediction)
            (slope,) = torch.autograd.grad(loss.sum(), weight)
            assert slope.isfinite()
            assert slope != 0


def closed_form(sde: LinearSDE, t: float, variance: float, conditioning: str) -> float:
    """1/2 tr G^T (Sigma_cond^-1 - Sigma_ref^-1) G in 50 digits, a likelihood-weighted loss."""
    with mp.workdps(exact.DIGITS):
        kernel = sde.marginal(t) if conditioning == "data" else sde.transition(0.0, t)
        root, psi = mp.matrix(kernel.root.tolist()), mp.matrix(kernel.mean.tolist())
        start = mp.zeros(sde.components)
        if conditioning == "all":
            own = mp.matrix(sde.initial_root.tolist())
            start = own * own.T
        start[0, 0] += variance
        sigma = root * root.T
        G = mp.matrix(sde.diffusion(t).tolist())
        gap = mp.inverse(sigma) - mp.inverse(sigma + psi * start * psi.T)
        product = G.T * gap * G
        return float(sum(product[i, i] for i in range(product.rows)) / 2)


class TestOptimalLoss:
    """What the best score leaves on Gaussian data."""

    @pytest.mark.parametrize("variance", [0.25, 1.0, 9.0])
    @pytest.mark.parametrize("t", [1e-6, 1e-4, 0.01, 0.3, 1.0])
    @every_process
    def test_hybrid_likelihood_is_the_closed_form(
        self, name: str, t: float, variance: float
    ) -> None:
        sde = PROCESSES[name]()
        with mp.workdps(exact.DIGITS):
            kernel = sde.marginal(t)
            root, psi = mp.matrix(kernel.root.tolist()), mp.matrix(kernel.mean[:, :1].tolist())
            solved = mp.inverse(root * root.T) * psi
            pulled = mp.matrix(sde.diffusion(t).mT.tolist()) * solved
            power = (psi.T * solved)[0]
            expected = float(variance * sum(x**2 for x in pulled) / (1 + variance * power) / 2)
        found = float(optimal_loss(sde, t, data_variance=variance, weighting="likelihood"))
        # Two triangular solves, squared.
        tolerance = min(1e-9, 128 * EPS * scaled_condition(sde, t))
        assert found == pytest.approx(expected, rel=tolerance)
        # The determinant lemma: the two closed forms are one.
        assert expected == pytest.approx(closed_form(sde, t, variance, "data"), rel=1e-15)

    @pytest.mark.parametrize("variance", [0.25, 1.0, 9.0])
    @pytest.mark.parametrize("t", [1e-6, 1e-4, 0.01, 0.3, 1.0])
    @every_process
    def test_denoising_likelihood_is_the_gap_of_two_precisions(
        self, name: str, t: float, variance: float
    ) -> None:
        sde = PROCESSES[name]()
        found = optimal_loss(
            sde, t, data_variance=variance, conditioning="all", weighting="likelihood"
        )
        expected = closed_form(sde, t, variance, "all")
        # Driven rows are whitened by what is left of them given the others, whose own signal is
        # larger by the ratio of their standard deviations, at most h^-1 = 1e6 here.
        kernel = sde.transition(0.0, t)
        rows = kernel.root.norm(dim=-1)
        ratio = float(rows.max() / rows.min())
        tolerance = 128 * EPS * (scaled_condition(sde, t) + ratio)
        assert float(found) == pytest.approx(expected, rel=min(1e-9, tolerance))

    @every_conditioning
    @pytest.mark.parametrize("t", [0.02, 0.3, 1.0])
    @every_process
    def test_it_is_what_the_best_prediction_leaves_open(
        self, name: str, t: float, conditioning: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde, variance, d = PROCESSES[name](), 0.5, len(PROCESSES[name]().driven)
        maps = Maps(monkeypatch, sde, t, conditioning, "noise")
        with mp.workdps(exact.DIGITS):
            left = maps.T - maps.best(variance) * maps.Z
            covariance = maps.covariance(left, left, variance)
            expected = float(sum(covariance[i, i] for i in range(d)) / d)
        found = optimal_loss(sde, t, data_variance=variance, conditioning=conditioning)
        # Its own unit variance, less what is explained.
        tolerance = 128 * EPS * scaled_condition(sde, t) ** 2
        assert float(found) == pytest.approx(expected, abs=tolerance)

    @every_conditioning
    @pytest.mark.parametrize("weighting", ["reweighted", "likelihood"])
    @every_process
    def test_the_exact_score_attains_it(self, name: str, weighting: Any, conditioning: Any) -> None:
        sde, n, variance = PROCESSES[name](), 20_000, 0.25
        law = GaussianMixture([1.0], [[0.3]], [[[variance]]])
        x0 = law.sample(n, generator=generator(1), dtype=torch.float64)
        for t in (0.01, 0.3):
            loss = score_matching_loss(
                law.score(sde),
                sde,
                x0,
                t,
                conditioning=conditioning,
                weighting=weighting,
                generator=generator(2),
            )
            expected = optimal_loss(
                sde, t, data_variance=variance, conditioning=conditioning, weighting=weighting
            )
            # 5 standard errors, from the sample's own variance.
            assert abs(loss.mean() - expected) <= 5 * loss.std() / math.sqrt(n)

    @every_conditioning
    @pytest.mark.parametrize("t_min", [1e-5, 1e-3])
    @every_process
    def test_it_integrates_to_the_information_lost(
        self, name: str, t_min: float, conditioning: Any
    ) -> None:
        sde, variance = PROCESSES[name](), 0.5

        def loss(u: float) -> float:
            t = min(math.exp(u), 1.0)
            value = optimal_loss(
                sde, t, data_variance=variance, conditioning=conditioning, weighting="likelihood"
            )
            return t * float(value)

        def information(t: float) -> float:
            """H = 1/2 log(det Sigma_ref / det Sigma_cond), 1/2 log(1 + s^2 I) given the data."""
            start = sde.initial_covariance.clone()
            start[0, 0] += variance
            reference = sde.marginal(t, initial_covariance=start).root
            if conditioning == "all":
                given = sde.transition(0.0, t).root
                return float((reference.diagonal() / given.diagonal()).log().sum())
            kernel = sde.marginal(t)
            c = torch.linalg.solve_triangular(kernel.root, kernel.mean[:, :1], upper=False)
            return 0.5 * math.log1p(variance * float(c.square().sum()))

        found, error = integrate.quad(
            loss, math.log(t_min), 0.0, epsabs=1e-9, epsrel=1e-9, limit=200
        )
        expected = information(t_min) - information(1.0)
        # The rule's own estimate, and the rounding of kernels and logarithms.
        assert found == pytest.approx(expected, abs=10 * error + 1e-9)

    def test_times_of_any_shape(self) -> None:
        t = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
        for conditioning in get_args(Conditioning):
            for weighting in ("reweighted", "likelihood", lambda t: 2 * t):
                found = optimal_loss(CLD(), t, conditioning=conditioning, weighting=weighting)
                assert found.shape == t.shape
                assert found.dtype == torch.float64
                for i in range(2):
                    for j in range(3):
                        alone = optimal_loss(
                            CLD(), t[i, j], conditioning=conditioning, weighting=weighting
                        )
                        # Kernels of one time and of six agree to 1e-12.
                        assert found[i, j].item() == pytest.approx(alone.item(), rel=1e-10)

    def test_it_is_the_variance_that_a_mixed_score_leaves(self) -> None:
        for make in PROCESSES.values():
            sde = make()
            model = MixedScore(Constant(sde), sde, torch.zeros(()), torch.full((), 0.25))
            t = torch.tensor([0.01, 0.3, 1.0], dtype=torch.float64)
            # The same covariance by two routes, 1 less what is explained.
            assert torch.allclose(
                optimal_loss(sde, t, data_variance=0.25),
                model.residual_variance(t),
                rtol=1e-9,
                atol=1e-12,
            )


class TestRefusals:
    """What is no draw, no loss, no time."""

    @pytest.mark.parametrize("t", [0.0, -0.1, 1.1, math.nan, torch.full((2,), 0.5), "0.5"])
    def test_times_that_do_not_fit_are_refused(self, t: Any) -> None:
        error = TypeError if isinstance(t, str) else ValueError
        for call in (
            lambda: PerturbedData.draw(CLD(), data(3, 2), t),
            lambda: score_matching_loss(lambda z, t: z[:, 1:], CLD(), data(3, 2), t),
        ):
            with pytest.raises(error, match=r"^t"):
                call()

    @pytest.mark.parametrize("t", [0.0, -0.1, 1.1, math.nan, torch.tensor([0.5, 0.0])])
    @every_conditioning
    def test_an_optimal_loss_needs_a_density(self, t: Any, conditioning: Any) -> None:
        with pytest.raises(ValueError, match=r"^t"):
            optimal_loss(CLD(), t, conditioning=conditioning)

    @pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
    def test_a_variance_is_positive(self, variance: float) -> None:
        with pytest.raises(ValueError, match="data_variance must be finite and positive"):
            optimal_loss(CLD(), 0.5, data_variance=variance)

    @pytest.mark.parametrize("value", ["speed", "", None])
    def test_unknown_names_are_refused(self, value: Any) -> None:
        x0 = data(3, 2)
        with pytest.raises(ValueError, match="conditioning must be one of"):
            PerturbedData.draw(CLD(), x0, 0.5, conditioning=value)
        with pytest.raises(ValueError, match="conditioning must be one of"):
            optimal_loss(CLD(), 0.5, conditioning=value)
        pair = PerturbedData.draw(CLD(), x0, 0.5)
        with pytest.raises(ValueError, match="prediction must be one of"):
            pair.target(value)
        with pytest.raises(ValueError, match="prediction must be one of"):
            pair.loss(pair.noise, value)

    def test_the_full_score_is_no_target(self) -> None:
        pair = PerturbedData.draw(CLD(), data(3, 2), 0.5)
        with pytest.raises(ValueError, match="prediction must be one of"):
            pair.target("full_score")  # type: ignore[arg-type]

    @pytest.mark.parametrize("weighting", ["uniform", None, 1.0])
    def test_unknown_weightings_are_refused(self, weighting: Any) -> None:
        pair = PerturbedData.draw(CLD(), data(3, 2), 0.5)
        with pytest.raises((TypeError, ValueError), match="weighting must be"):
            pair.loss(pair.noise, weighting=weighting)
        with pytest.raises((TypeError, ValueError), match="weighting must be"):
            optimal_loss(CLD(), 0.5, weighting=weighting)

    def test_a_weighting_returns_one_number_a_time(self) -> None:
        t = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
        pair = PerturbedData.draw(CLD(), data(3, 2), t)
        for weighting in (lambda t: t[1:], lambda t: t.sum(), lambda t: t[:, None]):
            with pytest.raises(ValueError, match="one number for each time"):
                pair.loss(pair.noise, weighting=weighting)

    @pytest.mark.parametrize("prediction", ["score", "noise", "data"])
    @pytest.mark.parametrize("shape", [(3, 2, 2), (1, 1, 2), (3, 1), (3, 1, 1), (3,), (3, 1, 2, 1)])
    def test_an_output_of_another_shape_is_refused(self, prediction: Any, shape: Any) -> None:
        # None of them broadcasts in silence.
        pair = PerturbedData.draw(CLD(), data(3, 2), 0.5)
        with pytest.raises(ValueError, match=f"must be a prediction of the {prediction} of shape"):
            pair.loss(torch.zeros(shape, dtype=torch.float64), prediction)

    @pytest.mark.parametrize("x0", [torch.zeros(3, 2, dtype=torch.int64), [0.0], None])
    def test_data_are_floating_point_tensors(self, x0: Any) -> None:
        with pytest.raises(TypeError, match="data must be a floating-point tensor"):
            PerturbedData.draw(CLD(), x0, 0.5)

    @pytest.mark.parametrize("sde", [CLD, None, "CLD"])
    def test_the_process_has_to_be_a_linear_sde(self, sde: Any) -> None:
        with pytest.raises(TypeError, match="sde must be a LinearSDE"):
            PerturbedData.draw(sde, data(3, 2), 0.5)
        with pytest.raises(TypeError, match="sde must be a LinearSDE"):
            optimal_loss(sde, 0.5)


def test_probing_replaces_every_normal() -> None:
    # `Maps` relies on both modules drawing by one function.
    from cldsde.linear import kernel, sde

    assert kernel.standard_normal is sde.standard_normal is standard_normal
