"""Conversions between score, noise, data and full score, against dense algebra."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import mpmath as mp
import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, ReverseProcess, SubVPSDE
from cldsde.score import Conversion
from cldsde.score.conversion import Conditioning, Prediction
from score import exact
from score.exact import EPS

RECOVERED: dict[str, Callable[[], LinearSDE]] = {
    "VP": VPSDE,
    "sub-VP": SubVPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD, critical": CLD,
    "CLD, overdamped": lambda: CLD(friction=2.0),
    "CLD, linear": lambda: CLD((0.1, 8.0)),
    "CLD, equilibrium": lambda: CLD(velocity_scale=1.0),
    "CLD, position noise": lambda: CLD(position_noise=0.3),
    "PSLD": PSLD,
    "HOLD": HOLD,
    "first of two driven": lambda: LinearSDE.from_matrices(
        [[-8.0, -4.0], [4.0, 0.0]], [[4.0], [0.0]]
    ),
    "middle of three driven": lambda: LinearSDE.from_matrices(
        [[0.0, 1.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 1.0, -1.0]], [[0.0], [2.0], [0.0]], 4.0
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
# Velocity and flow, which need one component, are tested with interpolants.
KINDS = tuple(kind for kind in get_args(Prediction) if kind not in ("velocity", "flow"))
every_process = pytest.mark.parametrize("name", list(RECOVERED))
PAIRS = list(itertools.product(KINDS, repeat=2))
every_pair = pytest.mark.parametrize(
    ("source", "target"),
    PAIRS,
    ids=["->".join(pair) for pair in PAIRS],
)
every_conditioning = pytest.mark.parametrize("conditioning", get_args(Conditioning))


def underdamped() -> LinearSDE:
    """The data driven, and velocities that know them: driven scores lose x_0 at some times."""
    return LinearSDE.from_matrices(
        [[-1.0, -4.0], [4.0, 0.0]],
        [[8**0.5], [0.0]],
        4.0,
        initial_covariance=[[0.0, 0.0], [0.0, 0.04]],
    )


def as_tensor(matrix: Any) -> torch.Tensor:
    """Entries of an mpmath matrix, row by row."""
    return torch.tensor([float(x) for x in matrix], dtype=torch.float64)


def driven_noise_root(sde: LinearSDE, t: float, conditioning: str) -> Any:
    """K, lower-triangular, K K^T = Cov(driven | rest) by the Schur complement; mpmath."""
    kernel = sde.marginal(t) if conditioning == "data" else sde.transition(0.0, t)
    driven = list(sde.driven)
    rest = [i for i in range(sde.components) if i not in driven]
    root = mp.matrix(kernel.root.tolist())
    sigma = root * root.T

    def block(rows: list[int], columns: list[int]) -> Any:
        return mp.matrix([[sigma[i, j] for j in columns] for i in rows])

    schur = block(driven, driven)
    if rest:
        schur -= block(driven, rest) * mp.inverse(block(rest, rest)) * block(rest, driven)
    return mp.cholesky((schur + schur.T) / 2)


def representations(
    sde: LinearSDE, t: float, z: torch.Tensor, x0: torch.Tensor, conditioning: str
) -> dict[str, torch.Tensor]:
    """What the prediction ``x0`` ``(B, D)`` at ``z`` ``(B, k, D)`` is in each form; 50 digits."""
    driven, kernel = list(sde.driven), sde.marginal(t)
    with mp.workdps(exact.DIGITS):
        root, psi = mp.matrix(kernel.root.tolist()), mp.matrix(kernel.mean[:, 0].tolist())
        precision = mp.inverse(root * root.T)
        K = driven_noise_root(sde, t, conditioning)
        scores, noises = torch.empty_like(z), z.new_empty(len(z), len(driven), *z.shape[2:])
        for b in range(len(z)):
            for j in range(z.shape[2]):
                state = mp.matrix(z[b, :, j].tolist())
                s = -precision * (state - psi * mp.mpf(x0[b, j].item()))
                n = -K.T * mp.matrix([s[i] for i in driven])
                scores[b, :, j] = as_tensor(s)
                noises[b, :, j] = as_tensor(n)
    return {"score": scores[:, driven], "noise": noises, "data": x0, "full_score": scores}


def tolerances(
    sde: LinearSDE, t: float, z: torch.Tensor, x0: torch.Tensor, conditioning: str
) -> dict[str, float]:
    """Absolute rounding errors of each form, when it is found from any other.

    Whitening w = L^-1 z is exact to eps times the condition number of L, its rows scaled to unit
    size, relative to the size W of |L^-1| |z| + |c x_0|: this is the error of a noise. The other
    forms follow by the norms of the maps, and what is found from the driven score by way of x_0 by
    the ratio a of |c| to |c_d|, which is what it amplifies noise by. Noise given all of z_0 is
    smaller than that given the data, K' < K: as a source it brings its error in K K'^-1 fold.
    """
    kernel, driven = sde.marginal(t), list(sde.driven)
    rest = [i for i in range(sde.components) if i not in driven]
    order = rest + driven
    root = torch.linalg.cholesky(kernel.covariance[order][:, order])
    condition = float(torch.linalg.cond(root / root.norm(dim=-1, keepdim=True)))
    inverse = torch.linalg.inv(root)
    c = inverse @ kernel.mean[order, 0]
    sizes = torch.einsum("ij,bjd->bid", inverse.abs(), z[:, order].abs())
    W = float((sizes + c.abs()[:, None] * x0.abs().unsqueeze(1)).max())
    amplification = float(c.norm() / c[len(rest) :].norm())
    with mp.workdps(exact.DIGITS):
        data, given = (driven_noise_root(sde, t, how) for how in ("data", conditioning))
        ratio = float(mp.norm(mp.inverse(given) * data))
    noise = 32 * EPS * condition * W * ratio * amplification
    stretch = float(torch.linalg.matrix_norm(inverse, 2))
    return {
        "noise": noise,
        "data": noise / float(c.norm()),
        "score": noise * stretch,
        "full_score": noise * stretch,
    }


def drawn(sde: LinearSDE, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """States and a prediction of the data that is none of the best."""
    z = exact.states(sde, exact.mixture(), t, n=2)
    g = torch.Generator().manual_seed(11)
    return z, torch.randn(2, 2, generator=g, dtype=torch.float64)


class TestDenseAlgebra:
    """Every form of one prediction, against 50 digits."""

    @every_conditioning
    @pytest.mark.parametrize("t", [1e-3, 0.05, 0.4, 1.0])
    @every_process
    def test_every_form_follows_from_every_other(
        self, name: str, t: float, conditioning: Any
    ) -> None:
        sde = RECOVERED[name]()
        z, x0 = drawn(sde, t)
        values = representations(sde, t, z, x0, conditioning)
        allowed = tolerances(sde, t, z, x0, conditioning)
        for source, target in PAIRS:
            convert = Conversion.at(sde, t, source, target, conditioning=conditioning)
            assert (convert.source, convert.target) == (source, target)
            found, expected = convert(z, values[source]), values[target]
            assert found.shape == expected.shape
            error = float((found - expected).abs().max())
            assert error <= allowed[target], (source, target, error, allowed[target])

    @every_pair
    @every_process
    def test_there_and_back_is_the_identity(self, name: str, source: Any, target: Any) -> None:
        sde, t = RECOVERED[name](), 0.3
        z, x0 = drawn(sde, t)
        value = representations(sde, t, z, x0, "all")[source]
        there = Conversion.at(sde, t, source, target, conditioning="all")
        back = Conversion.at(sde, t, target, source, conditioning="all")
        # Twice the error of one conversion, amplified by the second.
        allowed = 8 * tolerances(sde, t, z, x0, "all")[source]
        assert (back(z, there(z, value)) - value).abs().max() <= allowed

    @every_conditioning
    @pytest.mark.parametrize("t", [1e-3, 0.3])
    @every_process
    def test_the_noise_is_the_score_through_the_root_of_the_schur_complement(
        self, name: str, t: float, conditioning: Any
    ) -> None:
        sde = RECOVERED[name]()
        convert = Conversion.at(sde, t, "score", "noise", conditioning=conditioning)
        with mp.workdps(exact.DIGITS):
            K = driven_noise_root(sde, t, conditioning)
            expected = as_tensor(K).reshape(len(sde.driven), -1)
        kernel = sde.marginal(t) if conditioning == "data" else sde.transition(0.0, t)
        scaled = kernel.root / kernel.root.norm(dim=-1, keepdim=True)
        # A reordered root loses eps times the condition number of its scaled rows.
        tolerance = 64 * EPS * float(torch.linalg.cond(scaled)) * float(expected.abs().max())
        assert convert.state.abs().max() <= tolerance
        assert torch.allclose(convert.value, -expected.mT, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("source", ["score", "noise", "full_score"])
    @every_process
    def test_the_data_are_those_that_explain_the_prediction_best(
        self, name: str, source: Any
    ) -> None:
        # Least squares over whitened rows: of x_0 in n = w_d - c_d x_0 for the driven ones, in
        # L^T s = -(w - c x_0) for all.
        sde, t = RECOVERED[name](), 0.3
        driven = list(sde.driven)
        rows = sde.components if source == "full_score" else len(driven)
        g = torch.Generator().manual_seed(1)
        z = torch.randn(3, sde.components, generator=g, dtype=torch.float64)
        value = torch.randn(3, rows, generator=g, dtype=torch.float64)
        kernel = sde.marginal(t)
        solved = torch.linalg.solve(kernel.covariance, torch.eye(sde.components).double())
        metric = kernel.covariance
        if source != "full_score":
            solved = solved[driven]
            metric = torch.linalg.inv(torch.linalg.inv(kernel.covariance)[driven][:, driven])
        whiten = torch.linalg.cholesky(metric).mT
        score = value if source != "noise" else -torch.linalg.solve(whiten, value.mT).mT
        b = whiten @ solved @ kernel.mean[:, 0]
        right = whiten @ (score.mT + solved @ z.mT)
        expected = b @ right / (b @ b)
        found = Conversion.at(sde, t, source, "data")(z, value)
        # Covariances are inverted twice.
        tolerance = 64 * EPS * float(torch.linalg.cond(kernel.covariance)) ** 2
        size = float(right.abs().max() / b.norm())
        assert (found - expected).abs().max() <= tolerance * size

    @every_conditioning
    def test_without_auxiliary_noise_the_conditionings_agree(self, conditioning: Any) -> None:
        sde = CLD(velocity_scale=0.0)
        found = Conversion.at(sde, 0.3, "score", "noise", conditioning=conditioning)
        expected = Conversion.at(sde, 0.3, "score", "noise")
        # The same law, computed by the same routine.
        assert torch.allclose(found.value, expected.value, rtol=16 * EPS, atol=0)

    @pytest.mark.parametrize("name", ["VP", "CLD, critical", "HOLD"])
    def test_noise_given_everything_is_smaller(self, name: str) -> None:
        # Var(driven | rest) falls with what is known of z_0: |n'| < |n| for the same score.
        sde = RECOVERED[name]()
        data = Conversion.at(sde, 0.01, "score", "noise").value
        everything = Conversion.at(sde, 0.01, "score", "noise", conditioning="all").value
        assert everything.abs() <= data.abs() * (1 + 16 * EPS)
        assert (name == "VP") == bool(torch.isclose(everything, data, rtol=1e-12, atol=0))


class TestMixtures:
    """From the driven score alone, what only all components know."""

    @pytest.mark.parametrize("kind", ["regular", "degenerate"])
    @pytest.mark.parametrize("t", [1e-3, 0.01, 0.1, 0.5, 0.9, 1.0])
    @every_process
    def test_the_driven_score_gives_posterior_mean_and_full_score(
        self, name: str, t: float, kind: str
    ) -> None:
        sde, data = RECOVERED[name](), exact.mixture(kind)
        z = exact.states(sde, data, t, n=3)
        process = ReverseProcess(sde, data.score(sde))
        found, full = process.data_prediction(z, t), process.full_score(z, t)
        assert found.shape == (len(z), 2)
        assert full.shape == z.shape
        # The score is exact to 1e-10 in relative terms and noise in it is amplified by at most 400,
        # the gain of x0 in the predicted noise, which is reached near t = 1. The full score is
        # L^-T times a noise: what is lost in that, amplified by at most 4, is amplified once more
        # by the inverse root, 1e5 for a third component at t = 1e-3.
        stretch = float(torch.linalg.matrix_norm(torch.linalg.inv(sde.marginal(t).root), 2))
        lost = 4 * exact.rounding(sde, t) * stretch
        for i in range(len(z)):
            expected = exact.dense(sde, data, z[i], t)
            assert torch.allclose(found[i], expected.posterior_mean, rtol=0, atol=1e-8)
            size = float(expected.score.abs().max())
            assert (full[i] - expected.score).abs().max() <= lost + 1e-9 * size

    @pytest.mark.parametrize("kind", ["regular", "degenerate", "points"])
    @pytest.mark.parametrize("t", [1e-3, 0.01, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize("name", [name for name in RECOVERED if "CLD" in name])
    def test_the_velocity_score_gives_the_full_score_to_eight_digits(
        self, name: str, t: float, kind: str
    ) -> None:
        # The promise for processes with velocity, relative to the largest entry.
        sde, data = RECOVERED[name](), exact.mixture(kind)
        z = exact.states(sde, data, t, n=3)
        full = ReverseProcess(sde, data.score(sde)).full_score(z, t)
        for i in range(len(z)):
            expected = exact.dense(sde, data, z[i], t).score
            assert (full[i] - expected).abs().max() <= 1e-8 * expected.abs().max()

    def test_points_are_recovered_exactly_as_time_goes_to_zero(self) -> None:
        data, sde = exact.mixture("points"), CLD()
        g = torch.Generator().manual_seed(0)
        x = data.sample(8, generator=g, dtype=torch.float64)
        z, _ = sde.perturb(x, 1e-3, generator=g)
        found = ReverseProcess(sde, data.score(sde)).data_prediction(z, 1e-3)
        # Points are 1000 standard deviations apart: the posterior is a point, and what is left is
        # the rounding of the score, 1e-10, times its size, 1e3, times the variance, 1e-6, and less.
        assert torch.allclose(found, x, rtol=0, atol=1e-8)


class TestShapes:
    """Times and data of any shape."""

    @every_pair
    @every_process
    def test_per_sample_times_equal_single_times(self, name: str, source: Any, target: Any) -> None:
        sde = RECOVERED[name]()
        t = torch.tensor([1.0, 0.05, 0.4], dtype=torch.float64)
        together = Conversion.at(sde, t, source, target, conditioning="all")
        k, d = sde.components, len(sde.driven)
        sizes = {"data": 1, "full_score": k}
        shape = (sizes.get(target, d), sizes.get(source, d))
        assert together.state.shape == (3, shape[0], k)
        assert together.value.shape == (3, *shape)
        assert together.state.dtype == together.value.dtype == torch.float64
        for i, single in enumerate(t.tolist()):
            alone = Conversion.at(sde, single, source, target, conditioning="all")
            # A batch shares the number of doublings of its longest time: kernels agree to 1e-12,
            # and their small entries, those of the mean, in absolute terms.
            for a, b in ((together.state[i], alone.state), (together.value[i], alone.value)):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))

    @pytest.mark.parametrize("times", [(), (4,), (2, 3), (0,)])
    def test_times_may_have_any_shape(self, times: tuple[int, ...]) -> None:
        convert = Conversion.at(CLD(), torch.full(times, 0.3), "score", "full_score")
        assert convert.state.shape == (*times, 2, 2)
        assert convert.value.shape == (*times, 2, 1)

    @pytest.mark.parametrize("axes", [(), (2, 1), (1, 2), (2, 1, 1)])
    @every_pair
    @pytest.mark.parametrize("name", ["VP", "HOLD", "first two of three driven"])
    def test_several_data_axes_equal_flattened_ones(
        self, name: str, source: Any, target: Any, axes: Any
    ) -> None:
        sde, t = RECOVERED[name](), 0.4
        z, x0 = drawn(sde, t)
        value = representations(sde, t, z, x0, "data")[source]
        if not axes:
            z, value = z[..., :1], value[..., :1]
        convert = Conversion.at(sde, t, source, target)
        flat = convert(z, value)
        rows = value.shape[:1] if source == "data" else value.shape[:2]
        several = convert(z.reshape(*z.shape[:2], *axes), value.reshape(*rows, *axes))
        head = flat.shape[:1] if target == "data" else flat.shape[:2]
        assert several.shape == (*head, *axes)
        assert torch.equal(several.reshape(flat.shape), flat)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_dtype_of_the_state_is_kept(self, dtype: torch.dtype) -> None:
        convert = Conversion.at(CLD(), torch.tensor([0.2, 0.3]), "score", "data")
        z, value = torch.ones(2, 2, 3, dtype=dtype), torch.ones(2, 1, 3, dtype=dtype)
        assert convert(z, value).dtype == dtype

    def test_gradients_pass_through(self) -> None:
        convert = Conversion.at(CLD(), 0.3, "score", "data")
        z = torch.ones(2, 2, 3, dtype=torch.float64, requires_grad=True)
        value = torch.ones(2, 1, 3, dtype=torch.float64, requires_grad=True)
        grads = torch.autograd.grad(convert(z, value).sum(), (z, value))
        assert torch.equal(grads[0], convert.state.mT.expand_as(z))
        assert torch.equal(grads[1], convert.value.expand_as(value))


def zeros(sde: LinearSDE) -> list[float]:
    """Times at which the driven row of the inverse covariance, applied to psi, changes its sign."""
    t = torch.linspace(0.02, 1.0, 4001, dtype=torch.float64)
    kernel = sde.marginal(t)
    b = torch.linalg.solve(kernel.covariance, kernel.mean[..., :1])[:, sde.driven[0], 0]
    at = ((b[1:] * b[:-1]) < 0).nonzero().flatten()
    return [float(t[i]) for i in at]


UNDERDAMPED: dict[str, Callable[[], LinearSDE]] = {
    "0.2": lambda: CLD(friction=0.2),
    "0.4": lambda: CLD(friction=0.4),
    "0.6": lambda: CLD(friction=0.6),
    "first driven": underdamped,
}
every_underdamped = pytest.mark.parametrize("name", list(UNDERDAMPED))


class TestRefusals:
    """Where the driven score says nothing about the data, and what is no conversion."""

    @pytest.mark.parametrize("source", ["score", "noise"])
    @pytest.mark.parametrize("target", ["data", "full_score"])
    @every_underdamped
    def test_an_underdamped_process_is_refused_near_the_zeros(
        self, name: str, source: Any, target: Any
    ) -> None:
        sde = UNDERDAMPED[name]()
        at = zeros(sde)
        assert at
        for t in at:
            with pytest.raises(ValueError, match=r"does not determine x_0 at .*critical damping"):
                Conversion.at(sde, t, source, target)

    @every_conditioning
    @every_underdamped
    def test_other_conversions_do_not_need_the_driven_rows(
        self, name: str, conditioning: Any
    ) -> None:
        sde = UNDERDAMPED[name]()
        for t in zeros(sde):
            z, x0 = drawn(sde, t)
            values = representations(sde, t, z, x0, conditioning)
            allowed = tolerances(sde, t, z, x0, conditioning)
            for source, target in PAIRS:
                if source in ("score", "noise") and target in ("data", "full_score"):
                    continue
                convert = Conversion.at(sde, t, source, target, conditioning=conditioning)
                error = (convert(z, values[source]) - values[target]).abs().max()
                assert error <= min(1e-10, allowed[target]) * max(
                    1.0, float(values[target].abs().max())
                )

    def test_a_critically_damped_process_has_no_zeros(self) -> None:
        assert not zeros(CLD())
        Conversion.at(CLD(), torch.logspace(-3, 0, 50, dtype=torch.float64), "score", "data")

    def test_the_worst_time_of_several_is_named(self) -> None:
        sde = CLD(friction=0.4)
        zero = zeros(sde)[0]
        t = torch.tensor([0.01, zero, 0.02], dtype=torch.float64)
        with pytest.raises(ValueError, match=rf"at t = {zero:.3}"):
            Conversion.at(sde, t, "score", "data")

    @pytest.mark.parametrize(("source", "target"), [("score", "data"), ("data", "noise")])
    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD, HOLD])
    def test_the_start_is_refused(self, make: Any, source: Any, target: Any) -> None:
        sde = make()
        with pytest.raises(ValueError, match="no density at t = 0; take t > 0"):
            Conversion.at(sde, torch.tensor([0.5, 0.0]), source, target)

    @pytest.mark.parametrize("source", ["score", "noise", "full_score"])
    def test_times_at_which_nothing_is_left_of_the_data_are_refused(self, source: Any) -> None:
        # psi = exp(-500), and its square is no number.
        with pytest.raises(ValueError, match="nothing of x_0 is left"):
            Conversion.at(VPSDE(0.1, 2000.0), 1.0, source, "data")

    def test_a_law_that_only_the_unknown_start_spreads_is_refused_given_all(self) -> None:
        # VE's own initial law has a density at t = 0, the law given all of z_0 has none.
        sde = VESDE(0.1, 3.0)
        Conversion.at(sde, 0.0, "score", "noise")
        with pytest.raises(ValueError, match="no density at t = 0"):
            Conversion.at(sde, 0.0, "score", "noise", conditioning="all")

    def test_the_refusal_comes_before_the_score_is_asked(self) -> None:
        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            pytest.fail("the score was asked")

        sde = CLD(friction=0.4)
        process = ReverseProcess(sde, score)
        for method in (process.data_prediction, process.full_score):
            with pytest.raises(ValueError, match="does not determine"):
                method(torch.zeros(1, 2, 1), zeros(sde)[0])

    @pytest.mark.parametrize("argument", ["source", "target", "conditioning"])
    @pytest.mark.parametrize("value", ["speed", "", None, 1])
    def test_unknown_names_are_refused(self, argument: str, value: Any) -> None:
        names = {"source": "score", "target": "noise", "conditioning": "data", argument: value}
        source, target = names.pop("source"), names.pop("target")
        with pytest.raises(ValueError, match=f"{argument} must be one of"):
            Conversion.at(CLD(), 0.5, source, target, **names)  # type: ignore[arg-type]

    @pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
    def test_times_outside_are_refused(self, t: float) -> None:
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            Conversion.at(CLD(), t, "score", "noise")

    @pytest.mark.parametrize("sde", [CLD, None, "CLD"])
    def test_the_process_has_to_be_a_linear_sde(self, sde: Any) -> None:
        with pytest.raises(TypeError, match="sde must be a LinearSDE"):
            Conversion.at(sde, 0.5, "score", "noise")


def test_the_amplification_that_is_refused_is_that_of_the_noise() -> None:
    # sqrt(I) / (|b_v| L_vv) against the all-rows estimate: 1.08 ... 1.62 for critical CLD.
    sde = CLD()
    for t in (1e-3, 0.1, 0.9):
        kernel = sde.marginal(t)
        psi = kernel.mean[:, 0]
        b = torch.linalg.solve(kernel.covariance, psi)
        ratio = math.sqrt(float(psi @ b)) / (abs(float(b[1])) * float(kernel.root[1, 1]))
        coefficient = Conversion.at(sde, t, "score", "data").value
        # The noise n = -L_vv s has unit variance; the all-rows estimate's is 1 / sqrt(I).
        gain = float(coefficient.abs().squeeze()) / float(kernel.root[1, 1])
        # Covariances are inverted here, condition number 1e6 at t = 1e-3.
        assert gain * math.sqrt(float(psi @ b)) == pytest.approx(ratio, rel=1e-8)
        assert 1 <= ratio <= 1.7
