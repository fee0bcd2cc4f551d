"""Fréchet distance and classifier."""

from __future__ import annotations

import pytest
import torch

from cldsde.images.data import digits
from cldsde.images.metrics import frechet_distance, train_classifier


def samples_with_moments(mean: list[float], covariance: list[list[float]]) -> torch.Tensor:
    """Points whose sample mean and covariance are exactly the given ones, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    root = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64))
    return (root @ white).T + torch.tensor(mean, dtype=torch.float64)


def test_distance_of_commuting_gaussians_has_the_closed_form():
    first = samples_with_moments([0.0, 1.0], [[4.0, 0.0], [0.0, 1.0]])
    second = samples_with_moments([3.0, 1.0], [[1.0, 0.0], [0.0, 9.0]])
    # |m₁ − m₂|² + Σ (σ₁ − σ₂)² = 9 + 1 + 4; rounding of 50-term sums.
    assert frechet_distance(first, second) == pytest.approx(14.0, rel=1e-12)


def test_distance_of_two_dimensional_gaussians_has_the_closed_form():
    a, b = [[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.3], [-0.3, 3.0]]
    # tr √(AB) of a 2×2 product is √(tr AB + 2 √det AB).
    A, B = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    overlap = ((A @ B).trace() + 2 * (A.det() * B.det()).sqrt()).sqrt()
    expected = float(A.trace() + B.trace() - 2 * overlap)
    distance = frechet_distance(
        samples_with_moments([0.0, 0.0], a), samples_with_moments([0.0, 0.0], b)
    )
    assert distance == pytest.approx(expected, rel=1e-12)


def test_distance_is_symmetric_and_zero_for_equal_sets():
    x = samples_with_moments([0.0, 0.0], [[1.0, 0.9], [0.9, 1.0]])
    y = samples_with_moments([1.0, 0.0], [[2.0, 0.1], [0.1, 1.0]])
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)
    # The root loses half of the digits where a covariance is nearly singular; here it is not.
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 3), r"\(n, F\) and \(m, F\)"),
        (torch.zeros(3), torch.zeros(3), r"\(n, F\) and \(m, F\)"),
        (torch.zeros(1, 2), torch.zeros(3, 2), "two rows"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), "finite"),
    ],
)
def test_distance_refuses_what_has_no_covariance(first, second, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)


def test_classifier_reaches_97_percent_on_held_out_digits_and_obeys_its_seed():
    data = digits()
    state = torch.get_rng_state()
    model, accuracy = train_classifier(data, epochs=8, seed=3)
    again, _ = train_classifier(data, epochs=8, seed=3)
    assert accuracy >= 0.97
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
