"""Pipelines of diffusers sample with any process, and change nothing else."""

import copy
import functools

import pytest
import torch

from cldsde import CLD, pretrained, solvers

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402 -- needs both libraries
from tiny_pipelines import CASES  # noqa: E402

FIRST = solvers.ExponentialMultistep(order=1)
# Networks, guidance and a few steps in float32, of numbers up to the largest latent.
CLOSE = 1e-5
NAMES = [name for name in CASES if name != "AuraFlow"]
every_pipeline = pytest.mark.parametrize("name", NAMES)


def Scheduler(*args, **options):  # noqa: N802 -- diffusers is imported when it is called
    return pretrained.PipelineScheduler(*args, **options)


@functools.cache
def built(name):
    return tiny_pipelines.make(name)


def pipeline(name, *args, **options):
    """A pipeline with the scheduler; its networks are shared by the tests."""
    pipe = copy.copy(built(name))
    pipe.scheduler = Scheduler(pipe.scheduler, *args, **options)
    return pipe


def far(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@functools.cache
def latents(name):
    return CASES[name].call(pipeline(name), [0, 1, 2])


@every_pipeline
def test_order_1_without_noise_gives_the_latents_of_the_replaced_scheduler(name):
    pipe = pipeline(name, "VPSDE", FIRST, grid="scheduler")
    assert far(CASES[name].call(pipe, [0]), CASES[name].call(built(name), [0])) <= CLOSE


@every_pipeline
def test_latents_are_finite_and_the_same_twice(name):
    again = CASES[name].call(pipeline(name), [0, 1, 2])
    assert bool(again.isfinite().all())
    assert torch.equal(again, latents(name))


@every_pipeline
def test_a_sample_does_not_depend_on_its_batch(name):
    case, together = CASES[name], latents(name)
    if name == "DiT":  # one half with and one half without classes
        together = together.chunk(2)[0]
    for i in range(3):
        alone = case.call(pipeline(name), [i])
        assert far(alone[:1], together[i : i + 1]) <= CLOSE


@every_pipeline
def test_a_pipeline_is_saved_and_loaded_with_it(name, tmp_path):
    pipe = pipeline(name, CLD(beta=3.0), solvers.ExponentialMultistep(order=2), end=0.05)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert type(loaded.scheduler) is pretrained.PipelineScheduler
    assert loaded.scheduler.sde.beta == 3.0
    found, expected = (CASES[name].call(each, [0, 1, 2]) for each in (loaded, pipe))
    assert torch.equal(found, expected)
