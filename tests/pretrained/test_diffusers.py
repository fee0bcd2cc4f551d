"""Networks of diffusers give the same images here, and sources that cannot be used are named."""

import json
import pickle

import pytest
import torch

from cldsde import (
    CLD,
    VPSDE,
    CosineVP,
    GuidedScore,
    LinearSDE,
    RectifiedFlow,
    ReverseProcess,
    pretrained,
    sample,
    solvers,
)
from cldsde.score import ConditionalScore, DenoiserScore
from probes import generator

diffusers = pytest.importorskip("diffusers")

DDPM, MULTISTEP, SHAPE = diffusers.DDPMScheduler, solvers.ExponentialMultistep, (1, 8, 8)
U, NOISE = (torch.randn(2, *SHAPE, generator=generator(i)).double() for i in (0, 1))


def unet(**options):
    """A network with random weights, in double precision."""
    torch.manual_seed(0)
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    shape |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shape |= {"layers_per_block": 1, "norm_num_groups": 4, **options}
    return diffusers.UNet2DModel(**shape).double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines as ``save_pretrained`` writes them."""
    v = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    schedulers = {
        "ddpm": DDPM(clip_sample=False),
        "v": diffusers.DDIMScheduler(clip_sample=False, **v),
        "sample": DDPM(prediction_type="sample", clip_sample=False),
    }
    root = tmp_path_factory.mktemp("models")
    for name, scheduler in schedulers.items():
        diffusers.DDPMPipeline(unet(), scheduler).save_pretrained(root / name)
    # No pipeline takes a UNet2DModel and this scheduler.
    for part in (unet(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)):
        part.save_pretrained(root / "flow")
    return {name: root / name for name in (*schedulers, "flow")}


@torch.no_grad()
def theirs(scheduler, x):
    """The image that a scheduler with its time steps makes of noise."""
    network = unet()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
    return x


def ours(folder, solver, levels, x):
    """The image that a solver makes of the same noise under VP, at the same levels."""
    sde = VPSDE(beta_max=25.0)  # reaches the levels of every table
    times = solvers.times_of_log_snr(sde, levels)
    process = ReverseProcess(sde, DenoiserScore(pretrained.from_diffusers(folder).double(), sde))
    # x is in units of variance 1, as the states of VP are.
    return solvers.solve(process, solver, x.unsqueeze(1), times, denoise=True).data


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


FLOW_PATH = (lambda t: 1 - t), (lambda t: t)
EPS = 1e-12  # a few operations in double precision
COMPILED = 1e-6  # single precision
TABLES = 1e-4  # the tables of the schedulers are in single precision


SECOND = MULTISTEP(order=2, variable="log_snr", weights="published")


@pytest.mark.parametrize(
    ("name", "scheduler", "options", "solver"),
    [
        ("ddpm", "DDIMScheduler", {"clip_sample": False}, MULTISTEP(order=1)),
        ("v", "DDIMScheduler", {"clip_sample": False}, MULTISTEP(order=1)),
        ("sample", "DPMSolverMultistepScheduler", {"lower_order_final": False}, SECOND),
    ],
)
def test_images_are_those_of_the_schedulers(folders, name, scheduler, options, solver):
    config = json.loads((folders[name] / "scheduler/scheduler_config.json").read_text())
    made = getattr(diffusers, scheduler).from_config(config, **options)
    made.set_timesteps(6)
    levels = 0.5 * made.alphas_cumprod.double()[made.timesteps].logit()
    assert relative(ours(folders[name], solver, levels, NOISE), theirs(made, NOISE)) <= TABLES


def test_images_are_those_of_euler_for_flows(folders):
    """From σ = 0.98, as VP has no level of pure noise."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(0.94, 0.05, 6).tolist())
    sigmas = scheduler.sigmas.double()
    levels, x = ((1 - sigmas[:-1]) / sigmas[:-1]).log(), NOISE * sigmas[0]
    # The state of the linear path in the units of VP, α² + σ² = 1.
    units = ((1 - sigmas[0]) ** 2 + sigmas[0] ** 2).sqrt()
    found = ours(folders["flow"], MULTISTEP(order=1), levels, x / units)
    assert relative(found, theirs(scheduler, x)) <= TABLES


@pytest.mark.parametrize("process", [RectifiedFlow(), LinearSDE.from_signal_noise(*FLOW_PATH)])
def test_images_are_those_of_euler_for_flows_from_pure_noise(folders, process):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    score = DenoiserScore(pretrained.from_diffusers(folders["flow"]).double(), process)
    reverse = ReverseProcess(process, score)
    times = scheduler.sigmas[:-1].double()
    assert times[0] == 1
    state = NOISE.unsqueeze(1)
    found = solvers.solve(reverse, MULTISTEP(order=1), state, times, denoise=True).data
    assert relative(found, theirs(scheduler, NOISE)) <= TABLES


def test_a_pipeline_a_model_a_folder_and_a_pickle_are_one(folders):
    pipeline = diffusers.DDPMPipeline.from_pretrained(folders["ddpm"])
    sources = [
        (pipeline,),
        (pipeline.unet, pipeline.scheduler),
        (pipeline.unet, folders["ddpm"] / "scheduler" / "scheduler_config.json"),
        (str(folders["ddpm"]),),
    ]
    found = [pretrained.from_diffusers(*source) for source in sources]
    found.append(pickle.loads(pickle.dumps(found[0])))
    results = [denoiser(U.float(), 1.5) for denoiser in found]
    assert all(torch.equal(result, results[0]) for result in results)


def test_classes_reach_the_network():
    denoiser = pretrained.from_diffusers(unet(num_class_embeds=4), DDPM())
    both, one = (denoiser(U, 1.0, class_labels=torch.tensor(x)) for x in ([3, 1], [3, 3]))
    assert torch.equal(both[:1], one[:1])
    assert not torch.equal(both[1:], one[1:])


def test_a_learnt_variance_is_left_out_and_one_dimension_is_no_shape_of_images():
    scheduler = DDPM(variance_type="learned_range")
    assert pretrained.from_diffusers(unet(out_channels=2), scheduler)(U, 1.0).shape == U.shape
    network = diffusers.UNet1DModel(sample_size=16, block_out_channels=(8, 8, 16))
    assert pretrained.from_diffusers(network, DDPM()).shape is None


def test_the_nearest_level_is_passed_as_a_whole_number(folders):
    found, passed = pretrained.from_diffusers(folders["ddpm"], nearest=True), []
    note = lambda module, args, kwargs: passed.append(kwargs["timestep"])  # noqa: E731
    found.network.model.register_forward_pre_hook(note, with_kwargs=True)
    found(torch.zeros(1, *SHAPE), 1.0)
    assert passed[0].dtype == torch.int64


def test_a_name_is_fetched_on_request_only(folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"somebody/model is no folder; .*download=True"):
        pretrained.from_diffusers("somebody/model")
    fetched = lambda name, allow_patterns: folders["ddpm"]  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert pretrained.from_diffusers("somebody/model", download=True).shape == SHAPE


def test_a_model_of_the_caller_is_left_as_it_is():
    network = unet().train()
    pretrained.from_diffusers(network, DDPM())
    assert network.training
    assert all(x.requires_grad for x in network.parameters())


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize(("predicts", "last"), [("v_prediction", 999.0), ("epsilon", 998.0)])
def test_an_entry_without_signal_is_left_out_if_the_network_predicts_noise(kind, predicts, last):
    options = {"rescale_betas_zero_snr": True, "prediction_type": predicts}
    scheduler = getattr(diffusers, kind)(**options)
    assert pretrained.from_diffusers(unet(), scheduler).path.interval == (0.0, last)


@pytest.mark.parametrize("process", [RectifiedFlow(), CosineVP()])
def test_images_are_those_of_ddim_from_pure_noise(process):
    """A table whose last entry has no signal, and processes that begin without signal."""
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, clip_sample=False, **options)
    scheduler.set_timesteps(5)
    levels = 0.5 * scheduler.alphas_cumprod.double()[scheduler.timesteps].logit()
    assert levels[0] == -torch.inf
    times = torch.cat([torch.ones(1), solvers.times_of_log_snr(process, levels[1:])])
    denoiser = pretrained.from_diffusers(unet().eval(), scheduler).double()
    reverse = ReverseProcess(process, DenoiserScore(denoiser, process))
    found = solvers.solve(reverse, MULTISTEP(order=1), NOISE.unsqueeze(1), times, denoise=True)
    assert relative(found.data, theirs(scheduler, NOISE)) <= TABLES
    whole = sample(process, reverse.score, (1, *SHAPE), nfe=4, times=solvers.root_times(1, 0.01, 4))
    assert bool(whole.isfinite().all())


def transformer(kind="FluxTransformer2DModel"):
    """The smallest transformer of a family, of which only the configuration matters."""
    head, layer = {"attention_head_dim": 8}, {"num_layers": 1}
    flux = {"axes_dims_rope": (2, 2, 4), "num_single_layers": 0, "in_channels": 4}
    flux |= {"joint_attention_dim": 8, "pooled_projection_dim": 8}
    lumina = {"hidden_size": 16, "axes_dim_rope": (2, 2, 4), "num_refiner_layers": 1}
    shapes = {
        "SD3Transformer2DModel": head | layer,
        "FluxTransformer2DModel": head | layer | flux,
        "AuraFlowTransformer2DModel": head | {"num_mmdit_layers": 1, "num_single_dit_layers": 0},
        "Lumina2Transformer2DModel": layer | lumina | {"num_kv_heads": 1, "cap_feat_dim": 8},
    }
    return getattr(diffusers, kind)(num_attention_heads=2, **shapes[kind])


FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(
    ("kind", "time"),
    [
        ("SD3Transformer2DModel", 700.0),
        ("FluxTransformer2DModel", 0.7),
        ("AuraFlowTransformer2DModel", 0.7),
    ],
)
def test_the_clock_is_that_of_the_network(kind, time):
    denoiser = pretrained.from_diffusers(transformer(kind), FLOW)
    at = torch.tensor([0.7], dtype=torch.float64)
    found = at if denoiser.clock == "time" else denoiser.clock(at)
    assert float(found) == pytest.approx(time, rel=EPS, abs=0)


def test_conditions_without_rows_and_with_one_row_are_those_of_each_sample():
    """Positions of Flux have no axis of samples; one text stands for all."""
    torch.manual_seed(0)
    denoiser = pretrained.from_diffusers(transformer().eval(), FLOW).requires_grad_(False)
    text, pooled = (torch.randn(1, *shape, generator=generator(2)) for shape in ((5, 8), (8,)))
    ids = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.arange(27.0).reshape(9, 3)}
    sde = CLD()
    one = DenoiserScore(denoiser, sde)

    def guided(rows):
        given = {"encoder_hidden_states": text.expand(rows, -1, -1), **ids}
        given["pooled_projections"] = pooled.expand(rows, -1)
        free = {**given, "encoder_hidden_states": 0 * given["encoder_hidden_states"]}
        return GuidedScore(ConditionalScore(one, **given), ConditionalScore(one, **free), 3.0)

    found = sample(sde, guided(1), (3, 9, 4), nfe=6, batch=2)
    assert relative(found, sample(sde, guided(3), (3, 9, 4), nfe=6)) <= COMPILED


class Unknown(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A network that diffusers does not have."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, in_channels=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, timestep, return_dict=True):
        return (self.weight * x * timestep.reshape(-1, 1, 1, 1),)


def test_an_unknown_network_needs_a_clock():
    with pytest.raises(ValueError, match=r"clock must be given for Unknown, because the form"):
        pretrained.from_diffusers(Unknown(), FLOW)
    found = pretrained.from_diffusers(Unknown().double(), FLOW, clock=lambda t: 3 * t)
    # x_0 = x − σ u with x = u/2 at σ/α = 1, and the network's u = 1.5 x.
    assert torch.allclose(found(U, 1.0), U / 2 * 0.25, rtol=EPS, atol=0)
    with pytest.raises(ValueError, match="nearest must be False if clock is given"):
        pretrained.from_diffusers(unet(), DDPM(), clock="time", nearest=True)


def test_a_network_of_the_negative_flow_is_rejected():
    network = transformer("Lumina2Transformer2DModel")
    with pytest.raises(ValueError, match="Lumina2Transformer2DModel predicts the negative flow"):
        pretrained.from_diffusers(network, FLOW, clock="time")


def test_flow_schedulers_without_ends_of_their_levels_are_read():
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    denoiser = pretrained.from_diffusers(unet(), diffusers.UniPCMultistepScheduler(**options))
    assert denoiser.predicts == "flow"
    assert denoiser.path.interval == pytest.approx((1e-3, 1.0), rel=EPS, abs=0)


@pytest.mark.parametrize(
    ("kind", "classes"),
    [("PixArtTransformer2DModel", (None, None)), ("DiTTransformer2DModel", (1000, 1000))],
)
def test_only_networks_of_classes_have_classes(kind, classes):
    shape = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    shape |= {"norm_num_groups": 4, "sample_size": 8, "out_channels": 8}
    if kind.startswith("PixArt"):
        shape |= {"cross_attention_dim": 16, "use_additional_conditions": False}
    denoiser = pretrained.from_diffusers(getattr(diffusers, kind)(**shape), DDPM())
    assert (denoiser.classes, denoiser.null_class) == classes


@torch.no_grad()
def test_a_compiled_network_is_one_of_the_pipeline(folders):
    pipeline = diffusers.DDPMPipeline.from_pretrained(folders["ddpm"])
    expected = pretrained.from_diffusers(pipeline)(U.float(), 1.5)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    for source in ((pipeline,), (pipeline.unet, pipeline.scheduler)):
        found = pretrained.from_diffusers(*source)
        assert found.shape == SHAPE
        with torch.compiler.set_stance("force_eager"):  # to trace the network takes seconds
            assert relative(found(U.float(), 1.5), expected) <= COMPILED


def test_an_inpainting_network_is_rejected():
    with pytest.raises(ValueError, match="takes 9 channels and predicts 4: it takes a mask"):
        pretrained.from_diffusers(unet(in_channels=9, out_channels=4), DDPM())


def test_the_scheduler_of_a_pipeline_may_be_replaced(folders, tmp_path):
    pipeline = diffusers.DDPMPipeline.from_pretrained(folders["v"])
    expected = pretrained.from_diffusers(pipeline)(U.float(), 1.5)
    pipeline.scheduler = pretrained.PipelineScheduler(pipeline.scheduler)
    pipeline.save_pretrained(tmp_path)
    for source in (pipeline, tmp_path):
        assert torch.equal(pretrained.from_diffusers(source)(U.float(), 1.5), expected)


INVERTED = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)


@pytest.mark.parametrize(
    ("scheduler", "error", "message"),
    [
        (None, ValueError, "scheduler must be given"),
        (3, TypeError, "scheduler must be a scheduler of diffusers.*int"),
        ("missing.json", FileNotFoundError, "there is no file missing.json"),
        (diffusers.EDMEulerScheduler(), ValueError, "levels and prediction of EDMEulerScheduler"),
        (INVERTED, ValueError, "invert_sigmas has noise at time 0"),
    ],
)
def test_schedulers_that_do_not_fit_are_rejected(scheduler, error, message):
    with pytest.raises(error, match=message):
        pretrained.from_diffusers(unet(), scheduler)


def test_sources_that_are_no_models_are_rejected(folders, tmp_path):
    def assert_rejected(message, source=tmp_path, *scheduler, error=ValueError):
        with pytest.raises(error, match=message):
            pretrained.from_diffusers(source, *scheduler)

    assert_rejected(r"config.json is missing", error=FileNotFoundError)
    assert_rejected(r"source must be a folder, a pip", torch.nn.Linear(1, 1), error=TypeError)
    (vae := diffusers.AutoencoderKL(block_out_channels=(32,))).save_pretrained(tmp_path / "vae")
    assert_rejected("AutoencoderKL is no network of noisy data", vae)
    assert_rejected(r"AutoencoderKL .* is no network of noisy data", tmp_path / "vae", DDPM())
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    config = (folders["ddpm"] / "unet" / "config.json").read_text()
    (pickled / "config.json").write_text(config)
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert_rejected(r"must be safetensors; it holds .*\.bin, and a pickle", pickled, DDPM())
