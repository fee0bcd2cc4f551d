"""The classifier of the demonstration."""

from __future__ import annotations

import torch

from cldsde.images.data import digits
from cldsde.images.digit_classifier import train_classifier


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
