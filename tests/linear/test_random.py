"""Normals from one generator or from several."""

from __future__ import annotations

import pytest
import torch

from cldsde import CLD
from cldsde.linear.random import standard_normal


def draw(n: int, generator):
    return standard_normal((n, 3), generator=generator, dtype=torch.float32, device="cpu")


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_several_generators_draw_for_even_shares_of_the_batch():
    together = draw(6, seeded(1, 2, 3))
    apart = [draw(2, generator) for generator in seeded(1, 2, 3)]
    assert torch.equal(together, torch.cat(apart))
    assert torch.equal(draw(6, seeded(1)), draw(6, seeded(1)[0]))


@pytest.mark.parametrize("count", [0, 4])
def test_uneven_shares_are_refused(count):
    with pytest.raises(ValueError, match="length divides the batch"):
        draw(6, seeded(*range(count)))


@pytest.mark.parametrize(
    "generator",
    [3, "0", 1.0, [3], [torch.Generator(), None]],
    ids=["integer", "text", "float", "list of integers", "list with None"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda g: CLD().prior.sample((4, 2), generator=g),
        lambda g: CLD().augment(torch.zeros(4, 2), generator=g),
        lambda g: CLD().perturb(torch.zeros(4, 2), 0.5, generator=g),
        lambda g: CLD().perturb(torch.zeros(4, 2), 0.5, conditioning="all", generator=g),
        lambda g: CLD().transition(0.2, 0.5).sample(torch.zeros(4, 2, 1), generator=g),
        lambda g: CLD().transition(0.2, 0.5).perturb(torch.zeros(4, 2, 1), generator=g),
        lambda g: CLD().posterior(0.2, 0.5).sample(*[torch.zeros(4, 2, 1)] * 2, generator=g),
    ],
    ids=["prior", "augment", "perturb", "perturb all", "sample", "kernel", "posterior"],
)
def test_what_is_no_generator_is_rejected(call, generator):
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator.* or None; got "):
        call(generator)
