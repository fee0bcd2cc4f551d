"""Linear observations y = A x_0 + s n of the data, and exact posteriors of Gaussian modes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from cldsde.linear.checks import as_integer, check_at_least, check_callable, described
from cldsde.linear.kappa import first_times
from cldsde.linear.sde import LinearSDE
from cldsde.score.operators import Copies, check_linear, fixed_probes

# Largest ratio of the samples' noise at the end of sampling to the noise of the observation. At 0.3
# the variance of exact samples in an observed direction is 9 % too large if the data vary widely.
_END_LEVEL = 0.3


@dataclass(frozen=True, eq=False)
class Observation:
    r"""A noisy linear observation of the data, for posterior sampling.

    .. math:: y = A x_0 + s\,n, \qquad n ∼ N(0, I)

    Parameters
    ----------
    forward
        A, a function of a batch of data ``(B, *D)`` that returns ``(B, *E)``. It is linear and acts
        on each sample separately. Its adjoint is computed by autograd.
    y
        Observed values, ``(*E)``, or one observation per sample, ``(B, *E)``.
    noise_std
        s ≥ 0, the standard deviation of the noise; also an argument of the methods below.
    shape
        Shape ``(*D)`` of one data point, if it is known.

    Raises
    ------
    TypeError, ValueError
        If ``forward`` is not callable, y is not real and finite, or the noise is no number ≥ 0.

    Examples
    --------
    >>> import torch
    >>> running_sum = Observation(lambda x: x.cumsum(1), torch.ones(3), noise_std=0.1)
    >>> running_sum.check((3,))
    >>> running_sum.adjoint(torch.eye(3), (3,))
    tensor([[1., 0., 0.],
            [1., 1., 0.],
            [1., 1., 1.]])
    """

    forward: Callable[[Tensor], Tensor]
    y: Tensor
    noise_std: float
    shape: tuple[int, ...] | None = None
    _checked: set[object] = field(default_factory=set, init=False, repr=False)
    _y: Copies = field(init=False, repr=False)
    _rows: slice = field(default_factory=lambda: slice(None), init=False, repr=False)

    def __post_init__(self) -> None:
        check_callable(self.forward, "forward", "a function of data (B, *D)")
        # Copy the values, because the caller may change them.
        object.__setattr__(self, "y", _as_tensor(self.y, "y").clone())
        if not bool(self.y.isfinite().all()):
            raise ValueError("y must be finite; got NaN or infinity")
        object.__setattr__(self, "_y", Copies(self.y))
        object.__setattr__(self, "noise_std", check_at_least(self.noise_std, 0.0, "noise_std"))

    def __repr__(self) -> str:
        return f"Observation(y={tuple(self.y.shape)}, noise_std={self.noise_std:g})"

    @classmethod
    def mask(cls, mask: Tensor, y: Tensor, noise_std: float) -> Self:
        """Observe some entries of the data, for inpainting or imputation of a time series.

        Parameters
        ----------
        mask
            Bool ``(*D)``, True for observed entries.
        y
            Data ``(*D)`` or ``(B, *D)``. Entries outside of the mask are ignored.

        Raises
        ------
        TypeError, ValueError
            If the mask is not boolean or marks no entry, or y does not have the mask's shape.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor; got {described(mask)}")
        if not bool(mask.any()):
            raise ValueError("mask must mark at least one entry as observed; got none")
        indices = Copies(mask.flatten().nonzero().flatten())

        def forward(x: Tensor) -> Tensor:
            _check_size(x, mask.numel(), "mask")
            return x.flatten(1).index_select(1, indices.like(x))

        values, shape = _as_tensor(y, "y"), tuple(mask.shape)
        if values.ndim not in (mask.ndim, mask.ndim + 1) or values.shape[-mask.ndim :] != shape:
            raise ValueError(f"y must have the mask's shape {shape}; got {tuple(values.shape)}")
        seen = forward(values if values.ndim > mask.ndim else values.unsqueeze(0))
        return cls(forward, seen if values.ndim > mask.ndim else seen[0], noise_std, shape)

    @classmethod
    def matrix(cls, A: Tensor | Sequence[Sequence[float]], y: Tensor, noise_std: float) -> Self:
        """Observe A x_0 for a matrix ``(m, D)``; data of other shapes are flattened.

        y is ``(m,)`` or ``(B, m)``. If A is not a finite matrix, a ValueError is raised.
        """
        matrix = _as_tensor(A, "A")
        if matrix.ndim != 2 or not bool(matrix.isfinite().all()):
            raise ValueError(f"A must be a finite matrix (m, D); got shape {tuple(matrix.shape)}")
        copies = Copies(matrix)

        def forward(x: Tensor) -> Tensor:
            _check_size(x, matrix.shape[1], "A")
            return x.flatten(1) @ copies.like(x).mT

        return cls(forward, y, noise_std, (matrix.shape[1],))

    @classmethod
    def downsample(cls, factor: int, y: Tensor, noise_std: float) -> Self:
        """Observe block means of the data, for super-resolution.

        Parameters
        ----------
        factor
            Size of a block along each spatial axis, at least 2.
        y
            ``(C, *S)``: channels, then one or more spatial axes. The data are
            ``(C, *(factor · S))``. Other shapes raise a ValueError.
        """
        as_integer(factor, 2, "factor")
        low = _as_tensor(y, "y")
        if low.ndim < 2:
            raise ValueError(
                f"y must have shape (C, *S) with at least one spatial axis; got {tuple(low.shape)}"
            )
        shape = (low.shape[0], *(factor * n for n in low.shape[1:]))

        def forward(x: Tensor) -> Tensor:
            _check_shape(x, shape)
            for axis in range(2, x.ndim):
                x = torch.unflatten(x, axis, (-1, factor)).mean(axis + 1)
            return x

        return cls(forward, low, noise_std, shape)

    @classmethod
    def blur(cls, kernel: Tensor, y: Tensor, noise_std: float) -> Self:
        """Observe images convolved with a kernel, for deblurring.

        Parameters
        ----------
        kernel
            ``(h, w)`` with odd sizes. The image is padded with zeros and correlated with the
            kernel, as by `torch.nn.functional.conv2d`; flip the kernel for a convolution.
        y
            ``(C, H, W)``. Other shapes, or a kernel that is not finite, raise a ValueError.
        """
        weights, image = _as_tensor(kernel, "kernel"), _as_tensor(y, "y")
        if image.ndim != 3:
            raise ValueError(f"y must be an image (C, H, W); got shape {tuple(image.shape)}")
        odd = weights.ndim == 2 and all(n % 2 for n in weights.shape)
        if not odd or not bool(weights.isfinite().all()):
            raise ValueError(
                f"kernel must be finite, (h, w) with odd sizes; got {tuple(weights.shape)}"
            )
        copies, shape = Copies(weights), tuple(image.shape)

        def forward(x: Tensor) -> Tensor:
            _check_shape(x, shape)
            planes, one = x.flatten(0, 1).unsqueeze(1), copies.like(x)[None, None]
            padding = (one.shape[2] // 2, one.shape[3] // 2)
            return functional.conv2d(planes, one, padding=padding).view_as(x)

        return cls(forward, image, noise_std, shape)

    def part(self, samples: slice, shape: Sequence[int]) -> Observation:
        """The observation of some samples of data ``(B, *D)``, if there is one per sample."""
        # Whether there is one per sample, `residual` tells from the operator's values.
        rows = range(len(self.y))[self._rows] if self.y.ndim else ()
        if len(rows) != shape[0]:
            return self
        other, some = copy.copy(self), rows[samples]
        object.__setattr__(other, "_rows", slice(some.start, some.stop))
        return other

    def with_y(self, y: Tensor) -> Observation:
        """The same observation with other values, which are not checked."""
        other = copy.copy(self)
        object.__setattr__(other, "y", y)
        object.__setattr__(other, "_y", Copies(y))
        return other

    def residual(self, x: Tensor) -> Tensor:
        """Residual y − A x ``(B, *E)`` for data x ``(B, *D)``."""
        seen = self.forward(x)
        y = self._y.like(seen)
        if y.ndim == seen.ndim:
            y = y[self._rows]
            if len(y) != len(seen):
                raise ValueError(f"y must hold one row per sample, {len(seen)}; got {len(y)}")
        return y - seen

    def adjoint(self, v: Tensor, shape: Sequence[int]) -> Tensor:
        """Adjoint Aᵀv ``(B, *D)`` for a batch v ``(B, *E)`` and data of shape ``(*D)``."""
        # Leave inference mode, in which autograd does not record A.
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(len(v), *shape, dtype=v.dtype, device=v.device, requires_grad=True)
            v = v.clone() if v.is_inference() else v
            (found,) = torch.autograd.grad(self.forward(x), x, v)
        return found

    def gram(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Matrix A Aᵀ ``(m, m)`` over the flattened y, with dtype and device of ``like``."""
        with torch.no_grad():
            seen = self.forward(like.new_zeros(1, *shape)).shape[1:]
        size = math.prod(seen)
        units = torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *seen)
        return self.forward(self.adjoint(units, shape)).reshape(size, size)

    def dense(self, shape: Sequence[int]) -> Tensor:
        """Matrix of A, ``(m, ∏D)`` float64 on the CPU."""
        size = math.prod(shape)
        units = torch.eye(size, dtype=torch.float64, device="cpu").reshape(size, *shape)
        with torch.no_grad():
            return self.forward(units).reshape(size, -1).mT

    def end_time(self, sde: LinearSDE, shape: Sequence[int]) -> float:
        """Latest end time of sampling; a later end blurs the posterior.

        The data component at time t is ψ x_0 plus noise of variance Σ (`LinearSDE.marginal`). If
        the norm of A times √Σ/ψ is above 0.3 s, samples are visibly wider than the posterior.
        ``shape`` is the shape ``(*D)`` of one data point. Without noise, ``noise_std`` = 0, a
        ValueError is raised.
        """
        if self.noise_std == 0:
            raise ValueError(
                "noise_std must be positive to sample a posterior, because samples end with some "
                "noise of their own; got 0. Use a small positive number"
            )
        x = fixed_probes(1, shape)
        for _ in range(20):  # power iteration for the square of the norm
            x = self.adjoint(self.forward(x / x.norm()), shape)
        level = math.log(float(x.norm().sqrt()) / (_END_LEVEL * self.noise_std))

        def kappa(t: Tensor) -> Tensor:
            kernel = sde.marginal(t)
            return (kernel.mean[..., 0, 0] / kernel.root[..., 0, 0]).clamp_min(0).log()

        return float(first_times(kappa, torch.tensor(level, dtype=torch.float64, device="cpu")))

    def check(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Check that ``forward`` is linear on data of shape ``(*D)``, as samplers do first.

        Raises
        ------
        TypeError, ValueError
            If ``forward`` does not return a tensor of y's shape that autograd can differentiate,
            has a constant part, is not linear, or mixes samples of a batch.
        """
        key = (tuple(shape), dtype, torch.device(device))
        if key not in self._checked:
            check_linear(self.forward, self.y, shape, dtype=dtype, device=torch.device(device))
            self._checked.add(key)


def conditioned(
    means: Tensor, covariances: Tensor, observation: Observation
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Log-evidence ``(n,)``, means and covariances of Gaussian modes given y = A x + s n.

    .. math::
        S = A C A^⊤ + s^2 I, \quad K = C A^⊤ S^{-1}, \quad m' = m + K (y − A m), \quad
        C' = (I − K A) C (I − K A)^⊤ + s^2 K K^⊤

    This is Joseph's form of C', which stays positive semi-definite for small s. Without noise,
    y has no density if rows of A are linearly dependent or zero on the data.
    """
    dimension = means.shape[1]
    shape = check_observation(observation).shape or (dimension,)
    if math.prod(shape) != dimension:
        raise ValueError(
            f"observation must be of data of {dimension} numbers, the mixture's "
            f"dimension; got data of shape {tuple(shape)}"
        )
    observation.check(shape, dtype=torch.float64)
    A = observation.dense(shape)
    y = observation.y.to("cpu", torch.float64).flatten()
    if len(y) != len(A):
        raise ValueError(
            f"observation must hold one y of {len(A)} numbers to condition on; "
            f"got shape {tuple(observation.y.shape)}"
        )
    means, covariances = means.detach().cpu(), covariances.cpu()
    noise_std, eye = observation.noise_std, partial(torch.eye, dtype=A.dtype, device="cpu")
    cross = covariances @ A.mT
    roots, faults = torch.linalg.cholesky_ex(A @ cross + noise_std**2 * eye(len(A)))
    if bool(faults.any()):
        raise ValueError(
            f"noise_std of the observation must be larger, because y has no density under the "
            f"mixture; got {noise_std:g}"
        )
    residual = y - means @ A.mT
    whitened = torch.linalg.solve_triangular(roots, residual.unsqueeze(-1), upper=False)
    volume = roots.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * len(A) * math.log(2 * math.pi)
    gain = torch.cholesky_solve(cross.mT, roots).mT
    rest = eye(A.shape[1]) - gain @ A
    moved = means + (gain @ residual.unsqueeze(-1)).squeeze(-1)
    shrunk = rest @ covariances @ rest.mT + noise_std**2 * gain @ gain.mT
    log_evidence = -0.5 * whitened.square().sum((1, 2)) - volume
    return log_evidence, moved, (shrunk + shrunk.mT) / 2


def check_observation(observation: object) -> Observation:
    """Return the argument if it is an `Observation`; otherwise raise TypeError."""
    if not isinstance(observation, Observation):
        raise TypeError(f"observation must be an Observation; got {type(observation).__name__}")
    return observation


def _as_tensor(value: object, name: str) -> Tensor:
    try:
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"{name} must be an array of real numbers; got {type(value).__name__}"
        raise TypeError(msg) from error
    if found.is_complex():
        raise TypeError(f"{name} must be real; got {found.dtype}")
    return found if found.is_floating_point() else found.to(torch.get_default_dtype())


def _check_size(x: Tensor, size: int, name: str) -> None:
    if math.prod(x.shape[1:]) != size:
        raise ValueError(
            f"{name} must fit the data: it is for {size} numbers; got data of shape "
            f"{tuple(x.shape[1:])}, {math.prod(x.shape[1:])} numbers"
        )


def _check_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape:
        raise ValueError(f"y must fit the data: it is for shape {shape}; got {tuple(x.shape[1:])}")
