"""Metrics in the features of Inception: their values, and the files that they read."""

import sys
from unittest import mock

import pytest
import torch

from cldsde.images.evaluate import inception_metrics
from cldsde.images.evaluate.inception import INCEPTION_FILE
from image_data import noise
from tolerances import EPS32, rounding

# Sums of thousands of numbers, 16 roundings each, in some 50 layers; features are of order 1.
INCEPTION = rounding(50 * 16, dtype=torch.float32)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights of the network, scaled so that its features are of order 1."""
    fidelity = pytest.importorskip("torch_fidelity")
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", return_value={}
        ),
        mock.patch.object(fidelity.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
        for name, x in network.named_parameters():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(x)
    file = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    torch.save(network.state_dict(), file)
    return file


def own_features(file, images):
    from torch_fidelity import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("own", ["2048"], feature_extractor_weights_path=str(file))
    return network(images.expand(-1, 3, -1, -1))[0]


@pytest.mark.slow
def test_kid_and_precision_equal_those_of_the_same_features(inception):
    images, reference = noise(5, 0, (1, 8, 8)), noise(5, 1, (1, 8, 8), top=128)
    arguments = {"metrics": ["kid", "prc"], "kid_subsets": 2, "kid_subset_size": 5, "batch": 4}
    found = inception_metrics(images, reference, inception, seed=3, **arguments)
    x, y = own_features(inception, torch.cat([images, reference])).double().split(5)
    numbers = {name: entry["value"] for name, entry in found["metrics"].items()}
    assert set(numbers) == {"kid", "precision", "recall", "f_score"}
    # All images are in each subset, so that KID is the unbiased estimate itself, in float32.
    kernel = lambda a, b: (a @ b.T / 2048 + 1) ** 3  # noqa: E731
    off = 1 - torch.eye(5, dtype=torch.float64)
    own = sum(float((kernel(z, z) * off).sum()) / 20 for z in (x, y))
    kid = own - 2 * float(kernel(x, y).mean())
    assert numbers["kid"] == pytest.approx(kid, rel=INCEPTION, abs=0)
    # Precision: the share of images within reach of the third neighbour of a reference image.
    reach = torch.cdist(y, y).kthvalue(4).values
    precision = float((torch.cdist(x, y) <= reach).any(1).double().mean())
    assert numbers["precision"] == pytest.approx(precision, rel=EPS32, abs=0)
    assert not found["weights"]["published"]
    # Both subsets hold all images: their estimates differ by the order of float32 sums.
    assert found["metrics"]["kid"]["spread"] == pytest.approx(0.0, abs=4 * EPS32)
    assert found["metrics"]["kid"]["spread_is"] == "standard deviation over 2 subsets of 5"


@pytest.mark.slow
def test_fid_and_inception_score_equal_those_of_the_same_features(inception):
    images, reference = noise(10, 0, (3, 8, 8)), noise(10, 1, (3, 8, 8), top=128)
    x, y = (own_features(inception, part).double() for part in (images, reference))
    # Of ten images a covariance is a product X Xᵀ of few columns, and tr (C₁C₂)^½ the sum of the
    # singular values of XᵀY. torch-fidelity takes roots of 2,048 eigenvalues. All but nine of them
    # are rounding errors of some 1e-17 of the traces squared: 2,048 · 3e-9 of the traces.
    traces = float(x.var(0).sum() + y.var(0).sum())
    overlap = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T / 9).sum()
    fid = float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * overlap)
    found = inception_metrics(images, reference, inception, metrics=["fid", "isc"])
    roots = 2048 * 3e-9 * traces
    assert found["metrics"]["fid"]["value"] == pytest.approx(fid, abs=roots)
    assert fid > 0.1 * traces  # the tolerance means something
    assert found["metrics"]["fid"]["spread"] is None
    # Ten splits of one image each.
    assert found["metrics"]["isc"]["value"] == pytest.approx(1.0, rel=4 * EPS32, abs=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": print}, "is damaged or has other weights"),
        ([torch.zeros(1)], "got <class 'list'>"),
        ({"weight": torch.zeros(1)}, "has other weights"),
    ],
)
def test_other_files_than_weights_are_rejected_by_name(content, message, tmp_path):
    file = tmp_path / "mine.pth"
    torch.save(content, file)
    images = noise(10, 0, (1, 8, 8))
    with pytest.raises(ValueError, match=rf"mine\.pth .*{message}"):
        inception_metrics(images, images, file, metrics=["fid"])


def test_missing_weights_or_libraries_are_asked_for_and_not_fetched(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    images, file = noise(10, 0, (1, 8, 8)), tmp_path / "absent.pth"
    message = r"no file .*absent\.pth; get weights-inception-2015-12-05-6726825d\.pth.*https://"
    with pytest.raises(FileNotFoundError, match=message):
        inception_metrics(images, images, file, metrics=["fid"])
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="torch_fidelity"):
        inception_metrics(images, images, file, metrics=["fid"])
