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
    root = tmp_path_factory.mktemp("models")
    for name, options in (("ddpm", {}), ("sample", {"prediction_type": "sample"})):
        scheduler = DDPM(clip_sample=False, **options)
        diffusers.DDPMPipeline(unet(), scheduler).save_pretrained(root / name)
    # No pipeline takes a UNet2DModel and this scheduler.
    for part in (unet(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)):
        part.save_pretrained(root / "flow")
    return {name: root / name for name in ("ddpm", "sample", "flow")}


@torch.no_grad()
def theirs(scheduler, x):
    """The image that a scheduler with its time steps makes of noise."""
    network = unet()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
    return x


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


EPS = 1e-12  # a few operations in double precision
COMPILED = 1e-6  # single precision
TABLES = 1e-4  # the tables of the schedulers are in single precision


@pytest.mark.parametrize(
    ("name", "scheduler", "options", "method"),
    [
        ("ddpm", "DDIMScheduler", {"clip_sample": False}, {"order": 1}),
        ("sample", "DPMSolverMultistepScheduler", {"lower_order_final": False}, {"order": 2}),
    ],
)
def test_images_are_those_of_the_schedulers(folders, name, scheduler, options, method):
    config = json.loads((folders[name] / "scheduler/scheduler_config.json").read_text())
    made = getattr(diffusers, scheduler).from_config(config, **options)
    made.set_timesteps(6)
    sde = VPSDE(beta_max=25.0)  # reaches the levels of every table
    levels = 0.5 * made.alphas_cumprod.double()[made.timesteps].logit()
    times = solvers.times_of_log_snr(sde, levels)
    solver = MULTISTEP(**method, variable="log_snr", weights="published")
    denoiser = pretrained.from_diffusers(folders[name]).double()
    process = ReverseProcess(sde, DenoiserScore(denoiser, sde))
    # The noise is of variance 1, as the states of VP are.
    found = solvers.solve(process, solver, NOISE.unsqueeze(1), times, denoise=True)
    assert relative(found.data, theirs(made, NOISE)) <= TABLES


def test_images_are_those_of_euler_for_flows_from_pure_noise(folders):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    process, times = RectifiedFlow(), scheduler.sigmas[:-1].double()
    assert times[0] == 1
    score = DenoiserScore(pretrained.from_diffusers(folders["flow"]).double(), process)
    reverse = ReverseProcess(process, score)
    found = solvers.solve(reverse, MULTISTEP(order=1), NOISE.unsqueeze(1), times, denoise=True)
    assert relative(found.data, theirs(scheduler, NOISE)) <= TABLES


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


def test_one_dimension_is_no_shape_of_images():
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


FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def test_conditions_without_rows_and_with_one_row_are_those_of_each_sample():
    """Positions of Flux have no axis of samples; one text stands for all."""
    torch.manual_seed(0)
    shape = {"attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4}
    shape |= {"num_layers": 1, "num_single_layers": 0, "axes_dims_rope": (2, 2, 4)}
    shape |= {"joint_attention_dim": 8, "pooled_projection_dim": 8}
    network = diffusers.FluxTransformer2DModel(**shape).eval()
    denoiser = pretrained.from_diffusers(network, FLOW).requires_grad_(False)
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


class Lumina2Transformer2DModel(Unknown):
    """By its name, a network of the negative flow."""


@pytest.mark.parametrize(
    ("name", "options", "time"),
    [
        ("Unknown", {"clock": lambda t: 3 * t}, 1.5),
        ("SD3Transformer2DModel", {}, 500.0),
        ("AuraFlowTransformer2DModel", {}, 0.5),
    ],
)
def test_the_clock_is_given_or_that_of_the_network(name, options, time):
    network = type(name, (Unknown,), {})().double()
    found = pretrained.from_diffusers(network, FLOW, **options)(U, 1.0)
    # x_0 = x − σ v with x = u/2 and σ = 1/2 at σ/α = 1, and the network's v = time · x.
    assert torch.allclose(found, U / 2 * (1 - time / 2), rtol=EPS, atol=0)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (Unknown(), {}, "clock must be given for Unknown, because the form"),
        (Lumina2Transformer2DModel(), {"clock": "time"}, "predicts the negative flow"),
        (unet(in_channels=9, out_channels=4), {}, "takes 9 channels and predicts 4: it takes a ma"),
        (unet(), {"clock": "time", "nearest": True}, "nearest must be False if clock is given"),
    ],
)
def test_networks_and_clocks_that_do_not_fit_are_rejected(network, options, message):
    with pytest.raises(ValueError, match=message):
        pretrained.from_diffusers(network, DDPM(), **options)


def test_flow_schedulers_without_ends_of_their_levels_are_read():
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    denoiser = pretrained.from_diffusers(unet(), diffusers.UniPCMultistepScheduler(**options))
    assert denoiser.predicts == "flow"
    assert denoiser.path.interval == pytest.approx((1e-3, 1.0), rel=EPS, abs=0)


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


def test_the_scheduler_of_a_pipeline_may_be_replaced(folders, tmp_path):
    pipeline = diffusers.DDPMPipeline.from_pretrained(folders["sample"])
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
        (diffusers.DDIMInverseScheduler(), ValueError, "DDIMInverseScheduler adds noise"),
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
