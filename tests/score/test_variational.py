"""The evidence lower bound: affine models in closed form, its place, its gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec, solve_ivp

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, ReverseProcess
from cldsde.score import Conversion, TimeSampler, evidence_lower_bound, log_likelihood

PROCESSES: dict[str, Any] = {
    "VP": VPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD": CLD,
    "PSLD": PSLD,
    "HOLD": HOLD,
    "correlated noise": lambda: LinearSDE.from_matrices(
        [[-1.0, 2.0], [-1.0, -2.0]],
        [[0.7, 0.0], [0.9, 1.1]],
        4.0,
        initial_covariance=[[0.0, 0.0], [0.0, 0.1]],
    ),
}
every_process = pytest.mark.parametrize("name", list(PROCESSES))

# Data of the models: N(0.3, 0.5) in each direction.
MEAN, VARIANCE = 0.3, 0.5
X = torch.tensor([[0.4, -0.8], [1.3, 0.2]], dtype=torch.float64)
T_MIN = 1e-3

MODELS = {"exact": (1.0, 0.0), "imperfect": (0.97, 0.3)}
every_model = pytest.mark.parametrize("model", list(MODELS))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(dimension: int = 2) -> GaussianMixture:
    eye = torch.eye(dimension, dtype=torch.float64)
    return GaussianMixture([1.0], [[MEAN] * dimension], VARIANCE * eye.unsqueeze(0))


class Imperfect:
    """scale · score + offset."""

    def __init__(self, sde: LinearSDE, scale: float, offset: float) -> None:
        self.score, self.scale, self.offset = gaussian().score(sde), scale, offset

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * self.score(z, t) + self.offset


class Bound(NamedTuple):
    """Expectation of the bound and the density of the model that it bounds, at numbers x."""

    bound: np.ndarray
    value: np.ndarray


def mean_loss(sde: LinearSDE, model: str, t: float, x: np.ndarray) -> np.ndarray:
    """½ E ‖Gᵀ(s − s*)‖² given x, one direction."""
    scale, offset = MODELS[model]
    kernel = sde.marginal(t)
    psi, L = kernel.mean[:, 0].numpy(), kernel.root.numpy()
    driven = np.zeros(len(psi))
    driven[list(sde.driven)] = offset
    G = sde.diffusion(t).numpy()
    S = L @ L.T + VARIANCE * np.outer(psi, psi)
    mean = np.outer(driven, np.ones_like(x)) - scale * np.outer(np.linalg.solve(S, psi), x - MEAN)
    noise = np.linalg.inv(L).T - scale * np.linalg.solve(S, L)
    return 0.5 * (((G.T @ mean) ** 2).sum(0) + ((G.T @ noise) ** 2).sum())


def expected(sde: LinearSDE, model: str, x: np.ndarray, t_min: float = T_MIN) -> Bound:
    """Closed forms of one data direction, integrated by scipy.

    With z = ψx + Lε both scores are affine in ε, and the loss is a mean squared and a trace. The
    model is the linear reverse SDE from the prior, whose moments obey linear ODEs, then x̃ = gz
    and noise of variance 1/I.
    """
    scale, offset = MODELS[model]
    k = sde.components
    driven = np.zeros(k)
    driven[list(sde.driven)] = offset

    def law(t: float) -> tuple[np.ndarray, np.ndarray]:
        kernel = sde.marginal(t)
        return kernel.mean[:, 0].numpy(), kernel.root.numpy()

    def loss(log_t: float) -> np.ndarray:
        t = math.exp(log_t)
        return t * mean_loss(sde, model, t, x)

    integral, error = quad_vec(loss, math.log(t_min), 0.0, epsabs=1e-7, epsrel=1e-7)
    assert error < 1e-5
    psi, L = law(sde.T)
    P = sde.prior.covariance.numpy()
    inverse = np.linalg.inv(P)
    log_det = np.linalg.slogdet(P)[1] - 2 * np.log(np.diag(L)).sum()
    divergence = 0.5 * (np.trace(inverse @ L @ L.T) - k + log_det + psi @ inverse @ psi * x**2)
    psi, L = law(t_min)
    solved = np.linalg.solve(L @ L.T, psi)
    information = psi @ solved
    decoder = 0.5 * math.log(2 * math.pi * math.e / information)

    def reverse(log_t: float, y: np.ndarray) -> np.ndarray:
        t = math.exp(log_t)
        psi, L = law(t)
        S = L @ L.T + VARIANCE * np.outer(psi, psi)
        G = sde.diffusion(t).numpy()
        Q = G @ G.T
        pull = scale * Q @ np.linalg.inv(S)
        drift = sde.drift(t).numpy() + pull
        m, C = y[:k], y[k:].reshape(k, k)
        dm = drift @ m - pull @ psi * MEAN - Q @ driven
        dC = drift @ C + C @ drift.T - Q
        return t * np.concatenate([dm, dC.ravel()])

    start = np.concatenate([np.zeros(k), P.ravel()])
    options = {"method": "DOP853", "rtol": 1e-7, "atol": 1e-10}
    y = solve_ivp(reverse, (0.0, math.log(t_min)), start, **options).y[:, -1]
    g = solved / information
    variance = g @ y[k:].reshape(k, k) @ g + 1 / information
    value = -0.5 * ((x - g @ y[:k]) ** 2 / variance + np.log(2 * np.pi * variance))
    return Bound(-(divergence + integral + decoder), value)


def expected_at(sde: LinearSDE, model: str, x: torch.Tensor = X, t_min: float = T_MIN) -> Bound:
    """The sum over directions, ``(B,)``."""
    parts = expected(sde, model, x.flatten().numpy(), t_min)
    return Bound(*(part.reshape(x.shape).sum(1) for part in parts))


def estimates(
    sde: LinearSDE,
    model: Any,
    n: int = 4000,
    *,
    x: torch.Tensor = X,
    sampler: TimeSampler | None = None,
    t_min: float = T_MIN,
    **options: Any,
) -> torch.Tensor:
    """Estimates of each datum, ``(len(x), n)``."""
    if sampler is None:
        sampler = TimeSampler.importance(sde, t_min, data_variance=VARIANCE, weighting="likelihood")
    found = []
    for i, datum in enumerate(x):
        g = seeded(i)
        t, weight = sampler.sample(n, generator=g)
        repeated = datum.expand(n, *datum.shape)
        found.append(
            evidence_lower_bound(
                model, sde, repeated, t, weight, t_min=t_min, generator=g, **options
            )
        )
    return torch.stack(found)


def assert_mean(found: torch.Tensor, wanted: np.ndarray) -> None:
    """Within 5 standard errors; the draws of times are stratified, which only lessens them."""
    error = (found.mean(1) - torch.from_numpy(wanted)).abs()
    assert (error <= 5 * found.std(1) / math.sqrt(found.shape[1])).all()


class TestExpectation:
    """The mean of the estimate against closed forms."""

    @every_process
    def test_the_mean_is_the_bound(self, name: str) -> None:
        sde = PROCESSES[name]()
        exact = expected_at(sde, "exact")
        assert_mean(estimates(sde, Imperfect(sde, *MODELS["exact"])), exact.bound)
        assert (exact.bound < exact.value).all()

    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_a_model_that_is_wrong_has_a_lower_bound_too(self, name: str) -> None:
        sde = PROCESSES[name]()
        exact = expected_at(sde, "imperfect")
        assert_mean(estimates(sde, Imperfect(sde, *MODELS["imperfect"])), exact.bound)
        assert (exact.bound < exact.value).all()

    @every_process
    def test_without_weight_prior_and_decoder_are_left(self, name: str) -> None:
        sde = PROCESSES[name]()
        found = evidence_lower_bound(gaussian().score(sde), sde, X, 0.5, 0.0, t_min=T_MIN)
        kernel, P = sde.marginal(1.0), sde.prior.covariance
        S, mean = kernel.covariance, torch.einsum("i,bd->bid", kernel.mean[:, 0], X)
        inverse = torch.linalg.inv(P)
        divergence = torch.einsum("bid,ij,bjd->b", mean, inverse, mean)
        divergence += 2 * ((inverse @ S).trace() - len(S) + P.logdet() - S.logdet())
        psi, S = sde.marginal(T_MIN).mean[:, 0], sde.marginal(T_MIN).covariance
        information = psi @ torch.linalg.solve(S, psi)
        expected = -0.5 * divergence - (2 * math.pi * math.e / information).log()
        # Inverting a covariance loses its condition number, below 1e8 for HOLD.
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("t", [T_MIN, 0.03, 1.0])
    @every_model
    @every_process
    def test_at_each_time_the_loss_is_that_of_affine_scores(
        self, name: str, model: str, t: float
    ) -> None:
        sde, n = PROCESSES[name](), 4000
        score = Imperfect(sde, *MODELS[model])
        x = X[:1].expand(n, 2)
        with_loss, without = (
            evidence_lower_bound(score, sde, x, t, weight, t_min=T_MIN, generator=seeded())
            for weight in (1.0, 0.0)
        )
        losses = (without - with_loss) / (1 - T_MIN)
        expected = mean_loss(sde, model, t, X[0].numpy()).sum()
        assert_mean(losses.unsqueeze(0), np.array([expected]))

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_however_times_are_drawn_the_mean_is_the_bound(self, name: str) -> None:
        sde, t_min = PROCESSES[name](), 0.02
        exact = expected_at(sde, "imperfect", t_min=t_min)
        model = Imperfect(sde, *MODELS["imperfect"])
        for density in (torch.ones_like, lambda t: 1 / t, lambda t: t.rsqrt()):
            sampler = TimeSampler(density, t_min)
            found = estimates(sde, model, sampler=sampler, t_min=t_min)
            assert_mean(found, exact.bound)
        uniform = t_min + (1 - t_min) * torch.rand(8000, generator=seeded(), dtype=torch.float64)
        found = evidence_lower_bound(
            model, sde, X[:1].expand(8000, 2), uniform, t_min=t_min, generator=seeded(1)
        )
        assert_mean(found.unsqueeze(0), exact.bound[:1])

    @pytest.mark.parametrize("prediction", ["noise", "data"])
    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_what_the_network_predicts_does_not_matter(self, name: str, prediction: Any) -> None:
        sde, n = PROCESSES[name](), 50
        score = gaussian().score(sde)

        def model(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return Conversion.at(sde, t, "score", prediction)(z, score(z, t))

        found = estimates(sde, model, n, prediction=prediction)
        wanted = estimates(sde, score, n)
        # Conversions to and fro lose the condition of the root, below 1e7 for HOLD at 1e-3.
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", ["VP", "CLD", "PSLD"])
    def test_with_an_exact_score_it_lies_as_far_below_as_the_posterior_knows_more(
        self, name: str
    ) -> None:
        # Of the score and prior of the data the gap is that of the decoder, which forgets the
        # data's law: KL(q(z|x) ‖ p(z|x)), z at t_min, with the posterior p ∝ p_t(z) N(x; x̃, 1/I).
        # Given x̃ nothing in z depends on x. x̃ is N(x, 1/I) under q, and under p the product of
        # N(m, s² + 1/I) and N(x, 1/I).
        sde = PROCESSES[name]()
        x = X.flatten().numpy()
        exact = expected(sde, "exact", x)
        kernel = sde.marginal(T_MIN)
        c = torch.linalg.solve_triangular(kernel.root, kernel.mean[:, :1], upper=False)
        noise = 1 / float(c.square().sum())
        wide = VARIANCE + noise
        posterior = 1 / (1 / wide + 1 / noise)
        mean = posterior * (MEAN / wide + x / noise)
        gap = 0.5 * (noise / posterior - 1 - math.log(noise / posterior))
        gap += 0.5 * (x - mean) ** 2 / posterior
        # The prior is not p_T: up to c x w + c²x²/2 nats with c = |L⁻¹ψ| at T, which the mean over
        # z of |w|, |x| < 5 leaves below 10 c.
        kernel = sde.marginal(1.0)
        end = torch.linalg.solve_triangular(kernel.root, kernel.mean[:, :1], upper=False)
        allowed = 10 * float(end.norm())
        if name in {"CLD", "PSLD"}:
            # Its covariance at T differs from the stationary one, too.
            covariance = sde.prior.covariance
            allowed += 25 * float((kernel.covariance - covariance).abs().max())
            allowed /= float(covariance.diagonal().min())
        assert np.abs(exact.value - exact.bound - gap).max() <= allowed

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_it_lies_below_the_density_of_the_data(self, name: str) -> None:
        sde, n = PROCESSES[name](), 4000
        point = LinearSDE.from_matrices([[0.0]], [[1.0]])
        for t_min in (1e-3, 1e-5):
            found = estimates(sde, gaussian().score(sde), n, t_min=t_min)
            value = gaussian().log_prob(point, X.unsqueeze(1), 0.0)
            error = 5 * found.std(1) / math.sqrt(n)
            # The prior is p_T up to e^{-B/2} < 0.007 times the data and the state, both below 3.
            assert (found.mean(1) <= value + error + 0.07).all()
            # And close: VP and CLD at 1e-5 lose less than 2D/(s² I), beside the prior.
            if t_min == 1e-5:
                assert (found.mean(1) >= value - error - 0.07).all()

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_the_flow_has_the_same_bound_where_the_score_is_exact(self, name: str) -> None:
        # d/dt KL(q_t ‖ p_t) = −½ E ‖Gᵀ∇ log q/p‖² for the marginals themselves, so that the bound
        # on the SDE and E log w of the flow differ by the prior alone.
        sde, n = PROCESSES[name](), 400
        score = gaussian().score(sde)
        flow = log_likelihood(ReverseProcess(sde, score), X, T_MIN, samples=n, generator=seeded(5))
        exact = expected_at(sde, "exact").bound
        error = np.abs(flow.log_prob.numpy() - exact)
        # The prior as above, and the solver's tolerance 1e-5 in 50 steps on numbers below 20.
        assert (error <= 5 * flow.standard_error.numpy() + 0.07 + 0.01).all()

    @pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 2), (1, 1, 1, 3)])
    def test_data_may_have_any_axes(self, shape: Any) -> None:
        sde, dimension = CLD(), math.prod(shape[1:])
        x = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
        t = torch.full(shape[:1], 0.3, dtype=torch.float64)
        score = gaussian(dimension).score(sde)
        found = evidence_lower_bound(score, sde, x, t, t_min=0.01, generator=seeded())
        flat = x.reshape(shape[0], dimension)
        wanted = evidence_lower_bound(score, sde, flat, t, t_min=0.01, generator=seeded())
        assert found.shape == shape[:1]
        assert torch.allclose(found, wanted, rtol=1e-12)

    def test_one_time_may_serve_all(self) -> None:
        sde = CLD()
        score = gaussian().score(sde)
        one, each = (
            evidence_lower_bound(score, sde, X, t, 0.7, t_min=0.01, generator=seeded())
            for t in (0.3, torch.full((2,), 0.3, dtype=torch.float64))
        )
        assert torch.allclose(one, each, rtol=1e-10)

    def test_an_empty_batch_has_no_bounds(self) -> None:
        sde = CLD()
        t = torch.zeros(0, dtype=torch.float64)
        found = evidence_lower_bound(gaussian().score(sde), sde, X[:0], t, t, t_min=0.01)
        assert found.shape == (0,)

    def test_single_precision_data_give_single_precision(self) -> None:
        sde = CLD()
        score = gaussian().score(sde)
        sampler = TimeSampler.importance(sde, 1e-5, weighting="likelihood")
        t, weight = sampler.sample(2000, generator=seeded())
        x = X[:1].expand(2000, 2)
        found = evidence_lower_bound(
            score, sde, x.float(), t, weight, t_min=1e-5, generator=seeded()
        )
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        exact = expected_at(sde, "exact", X[:1], 1e-5).bound
        # Terms of 10 nats a direction, rounded to 1e-7 and divided by the noise's share of the
        # state, √(γM) / √t_min times smaller than the state: a hundredth at most.
        error = abs(float(found.double().mean()) - float(exact[0]))
        assert error <= 5 * float(found.double().std()) / math.sqrt(2000) + 1e-3


def _learnt(parameters: torch.Tensor) -> LinearSDE:
    """CLD with a rate, a mass and a friction to learn, and the stationary law they have."""
    beta, mass, friction = parameters
    zero = torch.zeros((), dtype=torch.float64)
    A = torch.stack(
        [torch.stack([zero, beta / mass]), torch.stack([-beta, -beta * friction / mass])]
    )
    root = torch.stack([zero, (2 * friction * beta).sqrt()]).unsqueeze(1)
    return LinearSDE.from_matrices(A, root, 1.0, initial_covariance=[[0.0, 0.0], [0.0, 0.01]])


class TestGradients:
    """The bound of a process that is learnt."""

    @staticmethod
    def bound(sde: LinearSDE, scale: torch.Tensor) -> torch.Tensor:
        t = torch.tensor([0.011, 0.05, 0.3, 0.9], dtype=torch.float64)
        x = torch.tensor([[0.5, -1.0], [0.1, 0.2], [2.0, 1.0], [0.0, -0.3]], dtype=torch.float64)

        def model(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            rows = [-(i + 1) * scale * z.sum(1).tanh() for i in range(len(sde.driven))]
            return torch.stack(rows, dim=1) + t[:, None, None]

        weight = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
        return evidence_lower_bound(model, sde, x, t, weight, t_min=0.01, generator=seeded()).sum()

    def check(self, make: Any, values: list[float]) -> None:
        parameters = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        gradient, slope = torch.autograd.grad(
            self.bound(make(parameters), scale), (parameters, scale)
        )
        assert gradient.isfinite().all()

        def value(p: torch.Tensor, s: float) -> float:
            return float(self.bound(make(p), torch.tensor(s, dtype=torch.float64)))

        # Central differences: h² f'''/6, and eps f/h, of f near 100 and parameters near 1.
        h = 1e-5
        for i in range(len(values)):
            step = torch.zeros(len(values), dtype=torch.float64)
            step[i] = h
            base = parameters.detach()
            numeric = (value(base + step, 1.3) - value(base - step, 1.3)) / (2 * h)
            assert float(gradient[i]) == pytest.approx(numeric, rel=1e-5, abs=1e-5)
        base = parameters.detach()
        numeric = (value(base, 1.3 + h) - value(base, 1.3 - h)) / (2 * h)
        assert float(slope) == pytest.approx(numeric, rel=1e-5, abs=1e-5)

    def test_of_a_langevin_process(self) -> None:
        self.check(_learnt, [4.0, 0.25, 1.0])

    def test_of_all_entries_of_the_matrices(self) -> None:
        def make(p: torch.Tensor) -> LinearSDE:
            return LinearSDE.from_matrices(
                p[:4].reshape(2, 2),
                p[4:].reshape(2, 2),
                4.0,
                initial_covariance=[[0.0, 0.0], [0.0, 0.1]],
            )

        self.check(make, [-1.0, 2.0, -1.0, -2.0, 0.7, 0.1, 0.9, 1.1])

    def test_of_the_initial_law_and_the_prior(self) -> None:
        def make(p: torch.Tensor) -> LinearSDE:
            return LinearSDE.from_matrices(
                [[0.0, 4.0], [-1.0, -4.0]],
                [[0.0], [math.sqrt(2.0)]],
                4.0,
                initial_covariance=torch.diag(torch.stack([0 * p[0], p[0] ** 2])),
                prior_covariance=torch.diag(p[1:] ** 2),
            )

        self.check(make, [0.2, 1.1, 0.6])

    def test_of_one_component(self) -> None:
        def make(p: torch.Tensor) -> LinearSDE:
            return LinearSDE.from_matrices(-p[:1].reshape(1, 1), p[1:].reshape(1, 1), (0.1, 20.0))

        self.check(make, [0.5, 1.0])

    def test_of_a_schedule(self) -> None:
        # from_functions: β itself a parameter.
        def make(p: torch.Tensor) -> LinearSDE:
            A = torch.tensor([[0.0, 4.0], [-1.0, -4.0]], dtype=torch.float64)
            root = torch.tensor([[0.0], [math.sqrt(2.0)]], dtype=torch.float64)
            return LinearSDE.from_functions(
                lambda t: (p[0] + p[1] * t) * A,
                lambda t: (p[0] + p[1] * t).sqrt() * root,
                initial_covariance=[[0.0, 0.0], [0.0, 0.01]],
                prior_covariance=[[1.0, 0.0], [0.0, 0.25]],
            )

        self.check(make, [3.0, 2.0])

    def test_learning_follows_the_slope(self) -> None:
        # A model of a process that decays too fast: half the way down the gradient pays.
        parameters = torch.tensor([8.0, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
        scale = torch.tensor(1.3, dtype=torch.float64)
        before = self.bound(_learnt(parameters), scale)
        (gradient,) = torch.autograd.grad(before, parameters)
        step = 1e-4 * gradient / gradient.norm()
        after = self.bound(_learnt((parameters + step).detach()), scale)
        # To first order 1e-4 |gradient|.
        assert float((after - before).detach()) == pytest.approx(
            1e-4 * float(gradient.norm()), rel=0.05
        )


class TestRefusals:
    """What has no bound."""

    @pytest.mark.parametrize("t_min", [0.0, -0.1, 1.0, 2.0, math.nan])
    def test_a_model_stops_between_the_ends(self, t_min: float) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match="t_min must lie in"):
            evidence_lower_bound(gaussian().score(sde), sde, X, 0.5, t_min=t_min)

    @pytest.mark.parametrize(
        "t", [0.05, torch.tensor([0.5, 0.05]), torch.tensor(0.05), 0.0, torch.tensor([0.05, 0.5])]
    )
    def test_times_before_the_model_stops_are_refused(self, t: Any) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match=r"^t must"):
            evidence_lower_bound(gaussian().score(sde), sde, X, t, t_min=0.1)

    @pytest.mark.parametrize("t", [1.5, math.nan, torch.tensor([0.5, math.nan]), torch.ones(3)])
    def test_times_that_do_not_fit_are_refused(self, t: Any) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match="t must"):
            evidence_lower_bound(gaussian().score(sde), sde, X, t, t_min=0.1)

    @pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 1), torch.ones(1, 2)])
    def test_weights_that_do_not_fit_are_refused(self, weight: torch.Tensor) -> None:
        sde = CLD()
        t = torch.full((2,), 0.5, dtype=torch.float64)
        with pytest.raises(ValueError, match="weight"):
            evidence_lower_bound(gaussian().score(sde), sde, X, t, weight, t_min=0.1)

    def test_unknown_predictions_are_refused(self) -> None:
        sde = CLD()
        with pytest.raises(ValueError, match="prediction must be one of"):
            evidence_lower_bound(
                gaussian().score(sde),
                sde,
                X,
                0.5,
                t_min=0.1,
                prediction="speed",  # type: ignore[arg-type]
            )

    def test_a_model_of_another_shape_is_refused(self) -> None:
        with pytest.raises(ValueError, match="must be a prediction of the score of shape"):
            evidence_lower_bound(lambda z, t: z, CLD(), X, 0.5, t_min=0.1)

    @pytest.mark.parametrize("sde", [CLD, None, "CLD"])
    def test_the_process_has_to_be_a_linear_sde(self, sde: Any) -> None:
        with pytest.raises(TypeError, match="sde must be a LinearSDE"):
            evidence_lower_bound(gaussian().score(CLD()), sde, X, 0.5, t_min=0.1)

    @pytest.mark.parametrize("x", [torch.zeros(2, 2, dtype=torch.int64), None, torch.zeros(())])
    def test_data_of_another_type_are_refused(self, x: Any) -> None:
        sde = CLD()
        with pytest.raises(TypeError, match="floating-point"):
            evidence_lower_bound(gaussian().score(sde), sde, x, 0.5, t_min=0.1)

    def test_a_process_without_density_is_refused(self) -> None:
        sde = LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])
        with pytest.raises(ValueError, match="no density"):
            evidence_lower_bound(lambda z, t: -z[:, 1:], sde, X, 0.5, t_min=0.1)
