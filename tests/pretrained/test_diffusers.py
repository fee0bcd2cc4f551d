"""Networks of diffusers give the same images here, and sources that cannot be used are named."""

import pickle
import shutil

import pytest
import torch

from cldsde import CLD, VPSDE, CosineVP, RectifiedFlow, ReverseProcess, pretrained, sample, solvers
from cldsde.score import ConditionalScore, DenoiserScore
from probes import generator

diffusers = pytest.importorskip("diffusers")

DDPM, DDIM = diffusers.DDPMScheduler, diffusers.DDIMScheduler
MULTISTEP, SHAPE = solvers.ExponentialMultistep, (1, 8, 8)
U, NOISE = (torch.randn(2, *SHAPE, generator=generator(i)).double() for i in (0, 1))


def unet(**options):
    """A network with random weights, in double precision."""
    torch.manual_seed(0)
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    shape |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shape |= {"layers_per_block": 1, "norm_num_groups": 4, **options}
    return diffusers.UNet2DModel(**shape).double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("models") / "ddpm"
    scheduler = DDPM(prediction_type="sample", clip_sample=False)
    diffusers.DDPMPipeline(unet(), scheduler).save_pretrained(folder)
    return folder


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


EPS = 1e-12  # a few operations in double precision
COMPILED = 1e-6  # single precision
TABLES = 1e-4  # the tables of the schedulers are in single precision


FIRST = MULTISTEP(order=1)
SECOND = MULTISTEP(order=2, variable="kappa", weights="published")
DPM = diffusers.DPMSolverMultistepScheduler(prediction_type="sample", lower_order_final=False)
# The last entry of its table has no signal.
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
NO_SIGNAL = DDIM(**V, rescale_betas_zero_snr=True, clip_sample=False)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheduler", "process", "solver"),
    [
        (DDIM(clip_sample=False), VPSDE(beta_max=25.0), FIRST),  # reaches the levels of all tables
        (DPM, VPSDE(beta_max=25.0), SECOND),
        (NO_SIGNAL, RectifiedFlow(), FIRST),
        (NO_SIGNAL, CosineVP(), FIRST),
        (FLOW, RectifiedFlow(), FIRST),
    ],
)
def test_images_are_those_of_the_scheduler(scheduler, process, solver):
    scheduler.set_timesteps(5)
    if scheduler is FLOW:
        times = scheduler.sigmas[:-1].double()
    else:
        levels = 0.5 * scheduler.alphas_cumprod.double()[scheduler.timesteps].logit()
        times = solvers.times_of_kappa(process, levels)
    network, x = unet().eval(), NOISE
    score = DenoiserScore(pretrained.from_diffusers(network, scheduler), process)
    reverse, state = ReverseProcess(process, score), NOISE.unsqueeze(1)  # both of variance 1
    found = solvers.solve(reverse, solver, state, times, denoise=True)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
    assert relative(found.data, x) <= TABLES


def test_a_pipeline_with_any_scheduler_a_model_a_folder_and_a_pickle_are_one(folder, tmp_path):
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    scheduler = pretrained.PipelineScheduler(pipeline.scheduler)
    replaced = diffusers.DDPMPipeline(pipeline.unet, scheduler)
    replaced.save_pretrained(tmp_path)
    sources = [
        (pipeline,),
        (pipeline.unet, pipeline.scheduler),
        (pipeline.unet, folder / "scheduler" / "scheduler_config.json"),
        (str(folder),),
        (folder / "unet",),
        (replaced,),
        (tmp_path,),
    ]
    found = [pretrained.from_diffusers(*source) for source in sources]
    found.append(pickle.loads(pickle.dumps(found[0])))
    results = [denoiser(U.float(), 1.5) for denoiser in found]
    assert all(torch.equal(result, results[0]) for result in results)


def test_one_dimension_is_no_shape_of_images():
    network = diffusers.UNet1DModel(sample_size=16, block_out_channels=(8, 8, 16))
    assert pretrained.from_diffusers(network, DDPM()).shape is None


def test_the_nearest_level_is_passed_as_a_whole_number(folder):
    found, passed = pretrained.from_diffusers(folder, nearest=True), []
    note = lambda module, args, kwargs: passed.append(kwargs["timestep"])  # noqa: E731
    found.network.model.register_forward_pre_hook(note, with_kwargs=True)
    found(torch.zeros(1, *SHAPE), 1.0)
    assert passed[0].dtype == torch.int64


def test_a_name_is_fetched_on_request_only(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"somebody/model is no folder; .*download=True"):
        pretrained.from_diffusers("somebody/model")
    fetched = lambda name, allow_patterns: folder  # noqa: E731
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

    def score(rows):
        given = {"pooled_projections": pooled.expand(rows, -1), **ids}
        given["encoder_hidden_states"] = text.expand(rows, -1, -1)
        return ConditionalScore(DenoiserScore(denoiser, CLD()), **given)

    found = sample(CLD(), score(1), (3, 9, 4), nfe=6, batch=2)
    assert relative(found, sample(CLD(), score(3), (3, 9, 4), nfe=6)) <= COMPILED


class Unknown(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A network that diffusers does not have."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, in_channels=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, timestep, return_dict=True):
        return (self.weight * x * timestep.reshape(-1, 1, 1, 1),)


def named(name):
    """An unknown network with the name of another."""
    return type(name, (Unknown,), {})()


@pytest.mark.parametrize(
    ("name", "options", "time"),
    [
        ("Unknown", {"clock": lambda t: 3 * t}, 1.5),
        ("SD3Transformer2DModel", {}, 500.0),
        ("AuraFlowTransformer2DModel", {}, 0.5),
    ],
)
def test_the_clock_is_given_or_that_of_the_network(name, options, time):
    network = named(name).double()
    found = pretrained.from_diffusers(network, FLOW, **options)(U, 1.0)
    # x_0 = x − σ v with x = u/2 and σ = 1/2 at σ/α = 1, and the network's v = time · x.
    assert torch.allclose(found, U / 2 * (1 - time / 2), rtol=EPS, atol=0)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (Unknown(), {}, "clock must be given for Unknown, because the form"),
        (named("Lumina2Transformer2DModel"), {"clock": "time"}, "predicts the negative flow"),
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
def test_a_compiled_network_is_one_of_the_pipeline(folder):
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    expected = pretrained.from_diffusers(pipeline)(U.float(), 1.5)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    for source in ((pipeline,), (pipeline.unet, pipeline.scheduler)):
        found = pretrained.from_diffusers(*source)
        assert found.shape == SHAPE
        with torch.compiler.set_stance("force_eager"):  # to trace the network takes seconds
            assert relative(found(U.float(), 1.5), expected) <= COMPILED


@pytest.mark.parametrize(
    ("scheduler", "error", "message"),
    [
        (None, ValueError, "scheduler must be given"),
        (3, TypeError, "scheduler must be a scheduler of diffusers.*int"),
        ("missing.json", FileNotFoundError, "there is no file missing.json"),
        (diffusers.EDMEulerScheduler(), ValueError, "levels and prediction of EDMEulerScheduler"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), ValueError, "invert_sigm"),
        (diffusers.DDIMInverseScheduler(), ValueError, "DDIMInverseScheduler adds noise"),
    ],
)
def test_schedulers_that_do_not_fit_are_rejected(scheduler, error, message):
    with pytest.raises(error, match=message):
        pretrained.from_diffusers(unet(), scheduler)


def test_sources_that_are_no_models_are_rejected(folder, tmp_path):
    def assert_rejected(message, source=tmp_path, *scheduler, error=ValueError):
        with pytest.raises(error, match=message):
            pretrained.from_diffusers(source, *scheduler)

    assert_rejected(r"config.json is missing", error=FileNotFoundError)
    assert_rejected(r"source must be a folder, a pip", torch.nn.Linear(1, 1), error=TypeError)
    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
    assert_rejected(r"AutoencoderKL .* is no network of noisy data", tmp_path / "vae", DDPM())
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "unet" / "config.json", pickled)
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert_rejected(r"must be safetensors; it holds .*\.bin, and a pickle", pickled, DDPM())
