"""The protocol of scores: everything that a score can do beside score(z, t), with its default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.checks import check_callable
from cldsde.linear.reprs import shown
from cldsde.linear.sde import LinearSDE
from cldsde.score.denoisers import Denoiser
from cldsde.score.estimator import Estimator, compiled_module
from cldsde.score.times import PlannedTime

ScoreFunction = Callable[..., Tensor]
"""A `Score`, or any function score(z, t) of states ``(B, k, *D)`` and times ``(B,)``.

It returns the score of the driven components, ``(B, d, *D)``. The times are on the state's device,
rounded to its dtype, float32 at least. If the batch shares one time, they are an expanded view of
one number. A score must not change times or states in place."""

WRAP_DENOISER = (
    "If it is a denoiser, wrap it: DenoiserScore(denoiser, sde). A network that predicts noise "
    "becomes a denoiser by PredictionDenoiser(network, path)"
)


class Score(Estimator):
    """Base class of scores: ∂ log p_t(z)/∂z on the driven components.

    A score maps states ``(B, k, *D)`` and times ``(B,)`` to ``(B, d, *D)``. A subclass defines
    ``forward(z, t, *, planned=None, **conditions)``, and overrides the methods of its other
    abilities. ``planned`` is the index of t among times that a solver knows. Pass it on to other
    scores along with t. Any other callable becomes a score when a `ReverseProcess` or another score
    takes it.

    Attributes
    ----------
    sde
        The process that the score belongs to; None: not known.
    predicts_data
        Whether `data_prediction` is more accurate than the data prediction that follows from the
        score. Solvers call it in place of the score if the score does not determine the data
        accurately (κ < −8), for example at t = 1 of `cldsde.RectifiedFlow`.
    noise_levels, depends_on_place, shared_conditions
        See `cldsde.score.estimator.Estimator`.

    Examples
    --------
    >>> from cldsde import VPSDE, sample
    >>> class Normal(Score):
    ...     noise_levels = (0.01, 100.0)
    ...
    ...     def forward(self, z, t, *, planned=None):
    ...         return -z
    >>> sample(VPSDE(), Normal(), (4, 2)).shape
    torch.Size([4, 2])
    """

    sde: LinearSDE | None = None
    predicts_data: bool = False

    def data_prediction(self, z: Tensor, t: Any, **options: Any) -> Tensor:
        """E[x_0 | z_t], ``(B, *D)``, as ``forward`` is called; the default raises ValueError."""
        raise ValueError(f"score must have a data prediction of its own; got {self!r} without one")


class FunctionScore(Score):
    """A plain function, module or callable object as a `Score`; `as_score` makes it."""

    def __init__(self, function: ScoreFunction) -> None:
        super().__init__()
        self.function = function

    def __repr__(self) -> str:
        return shown(self.function)

    def forward(
        self, z: Tensor, t: Any, *, planned: PlannedTime | None = None, **conditions: Any
    ) -> Tensor:
        """Call the function with state and time alone."""
        try:
            return self.function(z, t, **conditions)
        except (RuntimeError, TypeError, ValueError) as error:
            if not _lacks_memory(error):
                error.add_note(f"score got states {tuple(z.shape)}. {WRAP_DENOISER}")
            raise


def _lacks_memory(error: Exception) -> bool:
    """Whether a CPU or GPU had too little memory, which torch may report as any RuntimeError."""
    message = str(error).lower()  # "DefaultCPUAllocator: …", "CUBLAS_STATUS_ALLOC_FAILED"
    named = any(word in message for word in ("out of memory", "allocator", "alloc_failed"))
    return named or isinstance(error, torch.OutOfMemoryError)


class ScoreWrapper(Score):
    """Base class of scores around another score: it passes on all that a score can do.

    A subclass overrides the methods that it changes. If it overrides ``forward`` alone, it does not
    predict the data, because the other score's prediction does not follow the change.

    Examples
    --------
    >>> import torch
    >>> class Tempered(ScoreWrapper):
    ...     def forward(self, z, t, **options):
    ...         return 0.9 * super().forward(z, t, **options)
    >>> Tempered(lambda z, t: -z)(torch.ones(1, 1, 2), 0.5)
    tensor([[[-0.9000, -0.9000]]])
    """

    score: Score

    def __init__(self, score: ScoreFunction) -> None:
        super().__init__()
        self.score = as_score(score)
        self.sde = self.score.sde
        self.noise_levels = self.score.noise_levels
        own = type(self)
        changed = own.forward is not ScoreWrapper.forward
        followed = own.data_prediction is not ScoreWrapper.data_prediction
        self.predicts_data = self.score.predicts_data and (followed or not changed)
        self.depends_on_place = self.score.depends_on_place
        self.shared_conditions = self.score.shared_conditions

    def forward(self, z: Tensor, t: Any, **options: Any) -> Tensor:
        """Score of the driven components, ``(B, d, *D)``."""
        value: Tensor = self.score(z, t, **options)
        return value

    def data_prediction(self, z: Tensor, t: Any, **options: Any) -> Tensor:
        """E[x_0 | z_t], ``(B, *D)``."""
        return self.score.data_prediction(z, t, **options)

    def check_times(self, t: Tensor) -> None:
        """Raise ValueError if the other score cannot be evaluated at a time."""
        self.score.check_times(t)

    def evaluations(self, t: Tensor) -> Tensor:
        """Number of network evaluations per call at each time."""
        return self.score.evaluations(t)


def as_score(score: object, name: str = "score") -> Score:
    """Return a `Score`, and adapt any other function score(z, t); TypeError for other objects."""
    if isinstance(score, Score):
        return score
    if isinstance(inside := compiled_module(score), Score):
        return inside._changed({}, forward=score)
    if isinstance(score, type):
        raise TypeError(f"{name} must be a score; got the class {score.__name__}")
    check_callable(score, name, "a callable score(z, t)")
    if isinstance(score, Denoiser):
        raise TypeError(f"{name} is a denoiser; wrap it: DenoiserScore(denoiser, sde)")
    return FunctionScore(score)  # type: ignore[arg-type]
