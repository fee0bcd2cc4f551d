"""Pipelines of diffusers sample with any process, and change nothing else."""

import copy
import dataclasses
import functools

import pytest
import torch

from cldsde import (
    CLD,
    VESDE,
    VPSDE,
    DenoiserScore,
    PredictionDenoiser,
    ReverseProcess,
    pretrained,
    solvers,
)
from cldsde.pretrained.conventions import Convention
from cldsde.pretrained.stepping import PathSteps
from cldsde.score.reverse import KnownScore
from cldsde.score.times import KnownTimes
from probes import Recorder, generator
from tolerances import rounding

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402 -- needs both libraries
from tiny_pipelines import CASES  # noqa: E402

FIRST = solvers.ExponentialMultistep(order=1)
SECOND = solvers.ExponentialMultistep(order=2, stochasticity=1.0)
# Networks, guidance and a few steps in float32, of numbers up to the largest latent.
CLOSE = 1e-5
# Of each of these kinds of pipelines the others differ by the network or its prediction.
FEW = ("DDPM", "DiT", "SD", "SD-img2img", "SD-inpaint-4", "SD3")


def of_pipelines(left_out):
    """Parameters of a test: pipelines but for some."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW))
            for name in CASES
            if name not in left_out
        ],
    )


every_pipeline = of_pipelines(["AuraFlow"])


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


def denoiser_of(name, pipe, record):
    """The guided denoiser of a call of a pipeline."""
    if name == "SD-inpaint-9":  # mask and masked image follow the latents
        rest = record.positional[0][:, 4:]
        network = lambda x, t, **given: pipe.unet(torch.cat([x, rest], 1), t, **given).sample  # noqa: E731
        path = pretrained.from_diffusers(built("SD")).path
        denoiser = PredictionDenoiser(network, path)
    else:
        denoiser = pretrained.from_diffusers(pipe)
    return CASES[name].guided(denoiser, record.conditions)


@functools.cache
def recorded(name):
    """Pipeline, recorded call, first level of its process, state there, and normals."""
    pipe, states, draws = pipeline(name, "CLD", SECOND), [], []
    started, step = PathSteps._started, PathSteps.step

    def noted_start(self, j, x, noise):
        states.append((j, started(self, j, x, noise)))
        return states[-1][1].clone()

    def noted_step(self, i, x, data, noise):
        return step(self, i, x, data, Recorder(noise, draws))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PathSteps, "_started", noted_start)
        patch.setattr(PathSteps, "step", noted_step)
        record = CASES[name].recorded(pipe, [0, 1])
    ((first, state),) = states
    return pipe, record, first, state, draws


@of_pipelines(["AuraFlow", "SD-inpaint-4"])
def test_latents_are_those_of_solve_on_the_guided_prediction(name):
    """From the state and with the normals of the scheduler, which are recorded."""
    pipe, record, first, state, draws = recorded(name)
    steps = pipe.scheduler.steps
    score = DenoiserScore(denoiser_of(name, pipe, record), steps.sde)
    noise = solvers.RecordedNoise([draw[:2] for draw in draws[1:]])  # DiT has both halves
    process = ReverseProcess(steps.sde, score)
    times = steps.times[first:]
    found = solvers.solve(process, SECOND, state[:2], times, noise=noise, denoise=True)
    assert far(found.data, record.latents[-1][:2]) <= CLOSE


@torch.no_grad()
def test_latents_that_a_mask_changes_are_those_of_the_solver_on_changed_states():
    """Inpainting with 4 channels sets x after each step; z = ψ x/α + … changes by ψ Δx/α."""
    pipe, record, first, z, draws = recorded("SD-inpaint-4")
    sde, times = pipe.scheduler.steps.sde, pipe.scheduler.steps.times[first:]
    score = DenoiserScore(denoiser_of("SD-inpaint-4", pipe, record), sde)
    process, noise = ReverseProcess(sde, score), solvers.RecordedNoise(draws[1:])
    tables, memory = SECOND.prepare(process, times), ()
    known = KnownScore(process, KnownTimes(times), z)
    psi = sde.marginal(times).mean[:, :, 0]
    alpha = Convention.of(built("SD-inpaint-4").scheduler).scales(sde.log_snr(times))[0]
    for i in range(len(times) - 1):
        z, memory = SECOND.step(z, memory, tables, i, known, noise)
        change = record.inputs[i + 1] - record.latents[i]
        assert float(change.abs().max()) > CLOSE
        shift = (psi[i + 1] / alpha[i + 1]).float().reshape(1, -1, 1, 1, 1)
        z = z + shift * change.unsqueeze(1)
    assert far(score.data_prediction(z, times[-1]), record.latents[-1]) <= CLOSE


@of_pipelines(["SD-inpaint-9"])
@torch.no_grad()
def test_from_diffusers_agrees_with_each_guided_call(name):
    (pipe, record, *_), convention = recorded(name), Convention.of(built(name).scheduler)
    denoiser = denoiser_of(name, pipe, record)
    for x, output, t in zip(record.inputs, record.outputs, record.times, strict=True):
        log_snr = convention.log_snr(t.double().reshape(1))
        signal, noise = (float(scale) for scale in convention.scales(log_snr))
        if signal < 1e-6:  # SD3 and its like start at infinite noise
            continue
        of_x, of_output = convention.estimate(signal, noise)
        expected = (of_x * x + of_output * output)[:2]
        found = denoiser(x[:2] / signal, torch.full((2,), noise / signal))
        assert far(found, expected) <= CLOSE


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


def test_callbacks_change_latents():
    case, seen = CASES["SD"], []

    def copied(pipe, i, t, given):
        seen.append(float(t))
        return {"latents": given["latents"].clone()}

    def changed(pipe, i, t, given):
        return {"latents": given["latents"] * (1.5 if i == 1 else 1.0)}

    plain = case.call(pipeline("SD"), [0])
    same, other = (
        case.call(pipeline("SD"), [0], callback_on_step_end=each) for each in (copied, changed)
    )
    assert torch.equal(same, plain)
    assert bool(other.isfinite().all())
    assert far(other, plain) > CLOSE
    assert len(seen) == 4


SETTINGS = solvers.SamplerSettings(
    log_snr=(-2.2, -0.9, 0.4, 2.3), stochasticity=(0.3, 1.2, 0.9), process=repr(CLD()), order=3
)


@pytest.mark.parametrize(
    "name", ["DDPM", "SD-img2img", pytest.param("SD", marks=pytest.mark.slow), "SD3"]
)
def test_fitted_settings_are_the_steps(name):
    case, settings = CASES[name], SETTINGS
    case = dataclasses.replace(case, arguments=case.arguments | {"num_inference_steps": 4})
    if name == "SD3":  # one step more, from noise alone
        settings = dataclasses.replace(SETTINGS, log_snr=(-2.2, 0.4, 2.3), stochasticity=(0.3, 1.2))
    pipe = pipeline(name, settings=settings)
    assert bool(case.call(pipe, [0, 1]).isfinite().all())
    kappa = pipe.scheduler.sde.log_snr(pipe.scheduler.steps.times)
    levels = torch.tensor(settings.log_snr, dtype=torch.float64)
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
    scheduler = Scheduler(pipe.scheduler, sde, settings=settings)
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
        ({"settings": {}}, r"settings must have the fields log_snr, .*; got \[\]"),
        ({"settings": 3}, "settings must be a SamplerSettings, or a file of them; got int"),
    ],
)
def test_options_that_contradict_settings_are_rejected(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipeline("SD", **{"settings": SETTINGS} | options)


def test_settings_for_other_steps_or_levels_are_rejected():
    scheduler = pipeline("SD", settings=SETTINGS).scheduler
    with pytest.raises(
        ValueError, match=r"num_inference_steps must be 4, the number of levels .*; got 5"
    ):
        scheduler.set_timesteps(5)
    flow = pipeline("SD3", settings=SETTINGS).scheduler
    with pytest.raises(ValueError, match=r"must be 5, .* in the settings and 1; got 4"):
        flow.set_timesteps(4)
    noisy = dataclasses.replace(SETTINGS, log_snr=(-4.5, -0.9, 0.4, 2.3))
    with pytest.raises(ValueError, match=r"levels that the network knows, from -2\.\d+ to"):
        pipeline("SD", settings=noisy).scheduler.set_timesteps(4)
    late = dataclasses.replace(SETTINGS, log_snr=(-0.5, -0.1, 0.4, 2.3))
    with pytest.raises(ValueError, match=r"must start at -2 or less, because latents"):
        pipeline("SD", settings=late).scheduler.set_timesteps(4)


def test_processes_and_schedulers_that_cannot_sample_are_rejected():
    with pytest.raises(ValueError, match=r"down to σ = 0\.03\d+; VESDE.* has none below σ = 1\."):
        pipeline("SD", VESDE(1.0, 50.0))
    with pytest.raises(ValueError, match="DDIMInverseScheduler adds noise"):
        Scheduler(diffusers.DDIMInverseScheduler())
