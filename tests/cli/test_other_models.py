"""Runs under other processes and models of diffusers, from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cldsde import CLD, DenoiserScore, ReverseProcess, pretrained
from cldsde.cli import main
from cldsde.solvers import ExponentialMultistep, SampleNoise, plan
from cldsde.solvers.sampling import fit_grid, window
from command import refused

diffusers = pytest.importorskip("diffusers")

CONFIG = """
process.name = "CLD"

[network]
options = { channels = [16, 16] }

[training]
images = 32
batch = 16
log_every = 16
save_every = 32
sample_every = 32
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.toml").write_text(CONFIG)
    command = ["train", str(folder / "tiny.toml"), "--out", str(folder / "run"), "--device", "cpu"]
    assert main(command) == 0
    return folder / "run"


def save_model(folder, **options):
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
        **options,
    )
    # A network of random weights that predicts data gives images without saturated pixels.
    scheduler = diffusers.DDPMScheduler(prediction_type="sample")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models"))


def sampled(*options):
    assert main(["sample", *map(str, options), "--device", "cpu"]) == 0
    return np.load(options[-1])["images"]


def test_images_of_a_diffusers_folder(model, tmp_path):
    """The images that the same steps give in Python, from the same seeds."""
    out = tmp_path / "x.npz"
    options = ["--model", model, "--process", "CLD", "--nfe", 6, "--seeds", "2-4", "--out", out]
    found = sampled(*options)
    sde = CLD()
    score = DenoiserScore(pretrained.from_diffusers(model), sde)
    process = ReverseProcess(sde, score)
    solver = ExponentialMultistep(order=2, stochasticity=1.0)
    start, end = window(process)
    noise = SampleNoise([2, 3, 4])
    state = noise.start(sde, (1, 8, 8), t=start)
    times = fit_grid(process, solver, start, end, 5)
    data = plan(process, solver, times).solve(state, noise=noise, denoise=True).data
    levels = ((data.clamp(-1, 1) + 1) * 127.5).round()
    # Rounding to grey levels may differ by one.
    expected = levels.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert found.std() > 0


def test_a_file_of_the_folder_and_another_solver(model, tmp_path):
    file = model / "model_index.json"
    options = ["--process", "VPSDE", "--solver", "em", "--nfe", 4, "--seeds", "0-1"]
    found = sampled("--model", file, *options, "--out", tmp_path / "x.npz")
    again = sampled("--model", model, *options, "--out", tmp_path / "y.npz")
    assert np.array_equal(found, again)


def test_options_of_the_process(model, tmp_path):
    options = ["--model", model, "--nfe", 4, "--seeds", "0-1"]
    plain = sampled(*options, "--out", tmp_path / "x.npz")
    other = sampled(
        *options, "--process", "CLD", "--process-set", "friction=1.5", "--out", tmp_path / "y.npz"
    )
    assert not np.array_equal(plain, other)


def test_a_run_under_another_process(run, tmp_path):
    options = ["--nfe", 4, "--seeds", "0-3"]
    own = sampled(run, *options, "--out", tmp_path / "x.npz")
    found = sampled(run, "--process", "HOLD", *options, "--out", tmp_path / "y.npz")
    assert found.shape == own.shape
    assert not np.array_equal(found, own)


def test_images_of_a_diffusers_folder_given_an_observation(model, tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "small.png")
    options = ["--model", model, "--nfe", 4, "--seeds", "0-1"]
    seen = ["--known", tmp_path / "small.png", "--observe", "downsample:2", "--noise-std", 0.2]
    free = sampled(*options, "--out", tmp_path / "x.npz")
    found = sampled(*options, *seen, "--out", tmp_path / "y.npz")
    assert found.shape == free.shape
    assert not np.array_equal(found, free)


def test_classes_of_a_diffusers_folder(tmp_path):
    folder = save_model(tmp_path / "model", num_class_embeds=3)
    options = ["--model", folder, "--nfe", 4, "--seeds", "0-1"]
    first, second = (
        sampled(*options, "--class", label, "--out", tmp_path / f"{label}.npz") for label in "01"
    )
    assert not np.array_equal(first, second)


def test_evaluation_of_a_diffusers_folder_and_of_another_process(model, run, tmp_path):
    out = tmp_path / "results.json"
    options = ["--nfe", "4", "--samples", "6", "--device", "cpu"]
    command = ["evaluate", "--model", str(model), "--reference", str(run), "--out", str(out)]
    assert main([*command, *options]) == 0
    [recipe] = json.loads(out.read_text())["recipes"]
    [cell] = recipe["cells"].values()
    assert cell["fd classifier train"]["frechet_distance"] > 0
    assert main(["evaluate", str(run), "--process", "VPSDE", *options]) == 0
    assert (run / "evaluation-VPSDE.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a run or --model is needed"),
        (["RUN", "--model", "MODEL"], "a run or --model is needed"),
        (["RUN", "--process-set", "beta=3"], "--process-set needs --process"),
        (["--model", "MODEL", "--process", "CLDD"], "process.name"),
        (["--model", "MODEL", "--process", "CLD", "--process-set", "bet=3"], "bet"),
        (["--model", "nowhere"], "nowhere is no folder"),
        (["--model", "MODEL", "--t-start", "2"], "--t-start"),
        (["--model", "MODEL", "--t-start", "1.0", "--nfe", "4"], "trained on, 0.01"),
        (["--model", "MODEL", "--class", "1"], "--class"),
    ],
)
def test_options_that_do_not_fit(options, message, run, model, tmp_path, capsys):
    words = {"RUN": str(run), "MODEL": str(model)}
    command = [words.get(word, word) for word in options]
    out = tmp_path / "x.npz"
    assert message in refused(capsys, "sample", *command, "--out", out)
    assert not out.exists()
