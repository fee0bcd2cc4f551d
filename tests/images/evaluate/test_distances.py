"""Fréchet distances: the closed form, statistics by batches, and any features."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from cldsde.images.evaluate import FeatureStatistics, frechet, frechet_of, load_features
from cldsde.images.evaluate.distances import check_features, feature_name, images_sha256
from image_data import noise

ROUNDING = 1e-12  # sums of some hundred numbers in float64, and roots of well-conditioned matrices


def statistics(features: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(features.mean(0), features.T.cov(), len(features), "", "")


def test_distance_of_gaussians_has_the_closed_form():
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    first, second = (cross @ torch.tensor(x, dtype=torch.float64).diag() for x in ([2, 1], [1, 3]))
    # |m₁ − m₂|² + Σ (σ₁ − σ₂)²; the covariance of the cross is 2/3 of the identity.
    expected = 9 + 2 / 3 * (1 + 4)
    found = frechet_of(statistics(first), statistics(second + 3 * cross[0]))
    assert found == pytest.approx(expected, rel=ROUNDING, abs=0)


def flat(images):
    return images.flatten(1).double() / 10


@pytest.mark.parametrize(("batch", "shift"), [(1, 0), (7, 1e5), (64, 0), (999, 1e5)])
def test_streaming_statistics_equal_direct_ones(batch, shift):
    """Also of features with a large mean and a small spread, for which naive sums cancel."""
    images = noise(150, 0)
    found = FeatureStatistics.of(images, lambda x: flat(x) + shift, batch=batch)
    x = flat(images)
    assert torch.allclose(found.mean, x.mean(0) + shift, rtol=ROUNDING, atol=0)
    # Means of 1e5 are known to 1e-11 only, an error that comes into the covariance squared; the
    # centred values carry it to first order, 1e-11 against a spread of 7.4.
    scale = float(torch.cov(x.T).diagonal().max())
    tolerance = 10 * ROUNDING if shift else ROUNDING
    assert torch.allclose(found.covariance, torch.cov(x.T), rtol=0, atol=tolerance * scale)
    assert found.count == 150


def test_distance_equals_the_square_root_of_the_product():
    first, second = noise(120, 0), noise(90, 1, top=100)
    a, b = flat(first).numpy(), flat(second).numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    shift = a.mean(0) - b.mean(0)
    expected = float(shift @ shift + np.trace(cov_a + cov_b - 2 * root.real))
    found = frechet(first, second, flat, batch=32)
    # Sixteen features, covariances of condition 10.
    assert found["frechet_distance"] == pytest.approx(expected, rel=100 * ROUNDING, abs=0)
    direct = frechet_of(statistics(flat(first)), statistics(flat(second)))
    assert found["frechet_distance"] == pytest.approx(direct, rel=10 * ROUNDING, abs=0)


def test_result_holds_its_conditions():
    first, second = noise(20, 0), noise(12, 1)
    found = json.loads(json.dumps(frechet(first, second, flat)))
    assert found["features"].endswith("test_distances:flat")
    assert (found["samples"], found["reference_samples"], found["feature_count"]) == (20, 12, 16)
    assert found["samples_sha256"] == images_sha256(first)
    assert found["singular"]  # 12 images, 16 features
    assert set(found["versions"]) == {"cldsde", "torch"}


def test_statistics_serve_as_a_reference_in_the_same_features_only():
    def halved(images):
        return flat(images) / 2

    first, second = noise(40, 0), noise(50, 1)
    statistics = FeatureStatistics.of(second, flat)
    assert frechet(first, statistics, flat) == frechet(first, second, flat)
    with pytest.raises(ValueError, match=r"reference: must be in the features .*halved.*flat"):
        frechet(first, statistics, halved)
    with pytest.raises(ValueError, match="of the same features"):
        frechet_of(statistics, FeatureStatistics.of(first, halved))
    with pytest.raises(ValueError, match="reference must have the shape of images"):
        frechet(first, noise(5, 0, (1, 5, 4)), flat)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda x: x.flatten(1), "floating-point numbers.*uint8"),
        (lambda x: x.float()[1:].flatten(1), "one row per image"),
        (lambda x: x.float().flatten(1) / 0, "finite"),
    ],
)
def test_networks_that_return_something_else_are_rejected(features, message):
    with pytest.raises(ValueError, match=message):
        frechet(noise(5, 0), noise(5, 1), features, batch=3)


def test_feature_networks_are_found_by_their_names():
    assert load_features("torch:flatten") is torch.flatten
    network = load_features("torch.nn:PReLU")
    assert feature_name(network) == "torch.nn.modules.activation:PReLU"
    assert not network.training
    assert not network.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch:flat", "has no attribute 'flat'"),
        ("torch:pi", "must be callable.*is float"),
        ("torch.nn:Linear", "features: .*required.*in_features"),
    ],
)
def test_names_of_no_feature_network_are_rejected(name, message):
    with pytest.raises(ValueError, match=message):
        load_features(name)


def test_a_function_that_returns_no_features_is_rejected():
    with pytest.raises(ValueError, match=r"fails for images \(5, 1, 4, 4\) \(ValueError: features"):
        check_features(torch.flatten, noise(5, 0))


def test_the_hash_of_images_knows_all_of_them_and_their_shape():
    images = noise(5000, 0, (1, 2, 2))
    changed = images.clone()
    changed[-1] ^= 1
    hashes = {images_sha256(x) for x in (images, changed, images.reshape(5000, 1, 1, 4))}
    assert len(hashes) == 3
