"""Models of diffusers, and networks that are faster by precision, memory format or compilation."""

import numpy as np
import pytest
import torch

from cldsde import CLD, DenoiserScore, ReverseProcess, pretrained, solvers
from cldsde.images.config import ProcessConfig
from cldsde.images.model import load_model
from cldsde.images.sample import ImageSampler, speed_up
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


def images(run, mode=None, *, channels_last=False, **options):
    model = load_model(run)
    speed_up(model, mode, channels_last=channels_last)
    # The last batch of seeds is smaller.
    sampler = ImageSampler.of(model, model.config.sampling, batch=3, **options)
    return np.int64(sampler.sample(range(3, 8)).images)


def test_half_precision_changes_images_by_its_rounding(digits_run):
    plain, half = (images(digits_run, precision=name) / 16 for name in ("fp32", "bf16"))
    # bfloat16 has eight bits; half of a level of 17 moves a few pixels.
    assert abs(plain - half).mean() < 2**-8


@pytest.mark.parametrize(
    "mode",
    [None, *(pytest.param(x, marks=pytest.mark.slow) for x in ("default", "reduce-overhead"))],
)
def test_images_of_faster_networks_are_the_same_up_to_rounding(digits_run, mode):
    fast = images(digits_run, mode, channels_last=True)
    # Rounding of single precision moves a number to the next level at most.
    assert abs(fast - images(digits_run)).max() <= 1
