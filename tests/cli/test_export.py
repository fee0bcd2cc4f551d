"""The command ``cldsde export``, and the pipelines that it writes."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

from cldsde.cli import main
from cldsde.errors import SettingError
from cldsde.images import Run
from cldsde.images.sample import ImageSampler
from cldsde.images.sample.export import check_export
from cldsde.solvers import SampleNoise
from tiny_runs import NETWORK
from trainings import configured, trained

# Same arithmetic in another order, and coefficients rounded once more.
ROUNDING = 1e-5
CASES = {
    "VP": {"process": {"name": "VPSDE"}, "score": {"reference": "channel"}},
    "CLD": {"process": {"name": "CLD"}},
    "estimate": {"process": {"name": "CLD"}, "score": {"inputs": "estimate"}},
}


@pytest.fixture(
    scope="module",
    params=["VP", *(pytest.param(x, marks=pytest.mark.slow) for x in ("CLD", "estimate"))],
)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    training = {"images": 32, "batch": 16, "sample_every": 10**6, "learning_rate": 1e-2}
    network = {"options": NETWORK}
    trained(folder, configured({**CASES[request.param], "network": network, "training": training}))
    return folder


def test_the_command_makes_the_same_images_of_an_exported_run(run, tmp_path, capsys):
    out, solver = tmp_path / "new" / "pipeline", "multistep-2-sde"
    assert main(["export", str(run), str(out), "--solver", solver]) == 0
    assert str(out) in capsys.readouterr().out
    words = ["--nfe", "6", "--seeds", "0-3", "--device", "cpu", "--out"]
    assert main(["sample", str(run), "--solver", solver, *words, str(tmp_path / "a.npz")]) == 0
    assert main(["sample", "--model", str(out), *words, str(tmp_path / "b.npz")]) == 0
    first, second = (np.load(tmp_path / f"{x}.npz")["images"] for x in "ab")
    assert np.array_equal(first, second)


def test_diffusers_makes_the_same_images_of_an_exported_run(run, tmp_path):
    out = tmp_path / "pipeline"
    assert main(["export", str(run), str(out), "--solver", "multistep-2"]) == 0
    pipe = diffusers.DDPMPipeline.from_pretrained(out)
    assert type(pipe.unet) is diffusers.UNet2DModel
    pipe.set_progress_bar_config(disable=True)
    # The state at the start is one that gives the network the pipeline's normals.
    start, started = [], pipe.scheduler._started
    pipe.scheduler._started = lambda x: start.append(started(x)) or start[0]
    draw = torch.Generator().manual_seed(0)
    theirs = pipe(batch_size=3, generator=draw, num_inference_steps=6, output_type="np").images
    found = Run.load(run)
    sampler = ImageSampler.of(
        found, dataclasses.replace(found.sampling, solver="multistep-2", nfe=6)
    )
    ours = sampler.plan.solve(start[0], noise=SampleNoise([0, 1, 2]), denoise=True).data
    ours = (ours / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING)


def test_code_that_a_scheduler_names_is_not_run(run, tmp_path):
    scheduler = check_export(Run.load(run), tmp_path / "new")
    recipe = dataclasses.replace(scheduler.run.sampling, solver="planted:Solver")
    scheduler.run = dataclasses.replace(scheduler.run, sampling=recipe)
    with pytest.raises(SettingError, match="planted:Solver is code outside of cldsde"):
        scheduler.set_timesteps(6)
