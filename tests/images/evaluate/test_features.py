"""Finding a user's feature network, and its name."""

import sys

import pytest
import torch

from cldsde.images.evaluate import load_features
from cldsde.images.evaluate.distances import check_features, feature_name

MODULE = """
import torch

def flat(images):
    return images.flatten(1).double()

class Network(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def forward(self, images):
        return images.float().mean((2, 3))

class Needy:
    def __init__(self, weights):
        pass

number = 3
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "user_networks.py").write_text(MODULE)
    (tmp_path / "user_broken.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "user_exits.py").write_text("raise SystemExit(99)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("user_networks", None)


@pytest.mark.usefixtures("networks")
def test_functions_and_classes_are_found():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    flat = load_features("user_networks:flat")
    assert flat(images).shape == (2, 48)
    assert feature_name(flat) == "user_networks:flat"
    network = load_features("user_networks:Network")
    assert network(images).shape == (2, 3)
    assert feature_name(network) == "user_networks:Network"
    assert not network.training
    assert not any(x.requires_grad for x in network.parameters())


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_networks", "cannot be loaded as module:attribute"),
        ("no_such_module:flat", "No module named 'no_such_module'"),
        ("user_networks:round", "has no attribute 'round'"),
        ("user_networks:number", "must be callable.*is int"),
        ("user_networks:Needy", "features: .*required.*weights"),
        ("builtins:type", "features: type.* takes"),
        ("user_exits:flat", r"module:attribute \(SystemExit: 99"),
        ("user_broken:flat", "a_module_that_is_not_there"),
    ],
)
def test_names_that_lead_nowhere_are_rejected(name, message):
    with pytest.raises(ValueError, match=message):
        load_features(name)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.flatten, r"ValueError: features must return a tensor \(B, F\)"),
        (lambda images: images.float(), r"ValueError: features must return a tensor \(B, F\)"),
        (lambda images: images.flatten(1) @ torch.ones(3), "RuntimeError"),
        (lambda: None, "TypeError"),
    ],
)
def test_functions_that_return_no_features_are_rejected(features, words):
    with pytest.raises(ValueError, match=rf"fails for images \(2, 3, 4, 4\) \({words}"):
        check_features(features, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
