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
        ("user_networks:round", "has no attribute 'round'"),
        ("user_networks:number", "must be callable.*is int"),
        ("user_networks:Needy", "made without arguments.*weights"),
    ],
)
def test_names_that_lead_nowhere_are_rejected(name, message):
    with pytest.raises(ValueError, match=message):
        load_features(name)


def test_a_function_that_returns_no_features_is_rejected():
    with pytest.raises(ValueError, match=r"fails for images \(2, 3, 4, 4\) \(TypeError: features"):
        check_features(torch.flatten, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
