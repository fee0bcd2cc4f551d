"""The scheduler for pipelines, called as pipelines call it, with a network that costs nothing."""

import math

import pytest
import torch

from cldsde import CLD, VPSDE, DenoiserScore, ReverseProcess, Schedule, pretrained, solvers
from cldsde.pretrained.stepping import GeneratorNoise
from cldsde.solvers.recommended import recommended_plan
from probes import generator
from simulated_device import needs_simulation, simulated_device
from tolerances import rounding

diffusers = pytest.importorskip("diffusers")

MULTISTEP = solvers.ExponentialMultistep
FIRST = MULTISTEP(order=1)
SECOND = MULTISTEP(order=2, variable="kappa", weights="published")
SHAPE = (3, 2, 4, 4)
# A few steps in single precision, with tables of schedulers in single precision.
CLOSE = 1e-5
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {**TABLE, "prediction_type": "v_prediction"}
TRAILING = {"timestep_spacing": "trailing"}
DDIM, DDPM = diffusers.DDIMScheduler, diffusers.DDPMScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
PLAIN = DDIM(**TABLE, clip_sample=False)


def made(scheduler=PLAIN, *args, **options):
    return pretrained.PipelineScheduler(scheduler, *args, **options)


def latents(seed=0):
    return torch.randn(SHAPE, generator=generator(seed))


def network(x, t):
    """A smooth function of latents and time."""
    return torch.tanh(x + x.flip(-1) / 3) * (0.5 + torch.as_tensor(t) / 2000)


@torch.no_grad()
def run(scheduler, n=8, change=None, seed=0, **options):
    """Latents that a pipeline would make; ``options`` are those of ``step``."""
    scheduler.set_timesteps(n)
    x = latents(seed) * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, t), t, x, **options).prev_sample
        x = x if change is None else change(i, x)
    return x


def far(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def multistep(**options):
    return diffusers.DPMSolverMultistepScheduler(**{"lower_order_final": False, **options})


DDIMS = {
    "to one": {},
    "to index 0": {"set_alpha_to_one": False, "steps_offset": 1},
    "no length at index 0": {"set_alpha_to_one": False},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.5},
    "thresholded": {**V, "thresholding": True, "sample_max_value": 1.5},
    # Its last entry, 2e-9, is no level without signal.
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", **TRAILING},
    "v": V,
    "no signal": {**V, "rescale_betas_zero_snr": True, **TRAILING},
}
EULERS = [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "leading", "steps_offset": 1}]
OF_FLOWS = {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"}
UNCLIPPED = diffusers.DPMSolverMultistepScheduler.from_config(
    DDIM(**TABLE, clip_sample=True).config, lower_order_final=False
)
REPLACED = {
    **{
        f"DDIM, {name}": (DDIM(**{**TABLE, "clip_sample": False, **options}), FIRST)
        for name, options in DDIMS.items()
    },
    # It has the option to clip, and does not read it.
    "CogVideoX": (diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"), FIRST),
    **{f"Euler{x}": (diffusers.EulerDiscreteScheduler(**TABLE, **x), FIRST) for x in EULERS},
    "DPM-Solver++": (multistep(**TABLE), SECOND),
    "DPM-Solver++, to its least level": (multistep(**TABLE, final_sigmas_type="sigma_min"), SECOND),
    "DPM-Solver++, thresholded": (multistep(**TABLE, thresholding=True), SECOND),
    # The configuration keeps DDIM's key, which the class does not know.
    "DPM-Solver++, not clipped": (UNCLIPPED, SECOND),
    "flow": (FLOW(shift=3.0), FIRST),
    "flow, DPM-Solver++": (multistep(**OF_FLOWS, solver_order=1), FIRST),
}


@pytest.mark.parametrize("name", REPLACED)
def test_on_its_levels_a_scheduler_of_the_same_method_gives_the_same_latents(name):
    scheduler, solver = REPLACED[name]
    assert far(run(made(scheduler, "VPSDE", solver, grid="scheduler")), run(scheduler)) <= CLOSE


def test_repeated_levels_are_left_out():
    found = made(diffusers.PNDMScheduler(**TABLE, skip_prk_steps=True), grid="scheduler")
    found.set_timesteps(10)
    assert len(found.timesteps) == 10
    assert bool(run(found, 10).isfinite().all())


@pytest.mark.covering
@pytest.mark.parametrize("process", ["CLD", "VPSDE", "HOLD", "RectifiedFlow"])
@pytest.mark.parametrize("scheduler", [DDIM(), FLOW()])
@pytest.mark.parametrize("n", [4, 1, 2, 24, 25])
def test_n_steps_are_n_evaluations(process, scheduler, n):
    found = made(scheduler, process)
    found.set_timesteps(n)
    assert len(found.timesteps) == found.num_inference_steps == n
    noisy = process == "CLD" and n > 24  # the variance of the path's noise is 0.99 at the start
    assert (float(found.timesteps[0]) == 1000) == (isinstance(scheduler, FLOW) and not noisy)
    assert bool((found.timesteps.diff() < 0).all())
    assert bool(run(found, n).isfinite().all())


@pytest.mark.parametrize("sde", [CLD(), VPSDE()])
@pytest.mark.parametrize("n", [2, 5, 7, 10])
def test_levels_and_solver_are_those_of_sample(sde, n):
    found, reverse = made(DDIM(), sde), ReverseProcess(sde, DenoiserScore(network, sde))
    expected, _ = recommended_plan(reverse, nfe=n, shape=(4, 128, 128))
    found.set_timesteps(n)
    one, two = found.steps.solver, expected.solver
    assert (one.order, one.corrector, one.variable) == (two.order, two.corrector, two.variable)
    assert {one.stochasticity} == set(expected.settings.stochasticity)
    differences = found._levels[:-1] - sde.kappa(expected.times)
    assert float(differences.abs().max()) <= rounding(2**10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("process", "scheduler"), [("VPSDE", FLOW()), ("CLD", DDIM(clip_sample=False))]
)
def test_the_brightness_of_large_images_is_kept(process, scheduler):
    """Normal images of 64 × 64 with a brightness of standard deviation 0.5, exactly denoised."""
    count, size, n = 200, 64, 20
    found = made(scheduler, process)
    found.set_timesteps(n)
    signal, noise = found._convention.scales(found._levels)
    x = torch.randn(count, 1, size, size, generator=generator(0))
    pixel, whole = 0.25, 0.25 + size**2 * 0.25  # variances of a pixel, of the sum over its root
    for i, t in enumerate(found.timesteps):
        a, s = float(signal[i]), float(noise[i])
        mean = x.mean((1, 2, 3), keepdim=True)
        gains = (a * v / (a * a * v + s * s) for v in (pixel, whole))
        data = next(gains) * (x - mean) + next(gains) * mean
        kept = 1.0 if isinstance(scheduler, FLOW) else a  # the flow, or the noise
        x = found.step((x - kept * data) / s, t, x).prev_sample
    # Three standard errors of a standard deviation, and 3 %, the error of 20 steps.
    assert abs(float(x.mean((1, 2, 3)).std()) / 0.5 - 1) <= 3 / math.sqrt(2 * count) + 0.03


def test_data_predictions_are_clipped_as_by_ddpm():
    """DDPM's latents have noise; its data prediction has not."""
    theirs, x, data = DDPM(clip_sample=True, clip_sample_range=0.5), latents(), []
    for scheduler in (theirs, made(theirs, "CLD", grid="scheduler")):
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[1]
        data.append(scheduler.step(network(x, t), t, x).pred_original_sample)
    assert far(data[1], data[0]) <= CLOSE


SOURCES = {
    "latents": lambda seed: {},
    "one": lambda seed: {"generator": generator(seed)},
    "several": lambda seed: {"generator": [generator(seed + i) for i in range(3)]},
}


@pytest.mark.parametrize("given", SOURCES)
def test_noise_comes_from_the_generators_or_from_the_latents(given):
    found, source = made(PLAIN, "CLD"), SOURCES[given]
    first = run(found, **source(5))
    assert torch.equal(run(found, **source(5)), first)
    assert torch.equal(run(found, **source(50)), first) == (given == "latents")
    # Other latents have other noise: differences of the results are not those of the latents.
    assert not torch.equal(run(found, seed=1, **source(5)), first)


@pytest.mark.parametrize("solver", [None, MULTISTEP(order=3)])
def test_latents_that_are_only_copied_change_nothing(solver):
    scheduler = made(PLAIN, "CLD", solver)
    plain = run(scheduler)
    assert torch.equal(run(scheduler, change=lambda i, x: x.clone()), plain)


def test_pipelines_repeat_a_step_and_start_again_by_the_index_of_the_step():
    found, x = made(PLAIN, "VPSDE", FIRST), latents()
    found.set_timesteps(8)
    first, second = found.timesteps[:2]
    start = found.step(network(x, first), first, x).prev_sample
    once = found.step(network(start, second), second, start).prev_sample
    found._step_index -= 1
    assert found.step_index == 1
    again = found.step(network(start, second), second, start).prev_sample
    assert far(again, once) <= CLOSE
    found._step_index = None
    assert found.step_index is None
    assert far(found.step(network(x, first), first, x).prev_sample, start) <= CLOSE


@pytest.mark.parametrize("scheduler", [DDIM(**TABLE), FLOW(shift=2.0)])
def test_noise_is_added_at_the_levels_of_the_scheduler(scheduler):
    scheduler.set_timesteps(5)
    given, times, noise = latents(), scheduler.timesteps[[1, 2, 4]], latents(1)
    name = "scale_noise" if isinstance(scheduler, FLOW) else "add_noise"
    order = (given, times, noise) if isinstance(scheduler, FLOW) else (given, noise, times)
    expected, found = (getattr(each, name)(*order) for each in (scheduler, made(scheduler)))
    assert far(found, expected) <= CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_keep_their_precision(dtype):
    def made_in(dtype):
        found, noise, x = made(PLAIN, "CLD"), generator(3), latents().to(torch.bfloat16).to(dtype)
        found.set_timesteps(4)
        for t in found.timesteps:
            x = found.step(network(x, t).to(dtype), t, x, generator=noise).prev_sample
            assert x.dtype == dtype
        return x.float()

    # Each of four evaluations sees latents that are rounded, and is rounded; by half an eps each.
    # Data predictions multiply the errors by up to σ/α = 15 at first, which later steps forget.
    assert far(made_in(dtype), made_in(torch.float32)) <= 4 * torch.finfo(dtype).eps


def test_a_learnt_variance_is_left_out():
    scheduler = DDPM(variance_type="learned_range", clip_sample=False)
    found, plain = made(scheduler), made(DDPM(clip_sample=False))
    for each in (found, plain):
        each.set_timesteps(3)
    x, t = latents(), plain.timesteps[0]
    both = torch.cat([network(x, t), latents(3)], dim=1)
    expected = plain.step(network(x, t), t, x, return_dict=False)
    assert all(map(torch.equal, found.step(both, t, x, return_dict=False), expected))


@pytest.mark.parametrize(
    "scheduler",
    [
        made(FLOW(shift=3.0), "HOLD", MULTISTEP(order=2, stochasticity=0.5), start=0.7, end=0.05),
        made(PLAIN, CLD(beta=(1.0, 8.0), position_noise=0.1), solvers.EulerMaruyama()),
        made(multistep(**TABLE), "RectifiedFlow", grid="scheduler"),
    ],
)
def test_a_scheduler_is_saved_and_loaded(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = pretrained.PipelineScheduler.from_pretrained(tmp_path)
    assert repr(loaded.sde) == repr(scheduler.sde)
    assert loaded.solver == scheduler.solver
    assert type(loaded.replaced) is type(scheduler.replaced)
    own = {name: x for name, x in scheduler.config.items() if not name.startswith("_")}
    assert {name: x for name, x in loaded.config.items() if not name.startswith("_")} == own
    assert torch.equal(run(loaded), run(scheduler))


def test_the_configuration_is_that_of_the_replaced_scheduler_and_more():
    found = made(PLAIN)
    kept = {name: x for name, x in PLAIN.config.items() if not name.startswith("_")}
    assert kept.items() <= dict(found.config).items()
    again = DDIM.from_config(found.config)
    assert again.config.beta_end == PLAIN.config.beta_end
    assert type(made(made(PLAIN, "HOLD")).replaced) is DDIM
    other = pretrained.PipelineScheduler.from_config(found.config, process="HOLD")
    assert type(other.sde).__name__ == "HOLD"
    with pytest.raises(ValueError, match=r"config must come from a PipelineScheduler; got the"):
        pretrained.PipelineScheduler.from_config(PLAIN.config)


class Other(DDIM):
    """A scheduler that diffusers does not have."""


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (made(PLAIN, VPSDE(schedule=Schedule.cosine())), "process cannot be saved: VPSDE"),
        (made(PLAIN, "CLD", MULTISTEP(stochasticity=torch.sqrt)), "solver cannot be saved: Exp"),
        (made(Other(**TABLE)), "scheduler cannot be saved: Other is no class of diffusers"),
    ],
)
def test_parts_without_a_name_cannot_be_saved(scheduler, message, tmp_path):
    assert bool(run(scheduler).isfinite().all())
    with pytest.raises(ValueError, match=message):
        scheduler.save_pretrained(tmp_path)


NO_SIGNAL = DDIM(**TABLE, rescale_betas_zero_snr=True, timestep_spacing="trailing")
BAD = [
    ((3,), {}, TypeError, "scheduler must be the pipeline's scheduler, .*; got int"),
    ((PLAIN, "CDL"), {}, ValueError, "process must be one of CLD, CosineVP, .*; got 'CDL'"),
    ((PLAIN, CLD), {}, TypeError, "process must be a LinearSDE, .*write it with parentheses"),
    ((PLAIN, {"name": "CLD", "options": {"b": 1}}), {}, ValueError, "process: CLD does not take"),
    ((PLAIN, "CLD", solvers.SSCS()), {}, ValueError, r"solver must evaluate .*; SSCS\(.* does not"),
    ((PLAIN,), {"grid": "scheduler", "end": 0.1}, ValueError, "end must be None with grid='sche"),
    ((PLAIN,), {"start": 1.5}, ValueError, r"start must be a time of CLD\(.*\) at which the .*1.5"),
    ((PLAIN,), {"end": 1e-5}, ValueError, r"end must be a time of CLD\(.*; got 1e-05"),
    ((PLAIN,), {"start": 0.1, "end": 0.2}, ValueError, "end must be below start, 0.1; got 0.2"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_arguments_that_do_not_fit_are_rejected(args, options, error, message):
    with pytest.raises(error, match=message):
        pretrained.PipelineScheduler(*args, **options)


KEPT = {"grid": "scheduler"}
UNEVEN = {"timesteps": [999, 500, 10]}
BAD_STEPS = [
    (PLAIN, {}, {}, TypeError, "num_inference_steps must be an integer; got None"),
    (PLAIN, {}, UNEVEN, ValueError, "timesteps must be evenly spaced unless grid is"),
    (FLOW(), {}, {"sigmas": [0.0, 0.5, 1.0]}, ValueError, "sigmas must decrease, from the noise"),
    (PLAIN, KEPT, UNEVEN, ValueError, "timesteps must be None for DDIMScheduler, which does not"),
    (FLOW(), KEPT, {"sigmas": [0.5, 0.9]}, ValueError, "its noise does not decrease"),
    (diffusers.HeunDiscreteScheduler(), KEPT, {"num_inference_steps": 4}, ValueError, "2 times"),
    (NO_SIGNAL, KEPT, {"num_inference_steps": 4}, ValueError, "cannot start at a level without"),
]


@pytest.mark.parametrize(("scheduler", "made_with", "given", "error", "message"), BAD_STEPS)
def test_steps_that_do_not_fit_are_rejected(scheduler, made_with, given, error, message):
    with pytest.raises(error, match=message):
        made(scheduler, **made_with).set_timesteps(**given)


def test_a_solver_that_does_not_apply_is_rejected_before_the_first_step():
    underdamped = CLD(friction=0.05)
    with pytest.raises(ValueError, match=r"does not determine x_0 at .* Underdamped and"):
        made(PLAIN, underdamped, MULTISTEP()).set_timesteps(40)
    assert bool(run(made(PLAIN, underdamped), 40).isfinite().all())  # another one is chosen


def test_calls_of_step_that_do_not_fit_are_rejected():
    found, x = made(PLAIN), latents()
    with pytest.raises(ValueError, match="set_timesteps must be called before step"):
        found.step(x, 999, x)
    found.set_timesteps(1)
    with pytest.raises(ValueError, match=r"timestep must be one of timesteps, \[.*\]; got 500"):
        found.step(x, 500, x)
    with pytest.raises(ValueError, match="model_output must have the shape of sample"):
        found.step(x[:1], found.timesteps[0], x)
    found.step(x, found.timesteps[0], x)
    with pytest.raises(ValueError, match="step must be called at most 1 times"):
        found.step(x, found.timesteps[0], x)


def test_arguments_of_other_schedulers_are_ignored_or_rejected():
    found, x = made(diffusers.UnCLIPScheduler(), grid="scheduler"), latents()
    found.set_timesteps(2)
    first, second = found.timesteps
    known = {"eta": 0.0, "use_clipped_model_output": True, "prev_timestep": second}
    assert bool(found.step(x, first, x, **known).prev_sample.isfinite().all())
    for name, value in {"eta": 1.0, "per_token_timesteps": x}.items():
        with pytest.raises(TypeError, match=f"does not take {name} in step; the pipeline needs"):
            found.step(x, second, x, **{name: value})
    with pytest.raises(ValueError, match=r"must be latents \(B, \*D\); got the shape \(\)"):
        found.scale_model_input(found.sigmas[0], second)


def test_given_times_of_pipelines_count_steps():
    found = made(FLOW(), "CLD")
    found.set_timesteps(sigmas=torch.linspace(1.0, 0.2, 5).tolist(), mu=0.7)
    assert len(found.timesteps) == 5


# Speed and devices


@needs_simulation
@pytest.mark.parametrize(("process", "n", "clip"), [("CLD", 12, True), ("VPSDE", 6, False)])
def test_nothing_is_read_back_after_the_first_step(process, n, clip):
    """Neither by order 2 whose latents change by clipping, nor by order 3."""
    with simulated_device() as device, torch.no_grad():
        found = made(DDIM(**TABLE, clip_sample=clip), process)
        found.set_timesteps(n, device="sim")
        x = latents().to("sim")
        reads = []
        for t in found.timesteps:
            before, output = device.traffic(), x * 0.5
            x = found.step(output, t, x).prev_sample
            reads.append((device.traffic() - before).read_backs)
        assert found.steps.solver.order == (3 if n == 6 else 2)
        assert reads[1:] == [0] * (n - 1)


def test_normals_of_a_pipeline_are_those_of_its_generators():
    found = GeneratorNoise([generator(i) for i in range(3)]).normal(torch.zeros(3, 1, 4, 4), 2)
    for i, normals in enumerate(found):
        assert torch.equal(normals, torch.randn(1, 2, 4, 4, generator=generator(i))[0])
