r"""Mixed score: a Gaussian reference in closed form plus a network.

docs/explanation/hybrid-score-matching.md derives the additive form n = n_ref + c_out n_θ of the
noise. For data N(μ, s₀²) the reference n_ref is the best prediction of the noise. The remaining
noise then has the covariance s₀² c_d c_dᵀ / (1 + s₀² cᵀc) with c = L⁻¹ψ. So the network's target
has unit size at every t with c_out = s₀ c_d / √(1 + s₀² cᵀc).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import as_number, check_state, one_of
from cldsde.linear.covariance import joint_root, triangular_inverse
from cldsde.linear.kernel import Kernel
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.renamed import warn_of_old
from cldsde.score.conversion import MEASURED, Prediction, WhitenedKernel, whiten
from cldsde.score.matching import PerturbedData, Weighting
from cldsde.score.network_score import Inputs, NetworkScore
from cldsde.score.time_sampling import check_normal, normal_kappa
from cldsde.score.times import on_device

_LEAST_CLOCK = -10.0


class _Coefficients(NamedTuple):
    """Coefficients at times of shape ``*``, with one reference for each of V variances."""

    psi: Tensor  # (*, k), maps the data to the mean of the state
    reference: Tensor  # (*, d, k, V), maps z − ψμ to n_ref
    inputs: Tensor  # (*, k, V), scales the network's input to unit size
    residual: Tensor  # (*, d, V), c_out, scales the network's output
    data: Tensor  # (*, k, V), maps z − ψμ to the reference's x_0 − μ
    data_residual: Tensor  # (*, V), standard deviation of x_0 given the reference and z
    kappa: Tensor  # (*), κ = ½ log ψᵀΣ⁻¹ψ, the network's time input
    to_score: Tensor  # (*, d, d), −L_dd^{−T}

    def residual_variance(self) -> Tensor:
        """Mean square of c_out, ``(*)``."""
        return self.residual.square().mean((-2, -1))


class MixedScore(NetworkScore[_Coefficients]):
    """Mixed score: a Gaussian reference plus a network that predicts the rest of the noise.

    Parameters
    ----------
    network
        Module called as (state, clock) with ``(B, k·C, *S)`` and ``(B,)`` for data ``(B, C, *S)``.
        It returns ``(B, len(driven)·C, *S)``. Each component of the state is scaled to unit size.
        The clock is κ(t) = ½ log SNR (`LinearSDE.kappa`), and at least −10. A conditional network
        is called as (state, clock, condition).
    sde
        The forward process.
    data_mean, data_variance
        μ and s₀² > 0 of the reference: numbers, or tensors that broadcast with each other and with
        ``(C, *S)``, e.g. ``(C, 1, 1)``.
    inputs
        ``"state"``: the network's input is the state. ``"estimate"``: its input is the best
        unbiased estimate of the data, û of `DenoiserScore`, ``(B, C, *S)``, and its output has the
        same shape. Such a network serves any process at the signal-to-noise ratios of its training.
    mixing_logits
        None: the additive form, noise = reference + c · network, whose c(t) gives the network's
        target unit size. A tensor that broadcasts with ``(C, *S)``, e.g. −3 in ``(C, 1, 1)``: the
        convex form, noise = (1 − a) · reference + a · network (Vahdat, Kreis and Kautz 2021, §3.2).
        Its learnt weights a = 1/(1 + e^{−logit}) start from these logits. For ``inputs="state"``
        only.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, mean, variance or logits are not finite, mean and
        variance do not broadcast, the variance is not positive, or logits are given with
        ``inputs="estimate"``.

    Examples
    --------
    A network that was trained with VP gives a score of CLD as well:

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
        try:
            shape = torch.broadcast_shapes(data_mean.shape, data_variance.shape)  # type: ignore[no-untyped-call]
        except RuntimeError:
            raise ValueError(
                "data_mean and data_variance must broadcast to one shape; got "
                f"{tuple(data_mean.shape)} and {tuple(data_variance.shape)}"
            ) from None
        # Loading a state dict writes into these tensors, so they are copies of the caller's.
        data_mean, data_variance = (x.expand(shape).clone() for x in (data_mean, data_variance))
        if not bool(data_mean.isfinite().all()):
            raise ValueError(f"data_mean must be finite; got {data_mean.tolist()}")
        single = data_variance.to(torch.float32)
        if not bool((single.isfinite() & (single > 0)).all()):
            raise ValueError(
                "data_variance must be finite and positive in single precision; got "
                f"{data_variance.tolist()}"
            )
        self.mixing_logits = None
        if mixing_logits is not None:
            if not (isinstance(mixing_logits, Tensor) and bool(mixing_logits.isfinite().all())):
                msg = f"mixing_logits must be a finite tensor or None; got {mixing_logits!r}"
                raise ValueError(msg)
            if inputs != "state":
                raise ValueError(
                    "mixing_logits must be None unless inputs='state', because they weight noise; "
                    f"got inputs={inputs!r}"
                )
            self.mixing_logits = nn.Parameter(mixing_logits.detach().to(torch.float32).clone())
        self.network = network
        self.sde = sde
        self.inputs = inputs
        # `_estimate` then gives the data directly, without the noise.
        self.predicts_data = sde.components == 1 and mixing_logits is None
        self.register_buffer("data_mean", data_mean.to(torch.float32))
        self.register_buffer("data_variance", single)
        # A float64 copy on the CPU for the coefficients; see `_state_version`.
        self._variance = single.flatten().cpu().to(torch.float64)
        self._read: tuple[Tensor | None, int] = None, 0
        self._changes = 0

    def extra_repr(self) -> str:
        """Process and inputs, for the representation."""
        return f"sde={self.sde!r}, inputs={self.inputs!r}"

    def _predict(
        self, z: Tensor, c: _Coefficients, prediction: Prediction, condition: Tensor | None
    ) -> tuple[Prediction, Tensor]:
        direct = self.predicts_data and prediction not in ("score", "noise")
        source: Prediction = "data" if direct else "noise"
        value = self._estimate(source, z, c, condition)
        if prediction == "score":
            return "score", apply_blocks(c.to_score, value)
        return source, value

    def _direct_loss(
        self, pair: PerturbedData, kind: Prediction, weighting: Weighting, condition: Tensor | None
    ) -> Tensor | None:
        if pair.conditioning == "all":
            return None  # the noise given all of z_0 belongs to another root, so compare scores
        coefficients = self._coefficients(pair.t, pair.kernel, pair.whitened)
        if isinstance(weighting, _KappaWeighting) and weighting.model is self and pair.t.ndim:
            known = weighting.of_known(pair.whitened, coefficients)
            weighting = lambda t: known  # noqa: E731
        direct = self.predicts_data and kind != "noise"
        source: Prediction = "data" if direct else "noise"
        moved = _Coefficients(*on_device(coefficients, pair.z.dtype, pair.z.device))
        value = self._estimate(source, pair.z, moved, condition)
        return pair.loss(value, source, weighting=weighting, measured=kind)

    def residual_variance(self, t: Tensor, prediction: Prediction = "noise") -> Tensor:
        """Mean squared error of the reference's noise, velocity or flow, at times ``(n,)``.

        It is the loss on Gaussian data if the network returns 0. As the density of a `TimeSampler`
        it gives all times the same share of the training signal.
        """
        one_of(prediction, MEASURED, "prediction")
        coefficients = self._coefficients(t)
        if prediction == "noise":
            return coefficients.residual_variance()
        convert = whiten(self.sde, self.sde.marginal(t), t).convert("data", prediction)
        scale = convert.value[..., 0, 0].square()
        return scale * coefficients.data_residual.square().mean(-1)

    def log_snr_weighting(self, **options: float) -> Callable[[Tensor], Tensor]:
        """Old name of `kappa_weighting`, which warns."""
        warn_of_old("log_snr_weighting", "kappa_weighting")
        return self.kappa_weighting(**options)

    def kappa_weighting(self, *, mean: float = 1.2, std: float = 1.2) -> Callable[[Tensor], Tensor]:
        """EDM-style weighting: errors count by the density of noise levels, for every process.

        In the additive form, with one variance for all data, the network's target has unit size at
        every time. With this weighting the loss is the mean squared error of the network's output
        over noise levels with the density of `kappa_density` (Karras et al. 2022, §5). It is the
        same for every process. The relative weights of several driven components, or of different
        variances, stay as they are at each time.

        The result is a `Weighting`. See `kappa_density` for ``mean`` and ``std``; it is also the
        density to draw times from.
        """
        check_normal(mean, std)
        return _KappaWeighting(self, mean, std)

    def _state_version(self) -> int:
        """Number of changes of ``data_variance``; copies it to the CPU if it was written to."""
        buffer, (known, version) = self.data_variance, self._read
        # Tensors of inference mode do not count the writes to them.
        if buffer.is_inference() or buffer is not known or buffer._version != version:
            with torch.inference_mode(False):
                values = buffer.detach().flatten().cpu()
                # A model in half precision keeps the digits that its buffer has lost.
                if not torch.equal(self._variance.to(values.dtype), values):
                    self._variance = values.to(torch.float64, copy=True)
                    self._changes += 1
            self._read = buffer, 0 if buffer.is_inference() else buffer._version
        return self._changes

    def _coefficients(
        self, times: Tensor, kernel: Kernel | None = None, whitened: WhitenedKernel | None = None
    ) -> _Coefficients:
        if kernel is None or whitened is None:
            kernel = self.sde.marginal(times)
            whitened = whiten(self.sde, kernel, times)
        psi, signal, noise_root = whitened.psi, whitened.signal, whitened.driven_root()
        information = whitened.information()
        # Keep the clock finite at times when nothing of the data is left.
        kappa = (0.5 * information.log()).clamp_min(_LEAST_CLOCK)
        self._state_version()  # reads the variance again if it was written to
        # There is one reference for each entry of the variance, in axes (*, V, k, k).
        variance, deviation = self._variance, self._variance.sqrt()
        spread = deviation[:, None, None] * psi.unsqueeze(-3)
        factor = joint_root(kernel.root.unsqueeze(-3), spread)
        whitening = triangular_inverse(factor)
        precision = whitening[..., list(self.sde.driven)].mT @ whitening
        reference = noise_root.unsqueeze(-3).mT @ precision
        gain = spread.mT @ whitening.mT @ whitening
        data = deviation[:, None] * gain.squeeze(-2)
        information = information.unsqueeze(-1)
        total = 1 + variance * information
        # For one component the estimate is the state in other units.
        if self.inputs == "state" or self.sde.components == 1:
            inputs = factor.square().sum(-1).rsqrt()
        else:
            inputs = signal.mT @ whitened.inverse / (information * total).sqrt()[..., None]
        data_residual = (variance / total).sqrt()
        residual = data_residual.unsqueeze(-2) * signal[..., -len(self.sde.driven) :, :]
        to_score = -triangular_inverse(noise_root).mT
        return _Coefficients(
            psi.squeeze(-1),
            reference.movedim(-3, -1),
            inputs.mT,
            residual,
            data.mT,
            data_residual,
            kappa,
            to_score,
        )

    def _estimate(
        self, source: Prediction, z: Tensor, c: _Coefficients, condition: Tensor | None
    ) -> Tensor:
        """Noise of the driven components ``(B, d, *D)``, or for k = 1 the data ``(B, *D)``."""
        centred, mean = self._centred(z, c)
        learnt = self._learnt(centred, c, condition)
        if source == "data":
            reference = mean + (self._spread(c, c.data, 1, z) * centred).sum(1)
            # n = (z − ψ x_0) / σ, so the network's noise enters the data with a minus sign.
            return reference - self._spread(c, c.data_residual, 0, z) * learnt[:, 0]
        reference = (self._spread(c, c.reference, 2, z) * centred.unsqueeze(1)).sum(2)
        if self.mixing_logits is None:
            return reference + self._spread(c, c.residual, 1, z) * learnt
        share, shape = self.mixing_logits.to(z).sigmoid(), tuple(z.shape[2:])
        axes = zip(reversed(share.shape), reversed(shape), strict=False)
        if share.ndim > len(shape) or any(own not in (1, size) for own, size in axes):
            msg = f"mixing_logits must broadcast with the data, {shape}; got {tuple(share.shape)}"
            raise ValueError(msg)
        return reference.lerp(learnt, share.expand_as(learnt))

    def _spread(self, c: _Coefficients, field: Tensor, inner: int, z: Tensor) -> Tensor:
        """Reshape coefficients: batch axis in front, variances aligned with the data's axes."""
        if c.kappa.ndim == 0:
            field = field.unsqueeze(0)
        own = self.data_variance.shape
        return field.reshape(*field.shape[: 1 + inner], *(1,) * (z.ndim - 2 - len(own)), *own)

    def _centred(self, z: Tensor, c: _Coefficients) -> tuple[Tensor, Tensor]:
        """Return the pair z − ψμ and μ."""
        axes = z.ndim - 2
        check_state(z, self.sde.components)
        if axes < max(1, self.data_mean.ndim):
            raise ValueError(
                f"z must have shape (B, {self.sde.components}, *D) with at least one data axis and "
                f"the axes of data_mean and data_variance, {tuple(self.data_mean.shape)}; "
                f"got {tuple(z.shape)}"
            )
        psi = c.psi.unsqueeze(0) if c.kappa.ndim == 0 else c.psi
        mean = self.data_mean.to(z)
        return z - psi.reshape(-1, z.shape[1], *(1,) * axes) * mean, mean

    def _learnt(self, centred: Tensor, c: _Coefficients, condition: Tensor | None) -> Tensor:
        """Output of the network, ``(B, outputs, *D)``."""
        inputs = centred * self._spread(c, c.inputs, 1, centred)
        state = self.inputs == "state"
        inputs = inputs.flatten(1, 2) if state else inputs.sum(1)
        outputs, data = len(self.sde.driven) if state else 1, centred.shape[2:]
        learnt = self._evaluate(inputs, c.kappa, condition, outputs * data[0])
        return learnt.reshape(len(centred), outputs, *data)


def _as_tensor(value: Tensor | float, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(as_number(value, name), device=torch.get_default_device())


@dataclass(frozen=True, eq=False)
class _KappaWeighting:
    """Result of `MixedScore.kappa_weighting`: a density of times divided by mean c_out²."""

    model: MixedScore
    mean: float
    std: float

    def __call__(self, t: Tensor) -> Tensor:
        kernel = self.model.sde.marginal(t)
        whitened = whiten(self.model.sde, kernel, t)
        return self.of_known(whitened, self.model._coefficients(t, kernel, whitened))

    def of_known(self, whitened: WhitenedKernel, coefficients: _Coefficients) -> Tensor:
        """The weights from kernel and coefficients that the loss has computed already."""
        density = normal_kappa(self.model.sde, whitened, self.mean, self.std)
        return density / coefficients.residual_variance()
