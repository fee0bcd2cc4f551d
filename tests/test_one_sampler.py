"""One sampler as a value gives the same samples wherever it runs."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from cldsde import CLD, HOLD, VESDE, VPSDE, DenoiserScore, RectifiedFlow, sample
from cldsde.images.config import ProcessConfig
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.sample.source import of_diffusers
from cldsde.linear.covariance import triangular_inverse
from cldsde.pretrained import PipelineScheduler, from_diffusers, sample_k_diffusion
from cldsde.solvers import NoiseSource, SampleNoise, SamplerSettings, recommend
from command import command
from tolerances import rounding

SEEDS = [3, 4]
SHAPE = (1, 8, 8)
# Five evaluations of a small network in single precision.
SINGLE = {"rtol": 0, "atol": rounding(2**9, dtype=torch.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network and a scheduler of diffusers, as a pipeline stores them."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("model")
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    net = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **blocks, **kinds)
    net.save_pretrained(where / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(where / "scheduler")
    index = '{"_class_name": "DDIMPipeline", "_diffusers_version": "0.35.0", '
    index += '"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}'
    (where / "model_index.json").write_text(index)
    return where


class Continued(NoiseSource):
    """The normals of `sample` after its start, for a caller that sees x alone.

    The caller draws the hidden part w of the first state (see `cldsde.pretrained.stepping`) before
    the steps draw theirs. Here it is the w of a given state.
    """

    def __init__(self, noise, sde, t, z):
        self.noise, self.first = noise, None
        if sde.components > 1:
            marginal = sde.marginal(torch.tensor(t, dtype=torch.float64))
            whitening = triangular_inverse(marginal.root)
            signal = whitening @ marginal.mean[..., :1]
            g = signal / torch.linalg.vector_norm(signal)
            eye = torch.eye(sde.components, dtype=torch.float64)
            basis = torch.linalg.qr(torch.cat([g, eye], dim=-1)).Q[:, 1:]
            self.first = torch.einsum("ij,bj...->bi...", (basis.T @ whitening).to(z), z)

    def normal(self, z, rows):
        if self.first is not None:
            first, self.first = self.first, None
            return first.to(z)
        return self.noise.normal(z, rows)


def started(sde, settings):
    """Noise, state, and u = x_0 + σ n, from the seeds."""
    t = float(settings.times(sde)[0])
    noise = SampleNoise(SEEDS)
    z = noise.start(sde, SHAPE, t=t)
    marginal = sde.marginal(torch.tensor(t, dtype=torch.float64))
    whitening = triangular_inverse(marginal.root)
    signal = whitening @ marginal.mean[..., :1]
    weights = (signal.mT @ whitening / signal.square().sum())[0]
    u = torch.einsum("j,bj...->b...", weights.to(z), z)
    return Continued(noise, sde, t, z), u


@pytest.mark.parametrize("kind", [VPSDE, VESDE, CLD, HOLD, RectifiedFlow])
def test_settings_give_the_same_samples_everywhere(kind, folder, tmp_path, capsys):
    sde, denoiser = kind(), from_diffusers(folder)
    # The network knows levels from 0.01 to 157.
    chosen = recommend(sde, 5, shape=SHAPE, levels=denoiser.noise_levels)
    chosen.save(tmp_path / "few.json")
    settings = SamplerSettings.load(tmp_path / "few.json")
    assert settings == chosen
    assert len(str(settings).splitlines()) == 3 + 5

    # A run of images, and the command. Both have a stream for each seed.
    model = of_diffusers(folder, ProcessConfig(name=kind.__name__))
    sampler = ImageSampler.of(model, settings)
    noise, state = sampler.start(SEEDS)
    expected = sampler.plan.solve(state, noise=noise).data
    images = sampler.sample(SEEDS).images
    words = ["--model", folder, "--process", kind.__name__, "--settings", tmp_path / "few.json"]
    words += ["--seeds", "3-4", "--device", "cpu", "--out", tmp_path / "x.npz"]
    assert command("sample", *words) == 0
    assert "evaluations" in capsys.readouterr().err
    made = np.load(tmp_path / "x.npz")["images"]
    assert (made == images.movedim(1, -1).numpy()).all()

    # The function has streams of its own, from its seed.
    score = DenoiserScore(denoiser, sde, noise_levels=denoiser.noise_levels)
    found = sample(sde, score, (2, *SHAPE), settings=settings, seed=1)
    assert torch.equal(found, sample(sde, score, (2, *SHAPE), nfe=5, seed=1))
    found = sample(sde, score, (2, *SHAPE), settings=settings, noise=SampleNoise(SEEDS))
    torch.testing.assert_close(found, expected, **SINGLE)

    # k-diffusion sees u = x_0 + σ n.
    continued, u = started(sde, settings)
    how = {"process": sde, "settings": settings, "noise": continued, "disable": True}
    with torch.no_grad():
        found = sample_k_diffusion(denoiser, u, settings.sigmas, **how)
    torch.testing.assert_close(found, expected, **SINGLE)

    # A pipeline sees α u, and its network predicts noise.
    scheduler = PipelineScheduler(DDIMScheduler(clip_sample=False), sde, settings=settings)
    scheduler.set_timesteps(5)
    continued, u = started(sde, settings)
    x = u * scheduler._convention.scales(scheduler._levels)[0][0].to(u)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = denoiser.network.model(x, t.expand(2)).sample
        x = scheduler.step(output, t, x, generator=continued).prev_sample
    torch.testing.assert_close(x, expected, **SINGLE)
