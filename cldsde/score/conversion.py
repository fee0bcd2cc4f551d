r"""Conversions between predictions of a network: score, noise, data, velocity and flow.

Given the distribution z_t | x_0 ~ N(ψ x_0, Σ_t), the score of the marginal satisfies
Σ_t s = −(z − ψ x̂₀) with x̂₀ = E[x_0 | z_t]. These are k·D equations with only D unknowns. Order the
components so that the driven components d come last, and whiten with the root L of the reordered
covariance,

.. math:: w = L^{-1} z, \qquad c = L^{-1} ψ, \qquad n = −L_{dd}^⊤ s_d.

n is the best prediction of the noise in z_t. Then w_d − n = c_d x̂₀, so the driven score alone
determines x̂₀ by least squares, and x̂₀ determines the full score s = −L^{−⊤}(w − c x̂₀).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, as_times
from cldsde.linear.covariance import joint_root, triangular_inverse
from cldsde.linear.kernel import Kernel, check_density, check_kernel_shape
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.checks import one_of

__all__ = [
    "Combination",
    "Conditioning",
    "Conversion",
    "Prediction",
    "WhitenedKernel",
    "conditional_kernel",
    "whiten",
]

Prediction = Literal["score", "noise", "data", "full_score", "velocity", "flow"]
"""``"score"``: of the driven components. ``"noise"``: n = −L_ddᵀ s_d. ``"data"``: E[x_0 | z_t].
``"full_score"``: of all components. For processes of one component, x_t = α x_0 + σ n, also
``"velocity"``: E[α n − σ x_0 | x_t] (Salimans and Ho 2022), and ``"flow"``: E[α′ x_0 + σ′ n | x_t],
the velocity of the probability flow, which flow matching learns."""

Conditioning = Literal["data", "all"]
"""Condition on the data x_0 (hybrid score matching) or on all of z_0 (denoising score matching)."""

# Above this ratio of the noise in x̂₀ to the noise of the best estimate, the driven rows do not
# determine x_0. Well-damped processes stay below 4. Underdamped processes pass through infinity.
_LARGEST_AMPLIFICATION = 20.0


_OF_ONE_COMPONENT = ("velocity", "flow")


class WhitenedKernel(NamedTuple):
    """The distribution of z_t given the start, whitened with the driven components last.

    Attributes
    ----------
    root
        L, lower-triangular root of the covariance in the order (rest, driven), ``(*, k, k)``.
    inverse
        L⁻¹ with columns in the components' own order, so that w = inverse z, ``(*, k, k)``.
    psi
        ψ = Ψ(t, 0) e₀, in the components' own order, ``(*, k, 1)``.
    signal
        c = L⁻¹ψ, ``(*, k, 1)``.
    noise
        Matrix that maps the noise ξ of z_t = ψx_0 + root ξ, with the root in the components' own
        order, to the noise n = −L_ddᵀ s_d of the driven components, ``(*, d, k)``.
    """

    root: Tensor
    inverse: Tensor
    psi: Tensor
    signal: Tensor
    noise: Tensor

    def driven_root(self) -> Tensor:
        """L_dd, the root of the driven components' covariance given all others, ``(*, d, d)``."""
        d = self.noise.shape[-2]
        return self.root[..., -d:, -d:]

    def information(self) -> Tensor:
        """ψᵀΣ⁻¹ψ, the generalised signal-to-noise ratio, ``(*)``."""
        return self.signal.square().sum((-2, -1))


def conditional_kernel(sde: LinearSDE, t: Tensor, conditioning: Conditioning) -> Kernel:
    """Kernel of z_t given the data or all of z_0."""
    one_of(conditioning, Conditioning, "conditioning")
    return sde.marginal(t) if conditioning == "data" else sde.transition(0.0, t)


def whiten(sde: LinearSDE, kernel: Kernel, t: Tensor) -> WhitenedKernel:
    """Whiten the distribution of z_t given the start, at times t > 0.

    Raises
    ------
    ValueError
        If the distribution has no density at some time.
    """
    root, psi = kernel.root, kernel.mean[..., :1]
    check_density(root, t, "t")
    k, driven = sde.components, list(sde.driven)
    order = [i for i in range(k) if i not in driven] + driven
    if order == list(range(k)):
        ordered = root
        eye = torch.eye(k, dtype=torch.float64, device="cpu")[driven]
        noise = eye.expand(*root.shape[:-2], -1, -1)
        inverse = triangular_inverse(ordered)
    else:
        ordered = joint_root(root[..., order, :])
        inverse = triangular_inverse(ordered)[..., :, torch.tensor(order, device="cpu").argsort()]
        # The noise is −L_ddᵀ s_d with s = −root⁻ᵀ ξ.
        own = triangular_inverse(root)[..., driven].mT
        noise = ordered[..., -len(driven) :, -len(driven) :].mT @ own
    return WhitenedKernel(ordered, inverse, psi, inverse @ psi, noise)


class Combination(NamedTuple):
    """Velocity or flow as a combination a x_0 + b n of data and noise, for x_t = α x_0 + σ n."""

    alpha: Tensor
    sigma: Tensor
    of_data: Tensor  # a
    of_noise: Tensor  # b

    @classmethod
    def at(
        cls, sde: LinearSDE, whitened: WhitenedKernel, t: Tensor, kind: Prediction
    ) -> Combination:
        """Coefficients of the velocity or the flow at times of shape ``*``.

        Raises
        ------
        ValueError
            If the process has more than one component.
        """
        if sde.components != 1:
            msg = (
                f"a prediction of the {kind} needs a process of one component; "
                f"{type(sde).__name__} has {sde.components}. Use 'noise' or 'data'"
            )
            raise ValueError(msg)
        alpha, sigma = whitened.psi[..., 0, 0], whitened.root[..., 0, 0]
        if kind == "velocity":
            return cls(alpha, sigma, -sigma, alpha)
        return cls(alpha, sigma, *sde.dynamics.rates(t, sde.initial_covariance[0, 0]))

    @property
    def determinant(self) -> Tensor:
        """α b − σ a > 0."""
        return self.alpha * self.of_noise - self.sigma * self.of_data


@dataclass(frozen=True, eq=False)
class Conversion:
    """Conversion of one prediction to another, linear in the state and the prediction.

    Create it with `Conversion.at`, and call it with states and predictions.

    Attributes
    ----------
    state
        Coefficients of the state, ``(*, out, k)`` float64 on the CPU.
    value
        Coefficients of the prediction, ``(*, out, in)`` float64 on the CPU.
    source, target
        Predictions that are converted from and to. ``in`` and ``out`` are 1 for data, velocity and
        flow, the number of driven components for score and noise, and k for the full score.

    Examples
    --------
    The full score and x̂₀ from the velocity's score alone:

    >>> import torch
    >>> from cldsde import CLD, GaussianMixture
    >>> sde, t = CLD(), 0.3
    >>> data = GaussianMixture([0.5, 0.5], [[-1.0], [2.0]], [[[0.1]], [[0.0]]])
    >>> z = sde.prior.sample((4, 1), dtype=torch.float64)
    >>> velocity_score = data.score(sde)(z, t)
    >>> x0 = Conversion.at(sde, t, "score", "data")(z, velocity_score)
    >>> bool(torch.allclose(x0, data.posterior_mean(sde, z, t)))
    True
    >>> full = Conversion.at(sde, t, "score", "full_score")(z, velocity_score)
    >>> bool(torch.allclose(full, data.score(sde, rows="all")(z, t)))
    True
    """

    state: Tensor
    value: Tensor
    source: Prediction
    target: Prediction

    @classmethod
    def at(
        cls,
        sde: LinearSDE,
        t: TimeLike,
        source: Prediction,
        target: Prediction,
        *,
        conditioning: Conditioning = "data",
    ) -> Conversion:
        """Compute the coefficients at times t > 0.

        Parameters
        ----------
        sde
            The forward process.
        t
            Times of any shape in (0, 1].
        source, target
            ``"score"``, ``"noise"``, ``"data"``, ``"full_score"``, ``"velocity"`` or ``"flow"``.
            The last two need a process of one component. The full score amplifies rounding errors:
            its relative error is about √(ψᵀΣ⁻¹ψ) times the rounding error, which is large for
            third-order processes at small times.
        conditioning
            Meaning of ``"noise"``: the noise of z_t given the data (hybrid score matching), or
            given all of z_0 (denoising score matching).

        Returns
        -------
        Conversion
            For times of the shape of t.

        Raises
        ------
        TypeError
            If ``sde`` is not a `LinearSDE`, or a time is not a number.
        ValueError
            The error is raised in any of these cases:

            - The distribution given the data has no density at some time.
            - Source or target is a velocity or a flow, and the process has several components.
            - The target is the data or the flow, and nothing of x_0 is left in the state, as for
              `RectifiedFlow` at t = 1.
            - The target is the data, and the driven score does not determine it. This happens at
              isolated times of an underdamped process.
            - The target is the full score, and float64 has too few digits for it.
        """
        check_process(sde)
        times = as_times(t, "t", sde.T)
        one_of(source, Prediction, "source")
        one_of(target, Prediction, "target")
        one_of(conditioning, Conditioning, "conditioning")
        whitened = whiten(sde, sde.marginal(times), times)
        noise_root = whitened.driven_root()
        if conditioning == "all" and "noise" in (source, target):
            given_all = conditional_kernel(sde, times, conditioning)
            noise_root = whiten(sde, given_all, times).driven_root()
        return _Converter(sde, whitened, noise_root, times).convert(source, target)

    def __call__(self, z: Tensor, value: Tensor) -> Tensor:
        """Convert a prediction at a state.

        Parameters
        ----------
        z
            ``(B, k, *D)``.
        value
            ``(B, in, *D)``, or ``(B, *D)`` for the data.

        Returns
        -------
        Tensor
            ``(B, out, *D)``, or ``(B, *D)`` if the target is the data.

        Raises
        ------
        ValueError
            If a shape does not fit.
        """
        check_kernel_shape(self.state, z, "z")
        axes = () if self.source == "data" else (self.value.shape[-1],)
        expected = (len(z), *axes, *z.shape[2:])
        if value.shape != expected:
            msg = (
                f"value must be a prediction of the {self.source} of shape {tuple(expected)} for "
                f"these states; got {tuple(value.shape)}"
            )
            raise ValueError(msg)
        rows = value.unsqueeze(1) if self.source == "data" else value
        out = apply_blocks(self.state, z) + apply_blocks(self.value, rows)
        return out[:, 0] if self.target == "data" else out


def _block(x: Tensor) -> Tensor:
    return x[..., None, None]


class _Linear(NamedTuple):
    """Coefficients of a quantity that is linear in the state and in the given prediction."""

    state: Tensor
    value: Tensor

    def through(self, matrix: Tensor) -> _Linear:
        return _Linear(matrix @ self.state, matrix @ self.value)


class _Converter:
    """Converts between all predictions by way of two: the driven noise n given x_0, and x̂₀."""

    def __init__(
        self, sde: LinearSDE, whitened: WhitenedKernel, noise_root: Tensor, times: Tensor
    ) -> None:
        self.sde = sde
        self.whitened = whitened
        self.noise_root = noise_root
        self.times = times
        self.driven = list(sde.driven)
        self.d = len(sde.driven)
        self.k = sde.components

    def convert(self, source: Prediction, target: Prediction) -> Conversion:
        rows = {"data": 1, "full_score": self.k}.get(source, self.d)
        identity = self._eye(rows)
        given = _Linear(identity.new_zeros(*identity.shape[:-1], self.k), identity)
        if source == target:
            return Conversion(*given, source, target)
        if source in _OF_ONE_COMPONENT:
            result = self._from_combination(source, target)
        elif source == "full_score":
            result = self._from_full_score(target)
        elif source == "data":
            result = self._from_data(given, target)
        elif source == "score":
            result = self._from_noise(given.through(-self.whitened.driven_root().mT), target)
        else:
            result = self._from_noise(given.through(self._from_noise_root()), target)
        return Conversion(*result, source, target)

    def _eye(self, n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float64, device="cpu").expand(*self.times.shape, n, n)

    def _from_noise_root(self) -> Tensor:
        """Matrix from the noise of the chosen conditioning to the noise given x_0."""
        return (triangular_inverse(self.noise_root) @ self.whitened.driven_root()).mT

    def _finish(self, noise: _Linear, target: Prediction) -> _Linear:
        """Convert the noise given x_0 to the noise of the chosen conditioning, or to the score."""
        to_score = -triangular_inverse(self.whitened.driven_root()).mT
        if target == "score":
            return noise.through(to_score)
        return noise.through(-self.noise_root.mT @ to_score)

    def _from_noise(self, noise: _Linear, target: Prediction) -> _Linear:
        if target in ("score", "noise"):
            return self._finish(noise, target)
        if target in _OF_ONE_COMPONENT:
            # Insert x_0 = (x − σ n) / α into a x_0 + b n.
            of = self._combination(target)
            self._power()
            return _Linear(
                _block(of.of_data / of.alpha) + _block(of.determinant / of.alpha) @ noise.state,
                _block(of.determinant / of.alpha) @ noise.value,
            )
        c, inverse = self.whitened.signal, self.whitened.inverse
        gain = c[..., -self.d :, :].mT / self._driven_power()
        data = _Linear(gain @ (inverse[..., -self.d :, :] - noise.state), -gain @ noise.value)
        if target == "data":
            return data
        # The full score is s = −L⁻ᵀ (w_r − c_r x̂₀, n).
        self._check_resolved()
        rest = c[..., : -self.d, :]
        return _Linear(
            torch.cat([inverse[..., : -self.d, :] - rest @ data.state, noise.state], dim=-2),
            torch.cat([-rest @ data.value, noise.value], dim=-2),
        ).through(-inverse.mT)

    def _from_data(self, data: _Linear, target: Prediction) -> _Linear:
        residual = _Linear(
            self.whitened.inverse - self.whitened.signal @ data.state, -self.whitened.signal
        )
        if target == "full_score":
            self._check_resolved()
            return residual.through(-self.whitened.inverse.mT)
        if target in _OF_ONE_COMPONENT:
            # Insert n = (x − α x_0) / σ into a x_0 + b n.
            of = self._combination(target)
            return _Linear(_block(of.of_noise / of.sigma), _block(-of.determinant / of.sigma))
        driven = _Linear(residual.state[..., -self.d :, :], residual.value[..., -self.d :, :])
        return self._finish(driven, target)

    def _combination(self, kind: Prediction) -> Combination:
        return Combination.at(self.sde, self.whitened, self.times, kind)

    def _from_combination(self, source: Prediction, target: Prediction) -> _Linear:
        """Solve x = α x_0 + σ n and the prediction a x_0 + b n for the data or the noise."""
        of = self._combination(source)
        scale = 1 / of.determinant
        if target in ("data", *_OF_ONE_COMPONENT):
            data = _Linear(_block(of.of_noise * scale), _block(-of.sigma * scale))
            if target == "data":
                return data
            # Express a' x_0 + b' n by x = α x_0 + σ n and by the source a x_0 + b n.
            to = self._combination(target)
            return _Linear(
                _block((to.of_data * of.of_noise - to.of_noise * of.of_data) * scale),
                _block(to.determinant * scale),
            )
        noise = _Linear(_block(-of.of_data * scale), _block(of.alpha * scale))
        return self._from_noise(noise, target)

    def _from_full_score(self, target: Prediction) -> _Linear:
        if target in _OF_ONE_COMPONENT:
            self._combination(target)  # raises if there are several components
            given = _Linear(torch.zeros_like(self._eye(1)), self._eye(1))
            return self._from_noise(given.through(-self.whitened.driven_root().mT), target)
        c, inverse = self.whitened.signal, self.whitened.inverse
        if target == "data":
            # Least squares over all rows: x̂₀ = ψᵀ(Σ⁻¹z + s) / ψᵀΣ⁻¹ψ.
            power = self._power()
            return _Linear(c.mT @ inverse / power, self.whitened.psi.mT / power)
        select = self._eye(self.k)[..., self.driven, :]
        score = _Linear(torch.zeros_like(select), select)
        if target == "score":
            return score
        return score.through(-self.noise_root.mT)

    def _power(self) -> Tensor:
        """ψᵀΣ⁻¹ψ; raise ValueError if it is zero, because the state then does not depend on x_0."""
        power = self.whitened.information()[..., None, None]
        if not bool((power > 0).all()):
            end = self.sde.regular_until
            advice = f"take t ≤ {end:.15g}" if end < 1 else "end earlier or lower beta"
            msg = (
                "t must be earlier: nothing of x_0 is left in the state at "
                f"t = {float(self.times.detach().max()):g}, so the score does not determine it; "
                f"{advice}"
            )
            raise ValueError(msg)
        return power

    def _check_resolved(self) -> None:
        """Raise ValueError if rounding of x̂₀ leaves no digit of the full score."""
        if self.whitened.signal.shape[-2] == self.d:
            return  # all components are driven
        loss = torch.finfo(torch.float64).eps * self._power().sqrt().flatten()
        if len(loss) and float(loss.detach().max()) > 1e-4:
            where = float(self.times.detach().flatten()[loss.argmax()])
            msg = (
                f"t must be later for the full score: at t = {where:g} the state determines x_0 so "
                "exactly that float64 holds no digit of it"
            )
            raise ValueError(msg)

    def _driven_power(self) -> Tensor:
        """Contribution of the driven rows to ψᵀΣ⁻¹ψ; raise if they do not determine x_0."""
        power = self._power()
        driven = self.whitened.signal[..., -self.d :, :].square().sum((-2, -1), keepdim=True)
        amplification = (power / driven).sqrt().flatten()
        worst = float(amplification.detach().max()) if len(amplification) else 1.0
        if not worst <= _LARGEST_AMPLIFICATION:
            where = float(self.times.detach().flatten()[amplification.argmax()])
            msg = (
                f"the score of the driven components {tuple(self.driven)} does not determine x_0 "
                f"at t = {where:g}: it would amplify noise {worst:.3g} times. Underdamped "
                "processes have such times; use critical damping or more, or a solver that needs "
                "no x_0, such as SSCS or StochasticHeun"
            )
            raise ValueError(msg)
        return driven
