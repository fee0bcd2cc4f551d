"""Gaussian distributions of a state: transition kernels and priors, with triangular factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, flatten_data
from cldsde.linear.checks import check_state
from cldsde.linear.random import Generators, standard_normal
from cldsde.linear.reprs import shown


def check_kernel_shape(blocks: Tensor, **states: Tensor) -> None:
    """Raise unless states ``(B, k, *D)`` have one shape, and the blocks are for 1 or B times."""
    for name, z in states.items():
        check_state(z, blocks.shape[-1], name)
        if blocks.shape[:-2] not in (torch.Size([]), torch.Size([len(z)])):
            raise ValueError(
                f"{name} has {len(z)} samples, so the kernel must be for one time or for "
                f"({len(z)},) times, one per sample; got times of shape {tuple(blocks.shape[:-2])}"
            )
    if len({z.shape for z in states.values()}) > 1:
        got = " and ".join(str(tuple(z.shape)) for z in states.values())
        raise ValueError(f"{' and '.join(states)} must have one shape; got {got}")


def check_density(root: Tensor, times: Tensor, name: str) -> None:
    """Raise ValueError if the distribution given the start has no density at some time.

    The triangular roots are ``(*times.shape, k, k)``, or have further axes before the last two.
    """
    flat = (root.diagonal(dim1=-2, dim2=-1) <= 0).flatten(times.ndim).any(-1)
    if not bool(flat.any()):
        return
    last = float(times.detach()[flat].max())
    reason = f"the distribution given the start has no density at {name} = {last:g}"
    if last > 0:
        raise ValueError(
            f"{reason}, because its covariance is singular; take later times, or a process whose "
            "noise reaches every component"
        )
    raise ValueError(f"{name} must be above 0: {reason}, because no noise has been added yet")


def log_density(residual: Tensor, root: Tensor) -> Tensor:
    """Log-density ``(B,)`` of N(0, L Lᵀ ⊗ I) at ``(B, k, *D)``, in single precision at least."""
    diagonal = root.diagonal(dim1=-2, dim2=-1)
    if bool((diagonal <= 0).any()):
        raise ValueError(
            "the distribution has no density, because its root has a zero on the diagonal; take "
            "times at which noise reaches every component"
        )
    flat = flatten_data(residual)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    factor = root.to(flat)
    whitened = torch.linalg.solve_triangular(factor, flat, upper=False)
    log_det = flat.shape[-1] * diagonal.log().sum(-1).to(flat)
    dimension = flat.shape[-2] * flat.shape[-1]
    constant = 0.5 * dimension * math.log(2 * math.pi)
    log_density: Tensor = -0.5 * whitened.square().sum((1, 2)) - log_det - constant
    return log_density


@dataclass(frozen=True, eq=False)
class Kernel:
    """Transition kernel z_t | z_s ~ N(mean z_s, root rootᵀ), the same for every data dimension.

    ``mean`` and the lower-triangular ``root`` are ``(*, k, k)``, float64 on the CPU, for times of
    shape ``(*)``.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD
    >>> kernel = CLD().transition(0.2, 0.5)
    >>> z_t = kernel.sample(torch.zeros(8, 2, 3), generator=torch.Generator().manual_seed(0))
    >>> z_t.shape
    torch.Size([8, 2, 3])
    """

    mean: Tensor  #: Matrix that maps z_s to the conditional mean, ``(*, k, k)``.
    #: Lower-triangular factor of the covariance, ``(*, k, k)``. Its diagonal is ≥ 0, and > 0 if the
    #: distribution has a density.
    root: Tensor

    def __repr__(self) -> str:
        """One line with the sizes of the matrices."""
        return f"Kernel(components={self.mean.shape[-1]}, times={tuple(self.mean.shape[:-2])})"

    @property
    def covariance(self) -> Tensor:
        """``root @ root.mT``, ``(*, k, k)``."""
        return self.root @ self.root.mT

    def sample(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw z_t given z_s; see `perturb`, which also returns the noise."""
        return self.perturb(z, generator=generator)[0]

    def perturb(self, z: Tensor, *, generator: Generators | None = None) -> tuple[Tensor, Tensor]:
        """Draw z_t = mean z_s + root ξ; return z_t and ξ in the shape, dtype and device of z_s.

        Parameters
        ----------
        z
            z_s, ``(B, k, *D)``. A kernel for one time, shape ``()``, is used for all samples. A
            kernel for times ``(B,)`` has one time per sample. ValueError if a shape does not fit.
        generator
            Random generator, or several, each of which draws for an equal share of the batch.
        """
        check_kernel_shape(self.mean, z=z)
        noise = standard_normal(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return apply_blocks(self.mean, z) + apply_blocks(self.root, noise), noise

    def log_prob(self, z_t: Tensor, z_s: Tensor) -> Tensor:
        """Log-density of z_t given z_s, ``(B,)`` nats.

        Raises a ValueError if the distribution has no density, or the shapes do not fit.
        """
        check_kernel_shape(self.mean, z_t=z_t, z_s=z_s)
        return log_density(z_t - apply_blocks(self.mean, z_s), self.root)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian N(0, root rootᵀ) of each data dimension of a state, such as the prior."""

    root: Tensor  #: Lower-triangular factor of the covariance, ``(k, k)`` float64 on the CPU.

    def __repr__(self) -> str:
        """One line with the covariance."""
        return f"Gaussian(covariance={shown(self.covariance)})"

    @property
    def mean(self) -> Tensor:
        """Zero matrix ``(k, k)``: the distribution depends on no earlier state."""
        return torch.zeros_like(self.root)

    @property
    def covariance(self) -> Tensor:
        """``root @ root.mT``, ``(k, k)``."""
        return self.root @ self.root.mT

    def sample(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw states ``(B, k, *D)`` for data of shape ``(B, *D)``."""
        if not isinstance(shape, Sequence) or len(shape) < 1:
            raise ValueError(f"shape must be the shape (B, *D) of a batch of data; got {shape!r}")
        full = (shape[0], len(self.root), *shape[1:])
        noise = standard_normal(full, generator=generator, dtype=dtype, device=device)
        return apply_blocks(self.root, noise)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density at states ``(B, k, *D)``, ``(B,)`` nats."""
        return log_density(check_state(z, len(self.root)), self.root)
