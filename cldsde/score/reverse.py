"""Reverse process: the time reversal of a forward process, defined by a score."""

from __future__ import annotations

from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import TimeLike, check_at_least, check_state, described, shaped
from cldsde.linear.identity import same_process
from cldsde.linear.reprs import constructor_repr
from cldsde.linear.sde import LinearSDE, check_process
from cldsde.score.conversion import Conversion, Prediction
from cldsde.score.protocol import WRAP_DENOISER, ScoreFunction, as_score
from cldsde.score.times import KnownTimes, PlannedTime, score_argument, score_times


def checked_score(value: Tensor, z: Tensor, driven: int) -> Tensor:
    """Return a score's result in the state's dtype; raise unless it is ``(B, driven, *D)``."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"score must return a real floating-point tensor; got {described(value)}")
    shape, got = (len(z), driven, *z.shape[2:]), tuple(value.shape)
    if got != shape:
        msg = f"score must return shape {shape}, one row per driven component; got {got}"
        raise ValueError(f"{msg} for states of shape {tuple(z.shape)}. {WRAP_DENOISER}")
    if value.device != z.device:
        msg = f"score must return a tensor on the state's device, {z.device}; got {value.device}"
        raise ValueError(msg)
    return value if value.dtype == z.dtype else value.to(z.dtype)


class ReverseProcess:
    r"""Reverse process: the time reversal of a linear SDE with a given score.

    .. math::
        \text{reverse SDE} \quad dz &= [F z − G G^⊤ s]\,dt + G\,d\bar w \\
        \text{probability flow} \quad dz &= [F z − \tfrac12 G G^⊤ s]\,dt \\
        \text{the family between} \quad dz &= [F z − \tfrac{1+λ^2}2 G G^⊤ s]\,dt + λ G\,d\bar w

    t is forward time in all of them, and they are integrated from t = 1 down (Anderson 1982; Song
    et al. 2021, eqs. 6 and 13). All have the marginals of the forward process. λ ≥ 0 is the
    stochasticity, 1 for the reverse SDE and 0 for the probability flow. G Gᵀ s needs the score of
    the driven components only.

    Parameters
    ----------
    sde
        The forward process.
    score
        A `Score`, or any function score(z, t) of states ``(B, k, *D)`` and times ``(B,)`` that
        returns ``(B, len(driven), *D)``; the attribute ``score`` is a `Score`.

    Raises
    ------
    TypeError, ValueError
        If ``sde`` is not a `LinearSDE`, or ``score`` cannot be called, is a denoiser, or belongs to
        a process with other dynamics or another initial covariance.
    """

    def __init__(self, sde: LinearSDE, score: ScoreFunction) -> None:
        check_process(sde)
        self.sde = sde
        self.score = as_score(score)
        other = self.score.sde
        if other is not None and not same_process(sde, other):
            raise ValueError(
                f"score belongs to another process, {other!r}, than sde, {sde!r}: drift, diffusion "
                "or initial covariance differ. Use the score of sde, or wrap the score's denoiser "
                "in a DenoiserScore"
            )

    def __repr__(self) -> str:
        return constructor_repr(self)

    def drift(self, z: Tensor, t: TimeLike, *, stochasticity: float = 1.0) -> Tensor:
        """Drift F z − (1 + λ²)/2 GGᵀ s in forward time, ``(B, k, *D)``; λ is the stochasticity."""
        check_at_least(stochasticity, 0.0, "stochasticity")
        times = score_times(t, check_state(z, self.sde.components))
        G = self.sde.diffusion(times)
        pull = 0.5 * (1 + stochasticity**2) * (G @ G.mT)[..., list(self.sde.driven)]
        score = self.evaluate(z, times)
        return apply_blocks(self.sde.drift(times), z) - apply_blocks(pull, score)

    def probability_flow(self, z: Tensor, t: TimeLike) -> Tensor:
        """Velocity F z − ½ GGᵀ s of the probability-flow ODE in forward time, ``(B, k, *D)``."""
        return self.drift(z, t, stochasticity=0.0)

    def diffusion(self, t: TimeLike, *, stochasticity: float = 1.0) -> Tensor:
        """Diffusion matrix λ G(t), ``(*t.shape, k, r)`` float64 on the CPU."""
        check_at_least(stochasticity, 0.0, "stochasticity")
        return stochasticity * self.sde.diffusion(t)

    def data_prediction(self, z: Tensor, t: TimeLike) -> Tensor:
        """Data prediction E[x_0 | z_t] from the driven score, ``(B, *D)``; one score evaluation.

        If the driven score does not determine x_0 at a time, it raises as `Conversion.at`.
        """
        return self._converted(z, t, "data")

    def full_score(self, z: Tensor, t: TimeLike) -> Tensor:
        """Score ∂ log p_t(z)/∂z of all components, ``(B, k, *D)``; raises as `data_prediction`."""
        return self._converted(z, t, "full_score")

    def _converted(self, z: Tensor, t: TimeLike, target: Prediction) -> Tensor:
        times = score_times(t, check_state(z, self.sde.components))
        return Conversion.at(self.sde, times, "score", target)(z, self.evaluate(z, times))

    def evaluate(self, z: Tensor, times: Tensor) -> Tensor:
        """Evaluate and check the score at float64 times on the CPU, ``()`` or ``(B,)``."""
        argument = score_argument(times, z).expand(len(z))
        return checked_score(self.score(z, argument), z, len(self.sde.driven))


class KnownScore:
    """Score of a process at known times; it counts evaluations and checks their results."""

    def __init__(
        self, process: ReverseProcess, times: KnownTimes, z: Tensor, moved: Tensor | None = None
    ) -> None:
        self.nfev = 0
        self._score, self._driven = process.score, len(process.sde.driven)
        self._arguments = times.arguments(z, moved)
        # Solvers with times per sample count by themselves.
        shared = times.times.ndim == 1
        self._counts = self._score.evaluations(times.times).tolist() if shared else None

    def __call__(self, z: Tensor, number: int) -> Tensor:
        """Score ``(B, d, *D)`` of states at the time with the given index."""
        z, at = self._counted(z, number)
        return checked_score(self._score(z, at.argument, planned=at), z, self._driven)

    def data_prediction(self, z: Tensor, number: int) -> Tensor:
        """E[x_0 | z_t] ``(B, 1, *D)`` by the score's own method."""
        z, at = self._counted(z, number)
        value = self._score.data_prediction(z, at.argument, planned=at)
        if not isinstance(value, Tensor) or value.shape != z[:, 0].shape:
            raise ValueError(
                f"score.data_prediction must return shape {tuple(z[:, 0].shape)}; "
                f"got {shaped(value)}"
            )
        return value.to(z).unsqueeze(1)

    def _counted(self, z: Tensor, number: int) -> tuple[Tensor, PlannedTime]:
        self.nfev += 0 if self._counts is None else self._counts[number]
        return z.contiguous(), self._arguments[number]


def check_reverse_process(process: object) -> None:
    """Raise TypeError unless ``process`` is a `ReverseProcess`."""
    if not isinstance(process, ReverseProcess):
        raise TypeError(f"process must be a ReverseProcess; got {type(process).__name__}")
