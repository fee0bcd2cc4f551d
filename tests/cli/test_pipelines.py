"""Models and pipelines of diffusers from the command line: text, classes and an autoencoder."""

import dataclasses
import json
import math

import numpy as np
import pytest
from PIL import Image

from cldsde import CLD
from cldsde.solvers import recommend
from command import command, rejected

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402 -- needs both libraries
from cldsde.pretrained.conventions import Convention  # noqa: E402


@pytest.fixture(scope="module")
def folders(diffusers_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("SD", "DiT"):
        tiny_pipelines.make(name).save_pretrained(root / name)
    (root / "model").symlink_to(diffusers_model)
    return root


@pytest.fixture
def sampled(folders, tmp_path):
    def images(name, *options, nfe=3):
        out, nfe = tmp_path / "x.npz", 6 if name.startswith("model") else nfe
        words = ("--model", folders / name, "--seeds", "2-4")
        words += () if nfe is None else ("--nfe", nfe)
        words += (*options, "--device", "cpu", "--overwrite", "--out", out)
        assert command("sample", *words) == 0
        with np.load(out) as found:
            # Pipelines are guided by default, with two evaluations a step.
            assert (found["evaluations"] == 6).all()
            return found["images"]

    return images


TEXT = ["--prompt", "red circle"]


def test_options_reach_the_pipeline(sampled):
    plain = sampled("SD", *TEXT)
    assert plain.shape == (3, 16, 16, 3)
    assert plain.dtype == np.uint8
    # The first seeds are the same in smaller batches.
    close = sampled("SD", *TEXT, "--batch", 2).astype(int) - plain
    assert abs(close).max() <= 1
    others = [["--process", "VPSDE"], ["--guidance", 1.5], ["--negative-prompt", "blue"]]
    for options in (*others, ["--solver", "em"], ["--process-set", "friction=1.5"]):
        assert not np.array_equal(sampled("SD", *TEXT, *options), plain), options
    assert not np.array_equal(sampled("SD", "--prompt", "blue"), plain)


def test_a_pipeline_takes_settings(sampled, folders, tmp_path, capsys):
    """Images of the recommended settings are those without settings."""
    scheduler = diffusers.DiffusionPipeline.from_pretrained(folders / "SD").scheduler
    levels = [math.exp(-kappa) for kappa in reversed(Convention.of(scheduler).ends)]
    file = tmp_path / "few.json"
    chosen = recommend(CLD(), 3, shape=(4, 128, 128), levels=levels)
    chosen.save(file)
    plain = sampled("SD", *TEXT)
    chosen_by_file = sampled("SD", *TEXT, "--settings", file, nfe=None)
    assert np.array_equal(chosen_by_file, plain)
    with_noise = dataclasses.replace(chosen, stochasticity=(0.3, 0.0))
    with_noise.save(file)
    assert not np.array_equal(sampled("SD", *TEXT, "--settings", file, nfe=None), plain)
    words = ("sample", "--model", folders / "SD", *TEXT, "--settings", file)
    assert "--nfe: must be left out with" in rejected(capsys, *words, "--nfe", 3)
    assert command(*words, "--process", "VPSDE") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: --settings: settings must be for this process" in last


def test_classes_reach_the_pipeline_and_its_guidance(sampled):
    first, second = (sampled("DiT", "--class", i, "--guidance", 3) for i in (1, 2))
    assert first.shape == (3, 16, 16, 3)
    assert not np.array_equal(first, second)


def test_options_choose_process_solver_class_and_observation(sampled, tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "small.png")
    known = ["--known", tmp_path / "small.png", "--observe", "downsample:2", "--noise-std", 0.2]
    cld = ["--process", "CLD", "--class", 0]
    plain = sampled("model", *cld)
    others = [[*cld, *more] for more in (["--solver", "em"], ["--class", 1], known)]
    others += [[*cld, "--process-set", "friction=1.5"], ["--process", "VPSDE", "--class", 0]]
    for options in others:
        found = sampled("model", *options)
        assert found.shape == plain.shape
        assert not np.array_equal(found, plain), options
    assert np.array_equal(sampled("model/model_index.json", *cld), plain)


@pytest.mark.usefixtures("untrained_classifier")
def test_a_model_is_evaluated_against_the_data_of_a_run(diffusers_model, digits_run, tmp_path):
    out, config = tmp_path / "results.jsonl", digits_run.with_name("tiny.toml")
    words = ("--model", diffusers_model, "--reference", config, "--out", out)
    assert command("evaluate", *words, "--nfe", 4, "--samples", 6, "--device", "cpu") == 0
    [result] = map(json.loads, out.read_text().splitlines())
    assert result["numbers"]["fd"] > 0


BAD = [
    ("SD", [], "prompt", "needed for a StableDiffusionPipeline"),
    ("SD", [*TEXT, "--class", "1"], "--class", "must be left out for a StableDiffusionPipeline"),
    ("SD", [*TEXT, "--grid", "quadratic"], "--grid", "must be left out for a pipeline"),
    ("SD", [*TEXT, "--solver", "sscs"], "--solver", "evaluate the score only at the start"),
    ("DiT", ["--prompt", "red"], "prompt", "must be left out for a DiTPipeline"),
    ("SD/unet", [], "--model", "a network with a condition; give the folder of its whole pipeline"),
    ("DiT", [], "--class", "must be a number for a DiTPipeline; got None"),
]


@pytest.mark.parametrize(("name", "options", "key", "reason"), BAD)
def test_what_is_missing_is_said(folders, tmp_path, capsys, name, options, key, reason):
    words = ("--model", folders / name, *options, "--out", tmp_path / "x.npz", "--device", "cpu")
    assert command("sample", *words) != 0
    error = capsys.readouterr().err
    assert key in error
    assert reason in error
