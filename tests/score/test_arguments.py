"""Representations of scores and data, and generators that are none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cldsde import CLD, VPSDE, GaussianMixture, ReverseProcess
from cldsde.score import (
    MixedScore,
    TimeSampler,
    dequantise,
    evidence_lower_bound,
    flow_log_prob,
    log_likelihood,
    score_matching_loss,
)

DATA = GaussianMixture([1.0, 1.0], [[-1.0, 0.0], [1.0, 0.5]], [torch.eye(2).tolist()] * 2)
SDE = VPSDE()
PROCESS = ReverseProcess(SDE, DATA.score(SDE))
X = torch.zeros(4, 2)


def zero_score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(z)


VP = "VPSDE(beta_min=0.1, beta_max=20.0)"
MIXTURE = "GaussianMixture(modes=2, dimension=2)"
REPRESENTATIONS: dict[str, Callable[[], object]] = {
    MIXTURE: lambda: DATA,
    f"MixtureScore(data={MIXTURE}, sde={VP}, rows=[0])": lambda: DATA.score(SDE),
    f"ReverseProcess(sde={VP}, score=MixtureScore(data={MIXTURE}, sde={VP}, rows=[0]))": (
        lambda: PROCESS
    ),
    f"ReverseProcess(sde={VP}, score=<function zero_score>)": (
        lambda: ReverseProcess(SDE, zero_score)
    ),
    f"ReverseProcess(sde={VP}, score=MixedScore(…))": lambda: ReverseProcess(
        SDE, MixedScore(torch.nn.Identity(), SDE, 0.0, 1.0)
    ),
}


@pytest.mark.parametrize("text", list(REPRESENTATIONS))
def test_representations_show_the_parts_in_one_line(text: str) -> None:
    made = REPRESENTATIONS[text]()
    assert repr(made) == text
    assert repr(copy.deepcopy(made)) == text
    assert repr(pickle.loads(pickle.dumps(made))) == text


def test_a_mixed_score_shows_its_process_and_its_network() -> None:
    text = repr(MixedScore(torch.nn.Identity(), CLD(), 0.0, 1.0, inputs="estimate"))
    assert f"sde={CLD()!r}, inputs='estimate'" in text
    assert "(network): Identity()" in text


CALLS: dict[str, Callable[[Any], object]] = {
    "mixture": lambda g: DATA.sample(4, generator=g),
    "times": lambda g: TimeSampler(lambda t: 1 / t, t_min=1e-3).sample(4, generator=g),
    "levels": lambda g: dequantise(torch.zeros(4, dtype=torch.long), generator=g),
    "loss": lambda g: score_matching_loss(PROCESS.score, SDE, X, 0.5, generator=g),
    "bound": lambda g: evidence_lower_bound(
        PROCESS.score, SDE, X, torch.full((4,), 0.5), torch.ones(4), t_min=1e-3, generator=g
    ),
    "flow": lambda g: flow_log_prob(PROCESS, X.unsqueeze(1), 0.1, generator=g),
    "likelihood": lambda g: log_likelihood(PROCESS, X, generator=g),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_what_is_no_generator_is_rejected(name: str) -> None:
    with pytest.raises(
        TypeError, match=r"generator must be a torch\.Generator.* got 3\. For a seed"
    ):
        CALLS[name](3)
