"""A smooth bound on what a network returns."""

from __future__ import annotations

import torch
from torch import Tensor

from cldsde.linear.checks import check_positive

def soft_clamp(x: Tensor, bound: float) -> Tensor:
    """Bound numbers smoothly, b tanh(x/b): x near 0, with slope 1, and within ±b (NVAE, LSGM).

    Parameters
    ----------
    x
        Floating-point numbers of any shape.
    bound
        b > 0.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``x``; ±b itself is reached by rounding, where the slope is 0.

    Raises
    ------
    ValueError
        If the bound is not positive.

    References
    ----------
    A. Vahdat and J. Kautz, *NVAE: a deep hierarchical variational autoencoder*, 2020.

    Examples
    --------
    >>> soft_clamp(torch.tensor([-1e9, 0.0, 1e9]), 5.0).tolist()
    [-5.0, 0.0, 5.0]
    """
    check_positive(bound, "bound")
    return bound * torch.tanh(x / bound)
