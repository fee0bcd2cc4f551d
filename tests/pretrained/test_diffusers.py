"""Networks of diffusers give here what they give in diffusers, and what cannot be used is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cldsde import (
    CLD,
    VPSDE,
    DenoiserScore,
    GuidedScore,
    ReverseProcess,
    pretrained,
    sample,
    solvers,
)
from cldsde.score import ConditionalScore
from probes import generator

diffusers = pytest.importorskip("diffusers")

SHAPE = (1, 8, 8)


def unet(**options: Any) -> Any:
    """A network with random weights, in double precision."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        **{"out_channels": 1, **options},
    ).double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Pipelines as ``save_pretrained`` writes them."""
    schedulers = {
        "ddpm": diffusers.DDPMScheduler(clip_sample=False),
        "v": diffusers.DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
        ),
        "sample": diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False),
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    root = tmp_path_factory.mktemp("models")
    for name, scheduler in schedulers.items():
        if name == "flow":  # no pipeline takes a UNet2DModel and this scheduler
            unet().save_pretrained(root / name)
            scheduler.save_pretrained(root / name)
        else:
            diffusers.DDPMPipeline(unet(), scheduler).save_pretrained(root / name)
    return {name: root / name for name in schedulers}


def denoiser(folder: Path) -> Any:
    found = pretrained.from_diffusers(folder)
    return found.double()


def theirs(scheduler: Any, steps: int, x: Tensor) -> Tensor:
    """The image that a scheduler makes of noise."""
    network = unet()
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    return x


def ours(folder: Path, solver: Any, levels: Tensor, x: Tensor) -> Tensor:
    """The image that a solver makes of the same noise under VP, at the same levels."""
    sde = VPSDE(beta_max=25.0)  # reaches the levels of every table
    times = solvers.times_of_log_snr(sde, levels)
    process = ReverseProcess(sde, DenoiserScore(denoiser(folder), sde))
    # x is in units of variance 1, as the states of VP are.
    found = solvers.solve(process, solver, x.unsqueeze(1), times, denoise=True)
    return found.data


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


NOISE = torch.randn(2, *SHAPE, generator=generator(1), dtype=torch.float64)
MULTISTEP = solvers.ExponentialMultistep


class TestTheirSchedulers:
    """To 1e-4: the tables of the schedulers are in single precision."""

    @pytest.mark.parametrize("name", ["ddpm", "v", "sample"])
    def test_ddim(self, folders, name):
        config = json.loads((folders[name] / "scheduler/scheduler_config.json").read_text())
        scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
        scheduler.set_timesteps(20)
        levels = 0.5 * scheduler.alphas_cumprod.double()[scheduler.timesteps].logit()
        found = ours(folders[name], MULTISTEP(order=1), levels, NOISE)
        assert relative(found, theirs(scheduler, 20, NOISE)) <= 1e-4

    @pytest.mark.parametrize("name", ["ddpm", "v"])
    def test_dpm_solver(self, folders, name):
        config = json.loads((folders[name] / "scheduler/scheduler_config.json").read_text())
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            config, lower_order_final=False
        )
        scheduler.set_timesteps(20)
        levels = 0.5 * scheduler.alphas_cumprod.double()[scheduler.timesteps].logit()
        solver = MULTISTEP(order=2, variable="log_snr", weights="published")
        found = ours(folders[name], solver, levels, NOISE)
        assert relative(found, theirs(scheduler, 20, NOISE)) <= 1e-4

    def test_flow_euler(self, folders):
        """From σ = 0.98, as VP has no level of pure noise."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=torch.linspace(0.94, 0.05, 12).tolist())
        sigmas = scheduler.sigmas.double()
        x, network = NOISE * sigmas[0], unet()
        with torch.no_grad():
            for t, now, after in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
                x = x + (after - now) * network(x, t).sample
        scheduler_x = NOISE * sigmas[0]
        with torch.no_grad():
            for t in scheduler.timesteps:
                out = network(scheduler_x, t).sample
                scheduler_x = scheduler.step(out, t, scheduler_x).prev_sample
        assert relative(scheduler_x, x) <= 1e-5  # it computes in single precision
        levels = ((1 - sigmas[:-1]) / sigmas[:-1]).log()
        # The state of the linear path in the units of VP, α²+σ² = 1.
        units = ((1 - sigmas[0]) ** 2 + sigmas[0] ** 2).sqrt()
        found = ours(folders["flow"], MULTISTEP(order=1), levels, NOISE * sigmas[0] / units)
        assert relative(found, scheduler_x) <= 1e-4


class TestSources:
    def test_a_pipeline_a_model_and_a_folder_are_one(self, folders):
        pipeline = diffusers.DDPMPipeline.from_pretrained(folders["ddpm"])
        config = folders["ddpm"] / "scheduler" / "scheduler_config.json"
        makers = [
            lambda: pretrained.from_diffusers(pipeline),
            lambda: pretrained.from_diffusers(pipeline.unet, pipeline.scheduler),
            lambda: pretrained.from_diffusers(
                pipeline.unet, dict(pipeline.scheduler.config) | {"_class_name": "DDPMScheduler"}
            ),
            lambda: pretrained.from_diffusers(folders["ddpm"] / "unet"),
            lambda: pretrained.from_diffusers(pipeline.unet, config),
            lambda: pretrained.from_diffusers(str(folders["ddpm"])),
        ]
        u = torch.randn(2, *SHAPE, generator=generator())
        results = [make()(u, 1.5) for make in makers]
        assert all(torch.equal(result, results[0]) for result in results)

    def test_samples_under_other_dynamics(self, folders):
        found = pretrained.from_diffusers(folders["ddpm"])
        assert found.shape == SHAPE
        for sde in (VPSDE(), CLD()):
            x = sample(sde, DenoiserScore(found, sde), (3, *SHAPE), nfe=5)
            assert x.shape == (3, *SHAPE)

    def test_classes_and_guidance(self):
        """Guidance asks the network once, with both classes."""
        network = unet(num_class_embeds=4)
        found = pretrained.from_diffusers(network, diffusers.DDPMScheduler())
        sde = CLD()
        score = DenoiserScore(found, sde)
        given, free = (ConditionalScore(score, class_labels=torch.tensor(c)) for c in (1, 3))
        calls: list[int] = []
        network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        z = sde.prior.sample((2, *SHAPE), generator=generator(), dtype=torch.float64)
        t = torch.tensor(0.5).expand(2)
        guided = GuidedScore(given, free, 2.0)(z, t)
        assert calls == [4]
        torch.testing.assert_close(guided, free(z, t) + 2 * (given(z, t) - free(z, t)))

    def test_the_nearest_level(self, folders):
        """The network is told whole numbers."""
        found = pretrained.from_diffusers(folders["ddpm"], nearest=True)
        told: list[Tensor] = []
        found.network.model.register_forward_pre_hook(
            lambda module, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True
        )
        found(torch.zeros(1, *SHAPE), 1.0)
        assert told[0].dtype == torch.int64

    def test_a_learnt_variance_is_left_out(self):
        network = unet(out_channels=2)
        found = pretrained.from_diffusers(
            network, diffusers.DDPMScheduler(variance_type="learned_range")
        )
        u = torch.randn(1, *SHAPE, generator=generator(), dtype=torch.float64)
        assert found(u, 1.0).shape == u.shape

    def test_a_name_is_fetched_on_request_only(self, folders, monkeypatch):
        import huggingface_hub

        with pytest.raises(
            FileNotFoundError, match=r"somebody/model is no folder; .*download=True"
        ):
            pretrained.from_diffusers("somebody/model")
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda name, allow_patterns: folders["ddpm"]
        )
        assert pretrained.from_diffusers("somebody/model", download=True).shape == SHAPE


class TestOddModels:
    def test_the_configuration_of_a_scheduler(self):
        found = pretrained.from_diffusers(unet(), diffusers.DDPMScheduler().config)
        same = pretrained.from_diffusers(unet(), diffusers.DDPMScheduler())
        u = torch.randn(1, *SHAPE, generator=generator(), dtype=torch.float64)
        assert torch.equal(found(u, 1.0), same(u, 1.0))

    def test_a_model_of_the_caller_is_left_as_it_is(self):
        network = unet().train()
        pretrained.from_diffusers(network, diffusers.DDPMScheduler())
        assert network.training
        assert all(x.requires_grad for x in network.parameters())

    def test_weights_in_half_precision(self, tmp_path):
        """Folders of a variant are loaded; networks are evaluated in their own precision."""
        unet().half().save_pretrained(tmp_path, variant="fp16")
        found = pretrained.from_diffusers(tmp_path, diffusers.DDPMScheduler())
        x = torch.randn(1, *SHAPE, generator=generator())
        halved = pretrained.from_diffusers(unet().bfloat16(), diffusers.DDPMScheduler())
        difference = found(x, 1.0) - halved(x, 1.0)
        assert halved(x, 1.0).dtype == torch.float32
        # bfloat16 has eight bits; a few dozen layers add up their rounding.
        assert difference.abs().max() <= 0.1 * found(x, 1.0).abs().max()

    def test_zero_signal_at_the_end(self):
        """The entry that stands for no signal is left out."""
        options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        for kind in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
            found = pretrained.from_diffusers(unet(), kind(**options))
            assert found.path.interval == (0.0, 998.0)

    def test_one_dimension(self):
        network = diffusers.UNet1DModel(sample_size=16, block_out_channels=(8, 8, 16))
        assert pretrained.from_diffusers(network, diffusers.DDPMScheduler()).shape is None

    def test_paths_are_pickled(self):
        found = pretrained.from_diffusers(unet(), diffusers.DDPMScheduler())
        again = pickle.loads(pickle.dumps(found))
        u = torch.randn(1, *SHAPE, generator=generator(), dtype=torch.float64)
        assert torch.equal(found(u, 1.0), again(u, 1.0))


class TestErrors:
    def test_a_flow_that_runs_the_other_way(self):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
        with pytest.raises(ValueError, match="invert_sigmas has noise at time 0"):
            pretrained.from_diffusers(unet(), scheduler)

    def test_an_autoencoder(self, tmp_path):
        diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"AutoencoderKL .* is no network of noisy data"):
            pretrained.from_diffusers(tmp_path, diffusers.DDPMScheduler())

    def test_a_pickle(self, folders, tmp_path):
        source = folders["ddpm"] / "unet"
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
        with pytest.raises(
            ValueError, match=r"must be safetensors; it holds .*\.bin, and a pickle"
        ):
            pretrained.from_diffusers(tmp_path, diffusers.DDPMScheduler())

    def test_no_scheduler(self, tmp_path):
        unet().save_pretrained(tmp_path / "alone")
        with pytest.raises(ValueError, match="scheduler must be given for a model without one"):
            pretrained.from_diffusers(tmp_path / "alone")
        with pytest.raises(ValueError, match="scheduler must be given"):
            pretrained.from_diffusers(unet())

    @pytest.mark.parametrize(
        ("scheduler", "error", "message"),
        [
            ({"steps": 1e-4}, ValueError, "_class_name must name a SchedulerMixin.*None"),
            ({"_class_name": "UNet2DModel"}, ValueError, "_class_name must name a SchedulerMixin"),
            (3, TypeError, "scheduler must be a scheduler of diffusers.*int"),
            ("missing.json", FileNotFoundError, "there is no file missing.json"),
        ],
    )
    def test_schedulers_that_are_none(self, scheduler, error, message):
        with pytest.raises(error, match=message):
            pretrained.from_diffusers(unet(), scheduler)

    def test_a_scheduler_of_unknown_levels(self):
        with pytest.raises(ValueError, match="levels and prediction of EDMEulerScheduler"):
            pretrained.from_diffusers(unet(), diffusers.EDMEulerScheduler())

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
            pretrained.from_diffusers(tmp_path)
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(ValueError, match="lists none of unet, transformer"):
            pretrained.from_diffusers(tmp_path)
        (tmp_path / "model_index.json").write_text("{")
        with pytest.raises(ValueError, match="is no JSON file"):
            pretrained.from_diffusers(tmp_path)

    def test_something_else(self):
        with pytest.raises(TypeError, match=r"source must be a folder, a pipeline or a model"):
            pretrained.from_diffusers(torch.nn.Linear(1, 1))
