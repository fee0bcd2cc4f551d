r"""The mixed score: a Gaussian reference in closed form plus a network for the rest.

If the data were N(μ, s₀²) the marginal would be Gaussian with covariance
Σ_ref = Σ_t + s₀² ψψᵀ, and its score linear. The network only has to learn what the data add,

.. math::
    s_d = −L_{dd}^{−⊤} n, \qquad
    n = \underbrace{L_{dd}^⊤ [Σ_{ref}^{−1}(z − ψ μ)]_d}_{n_{ref}} + c_{out}\, n_θ(z, t),

where n is the prediction of the noise of the driven components (see `cldsde.score.conversion`).
With s₀² the variance of the data the reference is exact for Gaussian data at all t, the correlation
of x and v included. Dockhorn et al. (2022, §3.2) use −v/Σ_vv with s₀ = 0, which nears it as t → 1.

For such data n_ref is the best prediction of the noise, and what it leaves open has the covariance
s₀² c_d c_dᵀ / (1 + s₀² cᵀc) with c = L⁻¹ψ. So c_out = s₀ c_d / √(1 + s₀² cᵀc): the network's target
is the error of the reference's x_0 over its standard deviation, of unit size at every t, where data
are seen through noise and where they are not.

All that the state tells of x_0 is in one of its combinations, the best unbiased estimate

.. math:: \hat u = ψ^⊤Σ^{−1} z \,/\, ψ^⊤Σ^{−1}ψ = x_0 + ε / \sqrt{ψ^⊤Σ^{−1}ψ},

since the likelihood of x_0 depends on z through it alone: E[x_0 | z_t] = E[x_0 | û], the same
function of û and of the signal-to-noise ratio for every process. A network that is shown û need not
learn which combination matters at which time, and serves all processes.

The convex form (Vahdat, Kreis and Kautz 2021, §3.2) lets each channel choose between the two by a
learnt weight a, the logistic function of a parameter:

.. math:: n = (1 − a)\, n_{ref} + a\, n_θ(z, t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, as_number, check_state
from cldsde.linear.covariance import joint_root, triangular_inverse
from cldsde.linear.kernel import Kernel
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.checks import one_of
from cldsde.score.conversion import Combination, Conversion, WhitenedLaw, whiten
from cldsde.score.matching import Measured, PerturbedData, Weighting
from cldsde.score.score_denoiser import ScoreDenoiser
from cldsde.score.time_sampling import LogSNRDensity
from cldsde.score.times import coefficients_at, score_times

__all__ = ["MixedScore"]

_LEAST_CLOCK = -10.0

Output = Literal["score", "noise", "data", "velocity", "flow"]

Inputs = Literal["state", "estimate"]
"""What the network is shown: all components, or the best unbiased estimate of the data."""


class _Coefficients(NamedTuple):
    """What a mixed score needs at times of shape ``*``; ``*V`` is the shape of the variance."""

    psi: Tensor  # (*, k), takes the data to the mean of the state
    reference: Tensor  # (*, d, k, *V), takes z − ψμ to n_ref
    inputs: Tensor  # (*, k, *V), makes what the network is shown of unit size
    residual: Tensor  # (*, d, *V), c_out, makes the network's target of unit size
    data: Tensor  # (*, k, *V), takes z − ψμ to the reference's x_0 − μ
    data_residual: Tensor  # (*, *V), standard deviation of x_0 given the reference and z
    log_snr: Tensor  # (*), κ = ½ log ψᵀΣ⁻¹ψ, the network's clock
    to_score: Tensor  # (*, d, d), −L_dd^{−T}

    def to(self, like: Tensor) -> _Coefficients:
        return _Coefficients(*(field.to(like) for field in self))

    def residual_variance(self) -> Tensor:
        """Mean square of c_out at times ``(n,)``."""
        return self.residual.square().flatten(1).mean(1)

    def data_residual_variance(self) -> Tensor:
        """Mean variance of x_0 given the reference and z at times ``(n,)``."""
        return self.data_residual.square().reshape(len(self.data_residual), -1).mean(1)


class MixedScore(nn.Module):
    """Score of the driven components as a Gaussian reference plus a network's noise prediction.

    Parameters
    ----------
    network
        Module of (state, clock): ``(B, k·C, *S)`` and ``(B,)`` to ``(B, len(driven)·C, *S)`` for
        data ``(B, C, *S)``. It sees the state scaled to unit size a component and, as its clock,
        κ(t), half the log of the signal-to-noise ratio of the process, or −10 if that is larger. A
        conditional one is called as (state, clock, condition). See ``inputs`` for one that is shown
        an estimate.
    sde
        The forward process.
    data_mean, data_variance
        μ and s₀² of the reference: numbers, or tensors that broadcast with ``(C, *S)``, e.g.
        ``(C, 1, 1)``, both of one shape; the variance is positive.
    inputs
        ``"state"``: the network is shown the components as they are. ``"estimate"``: it is shown
        the one combination of them that tells all they tell of the data, and returns as much,
        ``(B, C, *S)`` both: a network trained with one process serves any other, at those
        signal-to-noise ratios that it was trained on (`LinearSDE.log_snr`).
    mixing_logits
        None: the additive form. A tensor that broadcasts with ``(C, *S)``, e.g. −3 for each of
        ``(C, 1, 1)``: the convex form, with weights a = 1/(1 + e^{−logit}) that start there and
        are learnt; of networks that are shown the state.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If mean, variance or logits are not finite, mean and variance of different shape, the
        variance is not positive, or logits are given to a network that is shown the estimate.

    Examples
    --------
    A network of VP data gives the score of CLD as well:

    >>> import torch
    >>> from cldsde import CLD, VPSDE
    >>> network = torch.nn.Module()
    >>> network.forward = lambda estimate, clock: torch.tanh(estimate)
    >>> vp = MixedScore(network, VPSDE(), 0.0, 1.0)
    >>> cld = MixedScore(network, CLD(), 0.0, 1.0, inputs="estimate")
    >>> vp(torch.randn(8, 1, 3), 0.5).shape, cld(torch.randn(8, 2, 3), 0.5).shape
    (torch.Size([8, 1, 3]), torch.Size([8, 1, 3]))
    """

    data_mean: Tensor
    data_variance: Tensor
    mixing_logits: nn.Parameter | None

    def __init__(
        self,
        network: nn.Module,
        sde: LinearSDE,
        data_mean: Tensor | float,
        data_variance: Tensor | float,
        *,
        inputs: Inputs = "state",
        mixing_logits: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_process(sde)
        one_of(inputs, Inputs, "inputs")
        data_mean = _as_tensor(data_mean, "data_mean")
        data_variance = _as_tensor(data_variance, "data_variance")
        if data_mean.shape != data_variance.shape:
            msg = (
                "data_mean and data_variance must have one shape; got "
                f"{tuple(data_mean.shape)} and {tuple(data_variance.shape)}"
            )
            raise ValueError(msg)
        if not bool(data_mean.isfinite().all()):
            msg = "data_mean must be finite"
            raise ValueError(msg)
        single = data_variance.to(torch.float32)
        if not bool((single.isfinite() & (single > 0)).all()):
            msg = "data_variance must be finite and positive, in single precision"
            raise ValueError(msg)
        if mixing_logits is not None and not (
            isinstance(mixing_logits, Tensor) and bool(mixing_logits.isfinite().all())
        ):
            msg = f"mixing_logits must be a finite tensor or None; got {mixing_logits!r}"
            raise ValueError(msg)
        if mixing_logits is not None and inputs != "state":
            msg = f"mixing_logits must be None where inputs is {inputs!r}; they weigh noise"
            raise ValueError(msg)
        self.network = network
        self.sde = sde
        self.inputs = inputs
        self.mixing_logits = (
            None
            if mixing_logits is None
            else nn.Parameter(mixing_logits.detach().to(torch.float32).clone())
        )
        self.register_buffer("data_mean", data_mean.to(torch.float32))
        self.register_buffer("data_variance", single)
        # The host's float64 copy, of which the coefficients are made; not moved by .to(device).
        self._variance = self.data_variance.cpu().to(torch.float64)
        self._loads = 0  # how often other values were loaded

    @property
    def denoiser(self) -> ScoreDenoiser:
        """The denoiser D(u, σ) that the model has learnt, for sampling with other processes.

        Conditions are the model's, as in ``denoiser(u, sigma, condition=label)``. If the network is
        shown a state of several components, noise fills the state up; see `ScoreDenoiser`.
        """
        return ScoreDenoiser(self, fill=self.inputs == "state")

    def extra_repr(self) -> str:
        """Process and inputs, which the representation shows before the network."""
        return f"sde={self.sde!r}, inputs={self.inputs!r}"

    def forward(
        self,
        z: Tensor,
        t: TimeLike,
        *,
        prediction: Output = "score",
        condition: Tensor | None = None,
    ) -> Tensor:
        """Score of the driven components, or another prediction, ``(B, len(driven), *D)``.

        Parameters
        ----------
        z
            States ``(B, k, *D)``.
        t
            One time or ``(B,)``, above 0.
        prediction
            ``"score"``, ``"noise"``, ``"data"`` of shape ``(B, *D)``, or for processes of one
            component ``"velocity"`` or ``"flow"``; see `Conversion`. In the additive form these
            three stay exact at t = 1 of `cldsde.RectifiedFlow`, where nothing of the data is left.
        condition
            Of each sample, ``(B, ...)``, or of all, 0-dimensional; passed to the network as it is.
        """
        one_of(prediction, Output, "prediction")
        check_state(z, self.sde.components)
        table = coefficients_at(self, t, z, self._coefficients, z.dtype, self._loads)
        if prediction not in ("score", "noise"):
            times = score_times(t, z)
            if not self._of_data:
                noise = self._noise(z, table, condition)
                return Conversion.at(self.sde, times, "noise", prediction)(z, noise)
            data = self._data(z, table, condition)
            if prediction == "data":
                return data
            return Conversion.at(self.sde, times, "data", prediction)(z, data)
        noise = self._noise(z, table, condition)
        return apply_blocks(table.to_score, noise) if prediction == "score" else noise

    def data_prediction(self, z: Tensor, t: TimeLike, *, condition: Tensor | None = None) -> Tensor:
        """E[x_0 | z_t], ``(B, *D)``; see `forward`."""
        found: Tensor = self(z, t, prediction="data", condition=condition)
        return found

    def loss(
        self,
        pair: PerturbedData,
        *,
        prediction: Measured = "noise",
        weighting: Weighting = "reweighted",
        condition: Tensor | None = None,
    ) -> Tensor:
        """Score-matching loss of each sample, ``(B,)``; see `PerturbedData.loss`.

        Parameters
        ----------
        pair
            States and what is to be learnt there. Hybrid score matching shares its kernels with
            the score, so that they are computed once.
        prediction
            The prediction whose squared error counts: ``"noise"``, or for processes of one
            component ``"velocity"`` or ``"flow"``. The network's output means the same
            for each choice.
        weighting
            See `Weighting`.
        condition
            As `forward` takes it.
        """
        one_of(prediction, Measured, "prediction")
        if pair.conditioning == "all":
            # The noise given all of z_0 is in units of another root: only the score is the same.
            score = self(pair.z, pair.t, condition=condition)
            return pair.loss(score, "score", weighting=weighting, measured=prediction)
        coefficients = self._coefficients(pair.t, pair.kernel, pair.law)
        if isinstance(weighting, _LogSNRWeighting) and weighting.model is self and pair.t.ndim:
            known = weighting.of_law(pair.t, pair.law, coefficients)
            weighting = lambda t: known  # noqa: E731
        if prediction != "noise" and self._of_data:
            data = self._data(pair.z, coefficients.to(pair.z), condition)
            return pair.loss(data, "data", weighting=weighting, measured=prediction)
        noise = self._noise(pair.z, coefficients.to(pair.z), condition)
        return pair.loss(noise, "noise", weighting=weighting, measured=prediction)

    @property
    def _of_data(self) -> bool:
        """Whether `_data` gives the prediction of the data, by no detour through the noise."""
        return self.sde.components == 1 and self.mixing_logits is None

    def residual_variance(self, t: Tensor, prediction: Measured = "noise") -> Tensor:
        """Mean squared noise, velocity or flow that the reference leaves open, at times ``(n,)``.

        It is the loss of the untrained model on Gaussian data, and a density for `TimeSampler`
        that gives all times the same share of the training signal.
        """
        one_of(prediction, Measured, "prediction")
        if prediction == "noise":
            return self._coefficients(t).residual_variance()
        law = whiten(self.sde, self.sde.marginal(t), t)
        of = Combination.at(self.sde, law, t, prediction)
        scale = (of.determinant / of.sigma).square()
        return scale * self._coefficients(t).data_residual_variance()

    def log_snr_weighting(
        self, *, mean: float = 1.2, std: float = 1.2
    ) -> Callable[[Tensor], Tensor]:
        """Weights by which noise levels count as they do where they are drawn by `log_snr_density`.

        In the additive form, with one variance for all data, the network's target has unit size at
        every time. So weighted, the loss is the mean squared error of its output over noise levels
        with that density, the same for every process (Karras et al. 2022, §5); where several
        components are driven or variances differ, they count as they do at each time without it.

        Parameters
        ----------
        mean, std
            See `log_snr_density`, which is the density to draw times from.

        Returns
        -------
        callable
            A `Weighting`.
        """
        return _LogSNRWeighting(self, LogSNRDensity(self.sde, mean, std))

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._variance = self.data_variance.cpu().to(torch.float64)
        self._loads += 1

    def _coefficients(
        self, times: Tensor, kernel: Kernel | None = None, law: WhitenedLaw | None = None
    ) -> _Coefficients:
        if kernel is None or law is None:
            kernel = self.sde.marginal(times)
            law = whiten(self.sde, kernel, times)
        psi, signal, noise_root = law.psi.squeeze(-1), law.signal.squeeze(-1), law.driven_root()
        # A finite clock, also at times when nothing of the data is left.
        log_snr = (0.5 * law.information().log()).clamp_min(_LEAST_CLOCK)
        to_score = -triangular_inverse(noise_root).mT

        # One reference law for each entry of the variance, in axes (*, *V, k, k).
        ones = (1,) * self._variance.ndim

        def over_variance(blocks: Tensor) -> Tensor:
            return blocks.reshape(*psi.shape[:-1], *ones, *blocks.shape[-2:])

        spread = self._variance.sqrt()[..., None, None] * over_variance(law.psi)
        factor = joint_root(over_variance(kernel.root), spread)
        whitening = triangular_inverse(factor)
        precision = whitening[..., list(self.sde.driven)].mT @ whitening
        reference = over_variance(noise_root).mT @ precision
        gain = spread.mT @ whitening.mT @ whitening
        data = (self._variance.sqrt()[..., None, None] * gain).squeeze(-2)
        information = law.information().reshape(psi.shape[:-1] + ones)
        total = 1 + self._variance * information
        # Of one component the estimate is the state in other units.
        if self.inputs == "state" or self.sde.components == 1:
            inputs = factor.square().sum(-1).rsqrt()
        else:
            weights = (law.signal.mT @ law.inverse).reshape(*psi.shape[:-1], *ones, -1)
            inputs = weights / (information * total).sqrt()[..., None]
        signal = signal[..., -len(self.sde.driven) :].reshape(*psi.shape[:-1], *ones, -1)
        data_residual = (self._variance / total).sqrt()
        residual = data_residual[..., None] * signal
        axis = psi.ndim - 1
        return _Coefficients(
            psi,
            reference.movedim((-2, -1), (axis, axis + 1)),
            inputs.movedim(-1, axis),
            residual.movedim(-1, axis),
            data.movedim(-1, axis),
            data_residual,
            log_snr,
            to_score,
        )

    def _noise(self, z: Tensor, c: _Coefficients, condition: Tensor | None) -> Tensor:
        """Noise of the driven components, ``(B, d, *D)``."""
        centred, _ = self._centred(z, c)
        reference = (self._spread(c, c.reference, 2, z) * centred.unsqueeze(1)).sum(2)
        learnt = self._learnt(centred, c, condition).to(reference.dtype)
        if self.mixing_logits is None:
            return reference + self._spread(c, c.residual, 1, z) * learnt
        share, shape = self.mixing_logits.to(z).sigmoid(), tuple(z.shape[2:])
        axes = zip(reversed(share.shape), reversed(shape), strict=False)
        if share.ndim > len(shape) or any(own not in (1, size) for own, size in axes):
            msg = f"mixing_logits must broadcast with the data, {shape}; got {tuple(share.shape)}"
            raise ValueError(msg)
        return reference.lerp(learnt, share.expand_as(learnt))

    def _data(self, z: Tensor, c: _Coefficients, condition: Tensor | None) -> Tensor:
        """E[x_0 | z_t] of a process of one component, ``(B, *D)``."""
        centred, mean = self._centred(z, c)
        reference = mean + (self._spread(c, c.data, 1, z) * centred).sum(1)
        # n = (z − ψ x_0) / σ: what raises the noise lowers the data.
        learnt = self._learnt(centred, c, condition).to(reference.dtype)[:, 0]
        return reference - self._spread(c, c.data_residual, 0, z) * learnt

    def _spread(self, c: _Coefficients, field: Tensor, inner: int, z: Tensor) -> Tensor:
        """Batch axis in front, axes of V aligned with those of the data."""
        if c.log_snr.ndim == 0:
            field = field.unsqueeze(0)
        shape, variance_axes = field.shape[: 1 + inner], field.shape[1 + inner :]
        missing = z.ndim - 2 - len(variance_axes)
        return field.reshape(*shape, *(1,) * missing, *variance_axes)

    def _centred(self, z: Tensor, c: _Coefficients) -> tuple[Tensor, Tensor]:
        """Z − ψμ and μ."""
        axes = z.ndim - 2
        check_state(z, self.sde.components)
        if axes < max(1, self.data_mean.ndim):
            msg = (
                f"z must have shape (B, {self.sde.components}, *D) with the data axes of data_mean "
                f"and data_variance, {tuple(self.data_mean.shape)}, and one at least; "
                f"got {tuple(z.shape)}"
            )
            raise ValueError(msg)
        psi = c.psi.unsqueeze(0) if c.log_snr.ndim == 0 else c.psi
        mean = self.data_mean.to(z)
        return z - psi.reshape(-1, z.shape[1], *(1,) * axes) * mean, mean

    def _learnt(self, centred: Tensor, c: _Coefficients, condition: Tensor | None) -> Tensor:
        """Output of the network, ``(B, outputs, *D)``."""
        batch, clock = len(centred), c.log_snr.expand(len(centred))
        inputs = centred * self._spread(c, c.inputs, 1, centred)
        inputs = inputs.flatten(1, 2) if self.inputs == "state" else inputs.sum(1)
        learnt: Tensor
        if condition is None:
            learnt = self.network(inputs, clock)
        else:
            learnt = self.network(inputs, clock, condition.expand(batch, *condition.shape[1:]))
        data = centred.shape[2:]
        outputs = len(self.sde.driven) if self.inputs == "state" else 1
        wanted = (batch, outputs * data[0], *data[1:])
        if learnt.shape != wanted:
            msg = f"network must return shape {wanted}; got {tuple(learnt.shape)}"
            raise ValueError(msg)
        return learnt.reshape(batch, outputs, *data)


def _as_tensor(value: Tensor | float, name: str) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(as_number(value, name))


@dataclass(frozen=True, eq=False)
class _LogSNRWeighting:
    """`MixedScore.log_snr_weighting`: a density of times over the mean square of c_out."""

    model: MixedScore
    density: LogSNRDensity

    def __call__(self, t: Tensor) -> Tensor:
        return self.density(t) / self.model.residual_variance(t)

    def of_law(self, times: Tensor, law: WhitenedLaw, coefficients: _Coefficients) -> Tensor:
        """The same, from what the loss has found already."""
        return self.density.of_law(times, law) / coefficients.residual_variance()
