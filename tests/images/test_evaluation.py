"""Fréchet distances, Inception metrics and likelihoods of images."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import socket
import sys
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch

from cldsde import CLD, VPSDE, GaussianMixture
from cldsde.images.evaluation import (
    INCEPTION_FILE,
    FeatureStatistics,
    _plain_loads,
    frechet,
    frechet_of,
    images_sha256,
    inception_metrics,
    likelihood,
)
from cldsde.images.metrics import frechet_distance
from cldsde.score import ReverseProcess, dequantise


def noise(count: int, seed: int, shape: tuple[int, ...] = (1, 4, 4), top: int = 256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (count, *shape), generator=generator).to(torch.uint8)


def flat(images):
    return images.flatten(1).double() / 10


def offset(images):
    """Features whose mean is large against their spread, where naive sums cancel."""
    return images.flatten(1).double() + 1e6


# Fréchet distance


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
@pytest.mark.parametrize("features", [flat, offset])
def test_streaming_statistics_equal_direct_ones(batch, features):
    images = noise(150, 0)
    found = FeatureStatistics.of(images, features, batch=batch)
    x = flat(images) if features is flat else images.flatten(1).double()
    mean = x.mean(0) if features is flat else x.mean(0) + 1e6
    assert torch.allclose(found.mean, mean, rtol=1e-12, atol=0)
    # Means of 1e6 are known to 1e-10 only, an error that comes into the covariance squared; the
    # centred values carry it to first order, 1e-10 against a spread of 74.
    scale = float(torch.cov(x.T).diagonal().max())
    tolerance = 1e-12 if features is flat else 1e-11
    assert torch.allclose(found.covariance, torch.cov(x.T), rtol=0, atol=tolerance * scale)
    assert found.count == 150


@pytest.mark.parametrize("top", [256, 100])
def test_distance_equals_the_square_root_of_the_product(top):
    first, second = noise(120, 0), noise(90, 1, top=top)
    a, b = flat(first).numpy(), flat(second).numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    shift = a.mean(0) - b.mean(0)
    expected = float(shift @ shift + np.trace(cov_a + cov_b - 2 * root.real))
    found = frechet(first, second, flat, batch=32)
    # Sixteen features, covariances of condition 10: rounding of some 1e-15 of the traces.
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-10)
    direct = frechet_distance(flat(first), flat(second))
    assert found["frechet_distance"] == pytest.approx(direct, rel=1e-11)


def test_result_says_what_it_depends_on():
    first, second = noise(20, 0), noise(12, 1)
    found = json.loads(json.dumps(frechet(first, second, flat, name="mine")))
    assert found["features"] == "mine"
    assert (found["samples"], found["reference_samples"], found["feature_count"]) == (20, 12, 16)
    assert found["samples_sha256"] == images_sha256(first)
    assert found["singular"]  # 12 images, 16 features
    assert set(found["versions"]) == {"cldsde", "torch"}


def test_hash_of_images_knows_their_shape_and_bytes():
    images = noise(5000, 0, (1, 2, 2))
    assert images_sha256(images) == images_sha256(images.clone())
    assert images_sha256(images) != images_sha256(images.reshape(5000, 1, 1, 4))
    changed = images.clone()
    changed[-1, 0, 1, 1] ^= 1
    assert images_sha256(images) != images_sha256(changed)
    # Views with other strides hold the same images.
    assert images_sha256(images.mT.contiguous().mT) == images_sha256(images)


def test_saved_statistics_come_back_bit_for_bit_and_serve_as_a_reference(tmp_path):
    first, second = noise(40, 0), noise(50, 1)
    file = tmp_path / "statistics.safetensors"
    statistics = FeatureStatistics.of(second, flat)
    statistics.save(file)
    again = FeatureStatistics.load(file)
    assert torch.equal(again.mean, statistics.mean)
    assert torch.equal(again.covariance, statistics.covariance)
    assert (again.count, again.features) == (50, statistics.features)
    assert frechet(first, again, flat) == frechet(first, second, flat)


def test_damaged_statistics_are_refused(tmp_path):
    file = tmp_path / "statistics.safetensors"
    FeatureStatistics.of(noise(40, 0), flat).save(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"statistics\.safetensors is damaged"):
        FeatureStatistics.load(file)


def test_statistics_of_other_features_are_refused():
    images = noise(20, 0)
    statistics = FeatureStatistics.of(images, offset)
    with pytest.raises(ValueError, match=r"reference must be in the features .*flat.*offset"):
        frechet(images, statistics, flat)
    with pytest.raises(ValueError, match="of the same features"):
        frechet_of(statistics, FeatureStatistics.of(images, flat))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (lambda x: x.flatten(1), TypeError, "floating-point tensor.*uint8"),
        (lambda _: None, TypeError, "got NoneType"),
        (lambda x: x.float(), ValueError, r"must return \(B, F\)"),
        (lambda x: x.float().flatten(1)[1:], ValueError, "one row an image"),
        (lambda x: x.float().flatten(1) / 0, ValueError, "finite"),
        (lambda x: torch.ones(len(x), len(x)), ValueError, "as many features for each batch"),
        (3, TypeError, "features must be a callable"),
    ],
)
def test_networks_that_return_something_else_are_refused(features, error, message):
    with pytest.raises(error, match=message):
        frechet(noise(5, 0), noise(5, 1), features, batch=3)


@pytest.mark.parametrize(
    ("images", "reference", "batch", "message"),
    [
        (noise(1, 0), noise(5, 0), 8, "images must hold at least 2 images; got 1"),
        (noise(5, 0), noise(1, 0), 8, "reference must hold at least 2 images; got 1"),
        (noise(5, 0), noise(5, 0, (1, 5, 4)), 8, "reference must have the shape of images"),
        (noise(5, 0), noise(5, 0), 0, "batch must be an integer of at least 1"),
    ],
)
def test_frechet_refuses_before_any_work(images, reference, batch, message):
    network = mock.Mock()
    with pytest.raises(ValueError, match=message):
        frechet(images, reference, network, batch=batch, name="mock")
    network.assert_not_called()


# Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights of the network, scaled so that its features are of order 1."""
    fidelity = pytest.importorskip("torch_fidelity")
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            return_value={},
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


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_args, **_kwargs):
        msg = "the network was asked for"
        raise AssertionError(msg)

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def own_features(file, images):
    from torch_fidelity import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("own", ["2048"], feature_extractor_weights_path=str(file))
    return network(images.expand(-1, 3, -1, -1))[0]


@pytest.mark.usefixtures("offline")
def test_inception_metrics_equal_those_of_the_same_features(
    inception, tmp_path, capfd, monkeypatch
):
    images, reference = noise(10, 0, (1, 8, 8)), noise(10, 1, (1, 8, 8), top=128)
    random_state = torch.get_rng_state()
    arguments = {"kid_subsets": 2, "kid_subset_size": 10, "batch": 4, "seed": 3, "source": "test"}
    found = inception_metrics(images, reference, inception, cache=tmp_path, **arguments)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") is None
    assert capfd.readouterr() == ("", "")
    # The cache holds what the extractor made of the reference.
    kept = next(file for file in tmp_path.iterdir() if file.name.endswith("features-2048.pt"))
    x = own_features(inception, images).double()
    y = torch.load(kept, weights_only=True).double()
    numbers = {name: entry["value"] for name, entry in found["metrics"].items()}
    assert set(numbers) == {"fid", "kid", "isc", "precision", "recall", "f_score"}
    # Of ten images a covariance is a product X Xᵀ of few columns, and tr (C₁C₂)^½ the sum of the
    # singular values of XᵀY. torch-fidelity takes roots of 2,048 eigenvalues, of which all but nine
    # are rounding errors of some 1e-17 of the traces squared: 2,048 · 3e-9 of the traces.
    traces = float(x.var(0).sum() + y.var(0).sum())
    overlap = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T / 9).sum()
    fid = float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * overlap)
    assert numbers["fid"] == pytest.approx(fid, abs=1e-5 * traces)
    assert numbers["fid"] > 0.1 * traces  # the tolerance means something
    # All images are in each subset, so that KID is the unbiased estimate itself.
    kernel = lambda a, b: (a @ b.T / 2048 + 1) ** 3  # noqa: E731
    off = 1 - torch.eye(10, dtype=torch.float64)
    own = sum(float((kernel(z, z) * off).sum()) / 90 for z in (x, y))
    assert numbers["kid"] == pytest.approx(own - 2 * float(kernel(x, y).mean()), rel=1e-4)
    assert numbers["isc"] == pytest.approx(1.0)  # ten splits of one image each
    # Precision: the share of images within reach of the third neighbour of a reference image.
    reach = torch.cdist(y, y).kthvalue(4).values
    assert numbers["precision"] == pytest.approx(
        float((torch.cdist(x, y) <= reach).any(1).double().mean())
    )
    assert (found["samples"], found["reference_samples"]) == (10, 10)
    assert found["channels"] == "grey repeated to three"
    assert found["source"] == "test"
    assert not found["weights"]["published"]
    assert found["metrics"]["kid"]["spread"] == pytest.approx(0.0, abs=1e-6)
    assert found["metrics"]["kid"]["spread_is"] == "standard deviation over 2 subsets of 10"
    assert found["metrics"]["fid"]["spread"] is None
    json.dumps(found)

    # The reference comes from the cache, and what is damaged there is refused.
    for file in tmp_path.iterdir():
        assert file.name.startswith(f"cldsde-{images_sha256(reference)[:32]}")
    seen = []
    monkeypatch.setattr(
        "cldsde.images.evaluation._Coloured.__getitem__",
        lambda self, index: seen.append(index) or self.images[index].expand(3, -1, -1),
    )
    again = inception_metrics(images[:4], reference, inception, metrics=["prc"], cache=tmp_path)
    assert sorted(seen) == [0, 0, 1, 2, 3]  # the first one is looked at twice
    assert 0 <= again["metrics"]["precision"]["value"] <= 1
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cache: .*2048\.pt is damaged.*delete it"):
        inception_metrics(images, reference, inception, cache=tmp_path, **arguments)


@pytest.mark.slow
def test_fid_of_identical_sets_is_zero(inception):
    images = noise(12, 0, (3, 8, 8))
    found = inception_metrics(images, images, inception, metrics=["fid"])
    traces = 2 * float(own_features(inception, images).double().var(0).sum())
    # As above: roots of eigenvalues that are rounding errors.
    assert found["metrics"]["fid"]["value"] == pytest.approx(0.0, abs=1e-5 * traces)
    assert found["channels"] == "three"


class Bomb:
    """What a pickle must not do."""

    def __reduce__(self):
        return (exit, (3,))


def file_of(kind: str, file, inception) -> None:
    if kind == "truncated":
        file.write_bytes(inception.read_bytes()[:1_000_000])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("<html>404</html>")
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(), protocol=2))
    elif kind == "code":
        torch.save({"fc.weight": Bomb()}, file)
    elif kind == "list":
        torch.save([torch.zeros(1)], file)
    elif kind == "other":
        torch.save({"weight": torch.zeros(1)}, file)
    elif kind == "nan":
        torch.save({"weight": torch.full((1,), torch.nan)}, file)
    elif kind == "shape":
        state = torch.load(inception, weights_only=True)
        torch.save({**state, "fc.bias": torch.zeros(1000)}, file)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "damaged, or holds other things"),
        ("empty", "damaged, or holds other things"),
        ("text", "damaged, or holds other things"),
        ("pickle", "damaged, or holds other things"),
        ("code", "damaged, or holds other things"),
        ("list", "dictionary of tensors; got list"),
        ("other", "names or shapes.*Missing key"),
        ("nan", "NaN or infinity"),
        ("shape", "names or shapes.*fc.bias"),
    ],
)
def test_other_files_than_weights_are_refused_by_name(kind, message, inception, tmp_path):
    file = tmp_path / "mine.pth"
    file_of(kind, file, inception)
    images = noise(10, 0, (1, 8, 8))
    with pytest.raises(ValueError, match=rf"weights: .*mine\.pth .*{message}"):
        inception_metrics(images, images, file, metrics=["fid"])


def test_code_in_the_cache_is_not_run(inception, tmp_path):
    images = noise(10, 0, (1, 8, 8))
    weights = hashlib.sha256(inception.read_bytes()).hexdigest()
    file = tmp_path / f"cldsde-{images_sha256(images)[:32]}-{weights[:32]}-features-2048.pt"
    torch.save([Bomb()], file)
    with pytest.raises(ValueError, match=r"cache: .*2048\.pt is damaged or holds code"):
        inception_metrics(images, images, inception, metrics=["fid"], cache=tmp_path)
    # Nor would it be if it came there later, though torch-fidelity asks for it.
    with _plain_loads(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)


@pytest.mark.usefixtures("offline")
def test_missing_weights_are_asked_for_and_not_fetched(tmp_path):
    pytest.importorskip("torch_fidelity")
    images = noise(10, 0, (1, 8, 8))
    message = r"no file .*absent\.pth; get weights-inception-2015-12-05-6726825d\.pth.*https://"
    with pytest.raises(FileNotFoundError, match=message):
        inception_metrics(images, images, tmp_path / "absent.pth", metrics=["fid"])


def test_missing_torch_fidelity_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    images = noise(10, 0, (1, 8, 8))
    with pytest.raises(ImportError, match=r"torch-fidelity: pip install 'cldsde\[images\]'"):
        inception_metrics(images, images, tmp_path / "absent.pth", metrics=["fid"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": []}, "metrics must be some of 'fid', 'kid', 'isc', 'prc'; got"),
        ({"metrics": "fid"}, "metrics must be some of"),
        ({"metrics": ["is"]}, "metrics must be some of"),
        (
            {"metrics": ["kid"]},
            "images must hold at least 1000 images, for kid_subset_size; got 10",
        ),
        ({"metrics": ["prc"], "images": noise(3, 0)}, "at least 4 images, for 3 neighbours"),
        (
            {"images": noise(9, 0), "metrics": ["isc"]},
            "images must hold at least 10 images, for 10 splits",
        ),
        ({"images": noise(10, 0, (2, 4, 4))}, "reference must have the shape of images"),
        (
            {"images": noise(10, 0, (2, 4, 4)), "reference": noise(10, 0, (2, 4, 4))},
            "images must have 1 or 3 channels; got 2",
        ),
        ({"device": "mps"}, "device must be 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "cuda:99"}, "this machine has no cuda:99"),
        ({"seed": 2**32}, "seed must lie in"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"batch": 0}, "batch must be"),
    ],
)
def test_inception_refuses_before_it_reads_the_weights(changes, message, tmp_path):
    arguments = {"images": noise(10, 0), "reference": noise(10, 1), "metrics": ["fid"]}
    with pytest.raises(ValueError, match=message):
        inception_metrics(weights=tmp_path / "absent.pth", **{**arguments, **changes})


# Likelihood


def gaussian(dimension: int = 4, spread: float = 0.3) -> GaussianMixture:
    covariance = spread**2 * torch.eye(dimension, dtype=torch.float64)
    return GaussianMixture([1.0], torch.zeros(1, dimension), covariance.unsqueeze(0))


def closed_form(images, *, levels, seed, scale="bins", spread=0.3):
    """Bits of N(0, spread²) at the images as they are dequantised."""
    end = 1.0 if scale == "bins" else levels / (levels - 1)
    generator = torch.Generator().manual_seed(seed)
    x = dequantise(images, count=levels, low=-end, high=end, generator=generator).double()
    law = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), spread)
    nats = -law.log_prob(x).flatten(1).mean(1) - math.log(2 * end / levels)
    return nats / math.log(2)


@pytest.mark.parametrize(("levels", "scale"), [(256, "bins"), (17, "bins"), (17, "ends")])
def test_bits_of_a_gaussian_are_those_of_its_density(levels, scale):
    images = noise(6, 0, (1, 2, 2), top=levels)
    sde = VPSDE()
    found = likelihood(
        ReverseProcess(sde, gaussian().score(sde)),
        images,
        levels=levels,
        scale=scale,
        seed=5,
        batch=4,
        divergence="exact",
    )
    exact = closed_form(images, levels=levels, seed=5, scale=scale)
    # The prior is the law at T up to e^{−B/2} = 0.007 of the mean, which is squared in the density;
    # t_min = 1e-5 adds 1e-6 to a variance of 0.09, the ODE's tolerance 1e-5 nats a datum.
    assert found["bits_per_dim"] == pytest.approx(float(exact.mean()), abs=2e-4)
    # The standard error is that of the mean over images.
    assert found["standard_error"] == pytest.approx(float(exact.std()) / math.sqrt(6), rel=1e-2)
    assert not found["is_bound"]
    assert found["settings"]["kind"] == "exact"
    assert "exact up to its tolerance" in found["quantity"]
    assert found["nfev"] > 10
    json.dumps(found)


def test_hutchinson_agrees_on_a_linear_score():
    # The Jacobian is diagonal, where signs give the trace without noise.
    images = noise(5, 0, (1, 2, 2))
    sde = VPSDE()
    process = ReverseProcess(sde, gaussian().score(sde))
    exact, estimated = (
        likelihood(process, images, divergence=divergence)["bits_per_dim"]
        for divergence in ("exact", "hutchinson")
    )
    assert estimated == pytest.approx(exact, abs=1e-5)  # float32 states


def test_bound_of_langevin_diffusion_is_above_the_bits_of_the_density():
    images = noise(40, 0, (1, 2, 2))
    sde = CLD()
    found = likelihood(gaussian().score(sde), images, seed=1, t_min=1e-2)
    exact = closed_form(images, levels=256, seed=1)
    assert found["is_bound"]
    assert found["settings"]["kind"] == "bound"
    assert "negative lower bound" in found["quantity"]
    # The bound holds in expectation; its noise and that of the data are in the standard error. With
    # an exact score the gap is that between q(z|x) and the posterior, small against a bit.
    gap = found["bits_per_dim"] - float(exact.mean())
    assert -3 * found["standard_error"] < gap < 0.5


def test_one_image_has_no_standard_error_and_the_seed_decides():
    images = noise(1, 0, (1, 2, 2))
    score = gaussian().score(VPSDE())
    first, same, other = (likelihood(score, images, seed=seed) for seed in (0, 0, 1))
    assert first["standard_error"] is None
    assert first == same
    assert first["bits_per_dim"] != other["bits_per_dim"]


def test_bar_is_shown_only_when_asked_for(capsys):
    images = noise(4, 0, (1, 2, 2))
    score = gaussian().score(VPSDE())
    likelihood(score, images, rtol=1e-2, atol=1e-2)
    frechet(images, images, flat)
    assert capsys.readouterr() == ("", "")
    likelihood(score, images, rtol=1e-2, atol=1e-2, progress=True)
    frechet(images, images, flat, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "likelihood" in err
    assert "features" in err


class Network(torch.nn.Module):
    """A module as a score, in training mode."""

    sde = VPSDE()

    def forward(self, z, _t):
        return -z


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a ReverseProcess, or a score with"),
        ({"model": Network()}, ValueError, r"evaluation mode; call \.eval\(\)"),
        ({"images": torch.zeros(2, 1, 2, 2)}, TypeError, "images must be a uint8 tensor"),
        ({"images": noise(0, 0, (1, 2, 2))}, ValueError, "images must hold at least 1"),
        ({"levels": 17}, ValueError, "images must have values below levels, 17; got"),
        ({"levels": 257}, ValueError, "levels must be at most 256"),
        ({"kind": "best"}, ValueError, "kind must be one of 'auto', 'exact', 'bound'"),
        ({"scale": "unit"}, ValueError, "scale must be one of 'bins', 'ends'"),
        (
            {"model": gaussian().score(CLD()), "kind": "exact"},
            ValueError,
            "needs a process without",
        ),
        ({"divergence": "none"}, ValueError, "divergence must be one of"),
        ({"batch": 0}, ValueError, "batch must be"),
        ({"samples": 0}, ValueError, "samples must be"),
        ({"t_min": 0.0}, ValueError, "t_min must lie in"),
        ({"rtol": -1.0}, ValueError, "rtol must be finite and positive"),
    ],
)
def test_likelihood_refuses(changes, error, message):
    arguments = {"model": gaussian().score(VPSDE()), "images": noise(3, 0, (1, 2, 2))}
    with pytest.raises(error, match=message):
        likelihood(**{**arguments, **changes})
