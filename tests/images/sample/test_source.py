"""Models of diffusers as something to sample."""

import pytest
import torch

from cldsde import CLD, DenoiserScore, ReverseProcess, pretrained, solvers
from cldsde.images.config import ProcessConfig
from cldsde.images.sample import ImageSampler
from cldsde.images.sample.sampler import changed_recipe
from cldsde.images.sample.source import of_diffusers
from cldsde.score import ConditionalScore
from cldsde.solvers.recommended import fit_grid, window
from tolerances import EPS

pytest.importorskip("diffusers")


def test_digests_know_every_digit_of_a_process(diffusers_model):
    digests = [
        of_diffusers(diffusers_model, ProcessConfig(name="CLD", options={"beta": beta})).digest
        for beta in (4.0, 4.0, 4.0 * (1 + EPS), (4.0, 5.0))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_images_are_those_of_the_same_steps_of_solvers(diffusers_model):
    model = of_diffusers(diffusers_model, ProcessConfig(name="CLD"))
    recipe = changed_recipe(model.sampling, solver="multistep-2-sde", nfe=6)
    sampler = ImageSampler.of(model, recipe, label=0)
    found = sampler.sample([2, 3, 4]).images
    sde = CLD()
    score = DenoiserScore(pretrained.from_diffusers(diffusers_model), sde)
    process = ReverseProcess(sde, ConditionalScore(score, class_labels=torch.tensor(0)))
    solver = solvers.ExponentialMultistep(order=2, stochasticity=1.0)
    start, end = window(ReverseProcess(sde, score))
    noise = solvers.SampleNoise([2, 3, 4])
    times = fit_grid(process, solver, start, end, 5)
    state = noise.start(sde, (1, 8, 8), t=start)
    data = solvers.plan(process, solver, times).solve(state, noise=noise, denoise=True).data
    levels = ((data.clamp(-1, 1) + 1) * 127.5).round()
    # Rounding to grey levels may differ by one.
    assert (found.long() - levels).abs().max() <= 1
    assert found.double().std() > 0
