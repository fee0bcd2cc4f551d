"""Models and pipelines of diffusers from the command line: text, classes and an autoencoder."""

import json

import numpy as np
import pytest
from PIL import Image

from command import command

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402 -- needs both libraries


@pytest.fixture(scope="module")
def folders(diffusers_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("SD", "DiT"):
        tiny_pipelines.make(name).save_pretrained(root / name)
    (root / "model").symlink_to(diffusers_model)
    return root


@pytest.fixture
def sampled(folders, tmp_path):
    def images(name, *options):
        out, nfe = tmp_path / "x.npz", 6 if name.startswith("model") else 3
        words = ("--model", folders / name, "--nfe", nfe, "--seeds", "2-4")
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
