"""Models of diffusers from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cldsde import CLD, DenoiserScore, ReverseProcess, pretrained
from cldsde.cli import main
from cldsde.score import ConditionalScore
from cldsde.solvers import ExponentialMultistep, SampleNoise, plan
from cldsde.solvers.sampling import fit_grid, window
from command import rejected

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline of random weights with three classes.

    It predicts data, since images without saturated pixels follow from that.
    """
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    )
    folder = tmp_path_factory.mktemp("models")
    scheduler = diffusers.DDPMScheduler(prediction_type="sample")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def sampled(model, tmp_path):
    def images(*options, source=model):
        out = tmp_path / "x.npz"
        words = ["sample", "--model", source, "--nfe", 6, "--seeds", "2-4", "--class", 0]
        words += [*options, "--device", "cpu", "--overwrite", "--out", out]
        assert main(list(map(str, words))) == 0
        return np.load(out)["images"]

    return images


def test_images_are_those_of_the_same_steps_in_python(model, sampled):
    found = sampled("--process", "CLD")
    sde = CLD()
    score = DenoiserScore(pretrained.from_diffusers(model), sde)
    process = ReverseProcess(sde, ConditionalScore(score, class_labels=torch.tensor(0)))
    solver = ExponentialMultistep(order=2, stochasticity=1.0)
    start, end = window(ReverseProcess(sde, score))
    noise = SampleNoise([2, 3, 4])
    times = fit_grid(process, solver, start, end, 5)
    state = noise.start(sde, (1, 8, 8), t=start)
    data = plan(process, solver, times).solve(state, noise=noise, denoise=True).data
    levels = ((data.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    # Rounding to grey levels may differ by one.
    assert np.abs(found.astype(int) - levels.numpy()).max() <= 1
    assert found.std() > 0


def test_options_choose_process_solver_class_and_observation(model, sampled, tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "small.png")
    known = ["--known", tmp_path / "small.png", "--observe", "downsample:2", "--noise-std", 0.2]
    plain = sampled("--process", "CLD")
    others = (
        ["--process", "CLD", "--process-set", "friction=1.5"],
        ["--process", "CLD", "--solver", "em"],
        ["--process", "CLD", "--class", 1],
        ["--process", "CLD", *known],
        ["--process", "VPSDE"],
    )
    for options in others:
        found = sampled(*options)
        assert found.shape == plain.shape
        assert not np.array_equal(found, plain), options
    assert np.array_equal(sampled("--process", "CLD", source=model / "model_index.json"), plain)


@pytest.mark.usefixtures("untrained_classifier")
def test_a_model_is_evaluated_against_the_data_of_a_run(model, digits_run, tmp_path):
    out = tmp_path / "results.json"
    config = digits_run.with_name("tiny.toml")
    words = ["evaluate", "--model", model, "--reference", config, "--out", out]
    words += ["--nfe", 4, "--samples", 6, "--device", "cpu"]
    assert main(list(map(str, words))) == 0
    [recipe] = json.loads(out.read_text())["recipes"]
    [cell] = recipe["cells"].values()
    assert cell["fd classifier train"]["frechet_distance"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "a run or --model is needed"),
        ("RUN --model MODEL", "a run or --model is needed"),
        ("--model MODEL --process CLDD", "process.name"),
        ("--model MODEL --process CLD --process-set bet=3", "bet"),
        ("--model nowhere", "nowhere is no folder"),
        ("--model MODEL --t-start 2", "--t-start"),
        ("--model MODEL --t-start 1.0 --nfe 4", "trained on, 0.01"),
        ("--model MODEL --class 7", "--class"),
    ],
)
def test_wrong_options_are_rejected(options, message, digits_run, model, tmp_path, capsys):
    out = tmp_path / "x.npz"
    words = options.replace("RUN", str(digits_run)).replace("MODEL", str(model)).split()
    assert message in rejected(capsys, "sample", *words, "--out", out)
    assert not out.exists()
