"""Exponential multistep solver for the probability flow and the reverse SDE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.checks import as_number, check_at_least, one_of
from cldsde.linear.kappa import vp_time
from cldsde.linear.sde import LinearSDE
from cldsde.renamed import current, takes_old, warn_of_old
from cldsde.score import Conversion, ReverseProcess

from .base import DATA_DETERMINED, Facts, GridSolver, Memory, ScoreAt
from .combine import Block, add_to, as_blocks, combine
from .multistep_coefficients import Steps, curvature, data_steps, lagrange, noise_steps
from .noise import NoiseSource

_LEAST_KAPPA = -8.0  # below it a float32 score determines three digits of the data prediction

Prediction = Literal["data", "noise"]
Variable = Literal["time", "kappa", "vp_time"]
Weights = Literal["exact", "published", "dpm_solver_3m", "sa_solver"]
_VARIABLES: dict[Variable, Callable[[LinearSDE, Tensor], Tensor]] = {
    "time": lambda _, t: t,
    "kappa": lambda sde, t: sde.kappa(t),
    # Nothing of the data is left at κ = −20: x̂₀ is their mean there, and at pure noise.
    "vp_time": lambda sde, t: vp_time(sde.kappa(t).clamp_min(-20.0)),
}


class _Tables(NamedTuple):
    """Blocks of each step; predictions have m rows, 1 for the data and k for the noise."""

    # m×k and m×d: the prediction from state and driven score. None if the step uses the score's own
    # data prediction.
    predict_state: list[Block | None]
    predict_score: list[Block]
    move: list[Block]  # k×k
    noise: list[Block]  # k×k, or no columns if the step is deterministic
    weights: list[list[Block]]  # of the predictions, newest first, k×m each
    # Weights of predictions in the correction of a step, the one at the step's end first.
    corrector: list[list[Block]]


@takes_old(log_snr="kappa")
@dataclass(frozen=True)
class LevelNoise:
    """Stochasticity λ as a function of the noise level, for any process.

    Values out of range raise a ValueError, and values that are not numbers a TypeError.

    Parameters
    ----------
    kappa
        Increasing finite κ = ½ log SNR, one or more.
    stochasticity
        λ ≥ 0 at each of them; linear in κ between them and constant outside.

    Examples
    --------
    >>> noise = LevelNoise((-3.0, 0.0, 2.0), (0.5, 1.5, 1.0))
    >>> noise.at(torch.tensor([-4.0, -1.5, 2.0], dtype=torch.float64))
    tensor([0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """

    kappa: tuple[float, ...]
    stochasticity: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("kappa", "stochasticity"):
            object.__setattr__(self, name, numbers(getattr(self, name), name))
        kappa, levels = self.kappa, self.stochasticity
        increasing = all(x < y for x, y in pairwise(kappa))
        if not (kappa and increasing and all(map(math.isfinite, kappa))):
            raise ValueError(f"kappa must be increasing finite κ, one or more; got {kappa!r}")
        if len(levels) != len(kappa) or not all(0 <= x < math.inf for x in levels):
            msg = f"stochasticity must be one finite λ ≥ 0 for each of {len(kappa)} κ; "
            raise ValueError(f"{msg}got {levels!r}")

    @property
    def log_snr(self) -> tuple[float, ...]:
        """Old name of ``kappa``."""
        warn_of_old("LevelNoise.log_snr", "kappa")
        return self.kappa

    def at(self, kappa: Tensor) -> Tensor:
        """λ at values of κ ``(n,)``, float64 on the CPU."""
        found = np.interp(kappa.detach().numpy(), self.kappa, self.stochasticity)
        return torch.as_tensor(found, device="cpu")


def numbers(values: object, name: str) -> tuple[float, ...]:
    """A sequence of numbers as a tuple; raise a TypeError that names it for something else."""
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    try:
        return tuple(as_number(x, name) for x in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of numbers; got {values!r}") from error


@dataclass(frozen=True, kw_only=True)
class ExponentialMultistep(GridSolver):
    r"""Exponential multistep solver; DDIM, DPM-Solver++, UniPC and gDDIM are special cases.

    The data prediction is extrapolated by a polynomial (Adams–Bashforth), and the rest is solved
    exactly. With x̂₀(z, t) = E[x_0 | z_t] the score is −Σ⁻¹(z − ψx̂₀). The process of stochasticity
    λ (0: probability flow, 1: reverse SDE) is then linear except for x̂₀,

    .. math::
        z_u = Φ_λ(u,t)\,z_t + \sum_j B_j\,\hat x_0(t_j) + ζ, \qquad
        B_j = −\tfrac{1+λ^2}2 ∫_t^u Φ_λ(u,τ)\,G G^⊤ Σ_τ^{-1} ψ(τ)\,ℓ_j(τ)\,dτ,

    with ζ of covariance Σ_u − Φ_λ Σ_t Φ_λᵀ and Lagrange polynomials ℓ_j through the last ``order``
    predictions. Each step takes one score evaluation. The data prediction follows from the driven
    score, so a network for the score of the velocity is enough. Options that are out of range or
    exclude each other raise a ValueError.

    `ddim`, `ddpm`, `dpm_solver_pp`, `unipc`, `deis` and `sa_solver` return the special cases that
    equal these methods for one component (k = 1). For k > 1, λ = 0 and ``prediction="noise"`` it
    is gDDIM.

    Parameters
    ----------
    order
        Number of predictions that a step uses: 1, 2 or 3. The first steps have fewer.
    stochasticity
        λ ≥ 0; a `LevelNoise`; or a function of float64 times ``(n,)`` that returns ``(n,)``. Each
        step uses the value at its start.
    corrector
        Whether to repeat each step except the last with the prediction at its end. The next step
        needs this prediction anyway, so NFE stay the same. For ``prediction="data"`` only.
    prediction
        ``"data"``: as above. ``"noise"``: polynomials through n = −R_tᵀs with gDDIM's root R_t, for
        λ = 0 and without corrector.
    variable
        Variable of the polynomials ℓ_j: ``"time"``; κ = ½ log ψᵀΣ⁻¹ψ with ``"kappa"``, as
        published for k = 1; or the time at which the default `cldsde.VPSDE` has the same κ, with
        ``"vp_time"``. On `vp_times`, ``"vp_time"`` gives every process of one component the same
        samples.
    weights
        ``"exact"``; or, for ``variable="kappa"``, with B the weight of a constant, H the step in κ
        and H' the distance of two points in κ:

        - ``"published"``: formulas of two points weight their difference by B H/(2H'), as in
          DPM-Solver++(2M) and UniPC
        - ``"dpm_solver_3m"``: formulas of three points take half the quadratic term of their
          polynomial, as published code of order 3 does; needs ``order=3`` without corrector
        - ``"sa_solver"``: as ``"published"``, with B cH/(1 − exp(−cH)) in place of B, where
          c = 1 + λ²; needs ``prediction="data"``

    Notes
    -----
    For λ = 0 the order is ``order``, plus 1 with the corrector, and at most 3. Solvers of order 3
    always correct the first step, except with ``prediction="noise"`` or
    ``weights="dpm_solver_3m"``. With these two, ``order=3`` claims order 2. For λ > 0 the weak
    order is the same but at most 2. If the data are a single point, every order is exact in one
    step.

    Polynomials in log-SNR were designed for one component. For CLD with an exact score, order 3
    with the corrector is less accurate with them, on `root_times` and `logistic_times`. See
    `RECOMMENDED` for settings of networks, and `logistic_times` for exact scores.

    References
    ----------
    Zhang and Chen 2023 (DEIS); Zhang, Tao and Chen 2023 (gDDIM); Lu et al. 2022 (DPM-Solver++);
    Zhao et al. 2023 (UniPC); Xue et al. 2023 (SA-Solver).
    """

    order: int = 2
    stochasticity: float | LevelNoise | Callable[[Tensor], Tensor] = 0.0
    corrector: bool = False
    prediction: Prediction = "data"
    variable: Variable = "time"
    weights: Weights = "exact"

    @property
    def facts(self) -> Facts:
        """Facts that hold for these options."""
        third = self.prediction == "data" and self.weights != "dpm_solver_3m"
        order = min(self.order + self.corrector, 3 if third else 2)
        deterministic = self.stochasticity == 0
        return Facts(
            applies_to=DATA_DETERMINED,
            nfe_per_step=1,
            weak_order=None if deterministic else min(order, 2),
            ode_order=order if deterministic else None,
            state_on_grid=not self._corrects(1),
            encodes=deterministic,
            score_at_start=True,
        )

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3; got {self.order!r}")
        one_of(self.prediction, Prediction, "prediction")
        variable = current(self.variable, "variable", log_snr="kappa")
        object.__setattr__(self, "variable", variable)
        one_of(self.variable, Variable, "variable")
        one_of(self.weights, Weights, "weights")
        if not (callable(self.stochasticity) or isinstance(self.stochasticity, LevelNoise)):
            check_at_least(self.stochasticity, 0.0, "stochasticity")
        if self.prediction == "noise" and self.stochasticity != 0:
            raise ValueError(
                "stochasticity must be 0 with prediction='noise', which is deterministic; got "
                f"{self.stochasticity!r}. Use prediction='data'"
            )
        if self.prediction == "noise" and self.corrector:
            raise ValueError(
                "corrector must be False with prediction='noise', because it is unstable with few "
                "steps; use prediction='data'"
            )
        if self.weights != "exact" and self.variable != "kappa":
            raise ValueError(
                f"variable must be 'kappa' with weights={self.weights!r}; got {self.variable!r}"
            )
        if self.weights == "dpm_solver_3m" and (self.order != 3 or self.corrector):
            raise ValueError(
                "weights='dpm_solver_3m' needs order=3 and corrector=False; got "
                f"order={self.order} and corrector={self.corrector}"
            )
        if self.weights == "sa_solver" and self.prediction != "data":
            raise ValueError(
                f"prediction must be 'data' with weights='sa_solver'; got {self.prediction!r}"
            )

    def prepare(self, process: ReverseProcess, times: Tensor) -> _Tables:
        """Blocks of all steps."""
        sde = process.sde
        if float(times.min()) <= 0:
            verb, advice = "start", "draw states at a t > 0"
            if float(times[-1]) <= 0:
                verb, advice = "end", "finish with denoise=True"
            raise ValueError(
                f"times must {verb} above 0 for ExponentialMultistep, because the distribution "
                f"given the data has no density at 0; {advice} instead"
            )
        undetermined = self._undetermined(process, times)
        # Undetermined steps do not use the conversion. The least noisy time always has one.
        known = torch.where(undetermined, times.min(), times[:-1])
        convert = Conversion.at(sde, known, "score", "data")
        state, score = convert.state, convert.value
        # The weights of a single prediction need no quadrature.
        along = self.order > 1 or self._corrects(1)
        if self.prediction == "data":
            levels = self.stochasticities(sde, times[:-1])
            steps = data_steps(sde, times, levels, along=along)
        else:
            levels = torch.zeros_like(times[:-1])
            steps, inverse = noise_steps(sde, times, along=along)
            psi = sde.transition_matrix(torch.zeros_like(times[:-1]), times[:-1])[..., :1]
            state, score = inverse - inverse @ psi @ state, -inverse @ psi @ score
        x = [_VARIABLES[self.variable](sde, t) for t in (times, steps.nodes)]
        blocks = zip(as_blocks(state), undetermined.tolist(), strict=True)
        # SA-Solver weights a difference by the length of the step and not by its integral.
        rate = 1 + levels.square() if self.weights == "sa_solver" else None
        weights = self._weights(steps, x, rate, offset=0)
        corrections: list[list[Block]] = []
        if self._corrects(1):
            corrected = self._weights(steps, x, rate, offset=1)
            corrected[:, 1:] -= weights
            corrections = corrected.tolist()
        return _Tables(
            [None if own_prediction else block for block, own_prediction in blocks],
            as_blocks(score),
            as_blocks(steps.move),
            as_blocks(steps.noise),
            weights.tolist(),
            corrections,
        )

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The start of each step."""
        return times[:-1]

    def step(
        self, z: Tensor, memory: Memory, tables: _Tables, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Predict at the state, correct the step that led to it, and take the next step."""
        state = tables.predict_state[i]
        if state is None:
            predictions = [score.data_prediction(z, i)]
        else:
            predictions = [combine((state, z), (tables.predict_score[i], score(z, i)))]
        predictions += memory
        if i > 0 and self._corrects(i):
            z = combine(*zip(tables.corrector[i - 1], predictions, strict=False)).add_(z)
        kept = predictions[: self.order if self.corrector else self.order - 1]
        # The first steps have fewer weights.
        weighted = zip(tables.weights[i], predictions, strict=False)
        out = combine((tables.move[i], z), *weighted)
        # Free these tensors before drawing noise, to hold one state less.
        del z, weighted, predictions
        if columns := len(tables.noise[i][0]):
            out = add_to(out, (tables.noise[i], noise.normal(out, columns)))
        return out, tuple(kept)

    def noise_roots(self, tables: _Tables) -> list[Block] | None:
        """Noise roots of the steps; None if they are corrected or deterministic."""
        noisy = all(len(block[0]) for block in tables.noise)
        return tables.noise if noisy and not self._corrects(1) else None

    def _corrects(self, i: int) -> bool:
        """Whether the step that led to time i is corrected; order 3 always corrects the first."""
        third = self.order == 3 and self.prediction == "data" and self.weights != "dpm_solver_3m"
        return self.corrector or (third and i == 1)

    def _undetermined(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """Steps at whose start the score does not determine the data prediction accurately."""
        kappa = process.sde.kappa(times)
        undetermined = kappa[:-1] < _LEAST_KAPPA
        lost = kappa == -torch.inf
        if bool(lost.any()) and (self.prediction == "noise" or self.variable == "kappa"):
            reason = "prediction='noise'" if self.prediction == "noise" else "variable='kappa'"
            raise ValueError(
                f"times must not reach t = {float(times[lost].max()):g} with {reason}, because "
                f"nothing of the data is left there; take t ≤ {process.sde.regular_until:.15g}, "
                "or prediction='data' with variable='time'"
            )
        flat = kappa.diff() == 0
        several = self.order > 1 or self._corrects(1)
        if self.variable == "kappa" and several and bool(flat.any()):
            i = int(flat.nonzero()[0])
            raise ValueError(
                "variable must be 'time' for this grid: the signal-to-noise ratio is the same at "
                f"t = {float(times[i]):.15g} and {float(times[i + 1]):.15g}"
            )
        if process.score.predicts_data and self.prediction == "data":
            return undetermined
        if bool(lost[:-1].any()):
            raise ValueError(
                f"times must start before t = {float(times[lost].min()):g}, at which nothing of "
                "the data is left, for a score without a data prediction of its own; got "
                f"{process.score!r}. Start at LinearSDE.regular_until = "
                f"{process.sde.regular_until:.6g}, or take a Score with predicts_data"
            )
        return torch.zeros_like(undetermined)

    def stochasticities(self, sde: LinearSDE, times: Tensor) -> Tensor:
        """λ of the steps that start at times ``(n,)`` of a process, float64."""
        if isinstance(self.stochasticity, LevelNoise):
            return self.stochasticity.at(sde.kappa(times))
        if not callable(self.stochasticity):
            return torch.full_like(times, self.stochasticity)
        levels = torch.as_tensor(self.stochasticity(times), dtype=torch.float64, device="cpu")
        if levels.shape != times.shape or not bool((levels.isfinite() & (levels >= 0)).all()):
            raise ValueError(
                "stochasticity must return one finite number ≥ 0 per time, shape "
                f"{tuple(times.shape)}; got {levels.tolist()}"
            )
        return levels

    def _weights(
        self, steps: Steps, variable: Sequence[Tensor], rate: Tensor | None, *, offset: int
    ) -> Tensor:
        """Weights ``(n, order + offset, k, m)`` of predictions at times i + offset and before it.

        ``variable`` are the values of the polynomials' variable at the times and at the nodes.
        ``rate`` is 1 + λ² of the steps for the weights of SA-Solver, and None for others.
        """
        x, nodes = variable
        n = len(x) - 1
        weights = steps.total.new_zeros(n, self.order + offset, *steps.total.shape[1:])
        # Group steps by the length of their history: one group with the full one, and short ones.
        counts = [min(self.order, i + 1) + offset for i in range(n)]
        for count in sorted(set(counts)):
            which = torch.tensor([i for i in range(n) if counts[i] == count], device="cpu")
            back = which.unsqueeze(1) + offset - torch.arange(count, device="cpu")
            points = x[back]  # (steps, count)
            total = steps.total[which]
            if count == 1:
                parts = [total]
            elif self.weights in ("published", "sa_solver") and count == 2:
                # The difference quotient of two predictions, times half the step. The two points of
                # a corrector are the ends of the step.
                H, spacing = x[which + 1] - x[which], points[:, 0] - points[:, 1]
                share = H / (2 * spacing)
                if rate is not None:
                    share = share * (rate[which] * H) / -torch.expm1(-rate[which] * H)
                half = share[:, None, None] * total
                parts = [half, total - half] if offset else [total + half, -half]
            else:
                basis = lagrange(points, nodes[which])  # (steps, q, count)
                if self.weights == "dpm_solver_3m" and count == 3:
                    basis = basis - 0.5 * curvature(points, nodes[which])
                parts = list(torch.einsum("nqj,nqkm->jnkm", basis, steps.slope[which]))
                # The weights add up to the weights of a constant, which need no quadrature.
                parts[0] = total - sum(parts[1:], torch.zeros_like(total))
            weights[which, :count] = torch.stack(parts, dim=1)
        return weights
