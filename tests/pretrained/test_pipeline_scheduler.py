"""Pipelines of diffusers sample with any process, and change nothing else."""

import copy
import dataclasses
import functools
from unittest import mock

import pytest
import torch

from cldsde import CLD, VESDE, VPSDE, DenoiserScore, ReverseProcess, pretrained, solvers
from cldsde.pretrained.stepping import PathSteps
from probes import generator
from tolerances import rounding

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402 -- needs both libraries
from tiny_pipelines import CASES  # noqa: E402

FIRST = solvers.ExponentialMultistep(order=1)
# Networks, guidance and a few steps in float32, of numbers up to the largest latent.
CLOSE = 1e-5
# Of each of these kinds of pipelines the others differ by the network or its prediction.
FEW = ("DDPM", "DiT", "SD", "SD-img2img", "SD-inpaint-4", "SD3")
PIPELINES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW)) for name in CASES]
every_pipeline = pytest.mark.parametrize("name", PIPELINES)


@functools.cache
def built(name):
    return tiny_pipelines.make(name)


def pipeline(name, *args, **options):
    """A pipeline with the scheduler; its networks are shared by the tests."""
    pipe = copy.copy(built(name))
    pipe.scheduler = pretrained.PipelineScheduler(pipe.scheduler, *args, **options)
    return pipe


def far(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@functools.cache
def configured(name):
    """A pipeline whose process and solver are not the default ones."""
    return pipeline(name, CLD(beta=3.0), end=0.05)


@functools.cache
def latents(name):
    found = CASES[name].call(configured(name), [0, 1, 2])
    assert bool(found.isfinite().all())
    return found


@pytest.mark.one_in(2)
@every_pipeline
def test_order_1_without_noise_gives_the_latents_of_the_replaced_scheduler(name):
    pipe = pipeline(name, "VPSDE", FIRST, grid="scheduler")
    assert far(CASES[name].call(pipe, [0]), CASES[name].call(built(name), [0])) <= CLOSE


# Pipelines for inpainting change the latents, or give the network more than them.
@pytest.mark.parametrize("name", [x for x in PIPELINES if "inpaint" not in x.values[0]])
def test_latents_are_those_of_solve_on_the_guided_prediction(name):
    """From the state of CLD at which the scheduler starts."""
    solver = solvers.ExponentialMultistep(order=2)
    pipe, states, started = pipeline(name, "CLD", solver), [], PathSteps._started

    def noted(steps, first, *arguments):
        states.append((first, started(steps, first, *arguments)))
        return states[-1][1].clone()

    with mock.patch.object(PathSteps, "_started", noted):
        _, latents, conditions = CASES[name].recorded(pipe, [0, 1])
    ((first, state),), steps = states, pipe.scheduler.steps
    denoiser = CASES[name].guided(pretrained.from_diffusers(pipe), conditions)
    process = ReverseProcess(steps.sde, DenoiserScore(denoiser, steps.sde))
    # DiT has both halves of a guided batch.
    found = solvers.solve(process, solver, state[:2], steps.times[first:], denoise=True)
    assert far(found.data, latents[:2]) <= CLOSE


@pytest.mark.parametrize(
    ("name", "classes"), [("DiT", 1000), pytest.param("PixArt", None, marks=pytest.mark.slow)]
)
def test_only_networks_of_classes_have_classes(name, classes):
    """PixArt's configuration has a number of them, too."""
    denoiser = pretrained.from_diffusers(built(name))
    assert denoiser.classes == denoiser.null_class == classes


@every_pipeline
def test_a_sample_does_not_depend_on_its_batch(name):
    case, together = CASES[name], latents(name)
    if name == "DiT":  # one half with and one half without classes
        together = together.chunk(2)[0]
    alone = case.call(configured(name), [2])
    assert far(alone[:1], together[2:]) <= CLOSE


@every_pipeline
def test_a_pipeline_is_saved_and_loaded_with_it(name, tmp_path):
    pipe = configured(name)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert type(loaded.scheduler) is pretrained.PipelineScheduler
    assert loaded.scheduler.sde.beta == 3.0
    assert torch.equal(CASES[name].call(loaded, [0, 1, 2]), latents(name))


@pytest.mark.parametrize("grid", ["root_times", "scheduler"])
def test_two_pipelines_share_the_steps_of_one(grid):
    """SDXL's base until half of the noise, and its refiner from there; from x alone."""
    case = CASES["SDXL"]
    base = pipeline("SDXL", "VPSDE", FIRST, grid=grid)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components)
    refiner.set_progress_bar_config(disable=True)
    expected = case.call(base, [0])
    half = case.call(base, [0], denoising_end=0.5)
    assert float((half - expected).abs().max()) > CLOSE
    found = refiner(
        prompt=tiny_pipelines.PROMPTS[:1],
        negative_prompt=["a"],
        image=half,
        denoising_start=0.5,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert far(found, expected) <= CLOSE


SETTINGS = solvers.SamplerSettings(
    kappa=(-2.2, -0.9, 0.4, 2.3), stochasticity=(0.3, 1.2, 0.9), process=repr(CLD()), order=3
)


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_fitted_settings_are_the_steps(name):
    scheduler = pipeline(name, settings=SETTINGS).scheduler
    scheduler.set_timesteps(5 if name == "SD3" else 4)  # one step more, from noise alone
    kappa = scheduler.sde.kappa(scheduler.steps.times)
    levels = torch.tensor(SETTINGS.kappa, dtype=torch.float64)
    torch.testing.assert_close(kappa, levels, rtol=0, atol=rounding(2**12))


def test_fitted_settings_are_read_from_a_file_and_saved_with_the_pipeline(tmp_path):
    SETTINGS.save(tmp_path / "settings.json")
    pipe = pipeline("DDPM", settings=tmp_path / "settings.json")
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.settings == SETTINGS
    found, again = (CASES["DDPM"].call(each, [0, 1]) for each in (pipe, loaded))
    assert torch.equal(found, again)


@torch.no_grad()
def test_steps_with_settings_are_those_of_sample():
    pipe, sde = built("DDPM"), VPSDE()
    settings = dataclasses.replace(SETTINGS, stochasticity=(0, 0, 0), process=repr(sde))
    scheduler = pretrained.PipelineScheduler(pipe.scheduler, sde, settings=settings)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 8, 8, generator=generator())
    process = ReverseProcess(sde, DenoiserScore(pretrained.from_diffusers(pipe), sde))
    expected = solvers.solve(
        process, settings.solver, x.unsqueeze(1), settings.times(sde), denoise=True
    ).data
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    assert far(x, expected) <= CLOSE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": "VPSDE"}, r"for this process, VPSDE.* settings for CLD"),
        ({"grid": "scheduler"}, "solver and grid must be left out with settings"),
        ({"start": 0.5}, "start must be None with settings"),
        ({"settings": {}}, r"settings must have the fields kappa, .*; got \[\]"),
        ({"settings": 3}, "settings must be a SamplerSettings, or a file of them; got int"),
    ],
)
def test_options_that_contradict_settings_are_rejected(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipeline("SD", **{"settings": SETTINGS} | options)


@pytest.mark.parametrize(
    ("name", "n", "kappa", "message"),
    [
        ("SD", 5, SETTINGS.kappa, "must be 4, the number of levels in the settings; got 5"),
        ("SD3", 4, SETTINGS.kappa, "must be 5, .* in the settings and 1; got 4"),
        ("SD", 4, (-4.5, -0.9, 0.4, 2.3), r"levels that the network knows, from -2\.\d+ to"),
        ("SD", 4, (-0.5, -0.1, 0.4, 2.3), "must start at -2 or less, because latents"),
    ],
)
def test_settings_for_other_steps_or_levels_are_rejected(name, n, kappa, message):
    settings = dataclasses.replace(SETTINGS, kappa=kappa)
    scheduler = pipeline(name, settings=settings).scheduler
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(n)


def test_a_process_without_the_least_noise_of_the_network_is_rejected():
    with pytest.raises(ValueError, match=r"down to σ = 0\.18\d+; VESDE.* has none below σ = 1\."):
        pipeline("SD", VESDE(1.0, 50.0)).scheduler.set_timesteps(5)
