"""Folders of pipelines of diffusers from the command line: text, classes and an autoencoder."""

import copy
import functools

import numpy as np
import pytest

from cldsde.cli import main

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402 -- needs both libraries


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("SD", "DiT"):
        tiny_pipelines.make(name).save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True, scope="module")
def loaded_once():
    """Load each folder once: that takes longer than its images."""
    load = functools.cache(diffusers.DiffusionPipeline.from_pretrained)
    with pytest.MonkeyPatch.context() as patch:
        # A copy: the command gives it another scheduler.
        patch.setattr(
            diffusers.DiffusionPipeline,
            "from_pretrained",
            lambda *args, **options: copy.copy(load(*args, **options)),
        )
        yield


@pytest.fixture
def sampled(folders, tmp_path):
    def images(name, *options):
        out = tmp_path / "x.npz"
        words = ["sample", "--model", folders / name, "--nfe", 3, "--seeds", "2-4"]
        words += [*options, "--device", "cpu", "--overwrite", "--out", out]
        assert main(list(map(str, words))) == 0
        with np.load(out) as found:
            # Both pipelines are guided by default, with two evaluations a step.
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


BAD = [
    ("SD", [], "prompt", "needed for a StableDiffusionPipeline"),
    ("SD", [*TEXT, "--class", "1"], "--class", "must be left out for a StableDiffusionPipeline"),
    ("SD", [*TEXT, "--grid", "quadratic"], "--grid", "must be left out for a pipeline"),
    ("SD", [*TEXT, "--denoise", "false"], "--denoise", "must be left out for a pipeline"),
    ("SD", [*TEXT, "--particles", "3"], "--particles", "must be left out for a pipeline"),
    ("SD", [*TEXT, "--guidance", "nan"], "--guidance", "must be finite and at least 0; got nan"),
    ("SD", [*TEXT, "--solver", "sscs"], "--solver", "evaluate the score only at the start"),
    ("DiT", ["--prompt", "red"], "prompt", "must be left out for a DiTPipeline"),
    ("SD/unet", [], "--model", "a network with a condition; give the folder of its whole pipeline"),
    ("nope", TEXT, "--model", "is no folder"),
    ("DiT", [], "--class", "must be a number for a DiTPipeline; got None"),
]


@pytest.mark.parametrize(("name", "options", "key", "reason"), BAD)
def test_what_is_missing_is_said_in_one_line(folders, tmp_path, capsys, name, options, key, reason):
    words = ["sample", "--model", folders / name, *options, "--out", tmp_path / "x.npz"]
    assert main(list(map(str, [*words, "--device", "cpu"]))) != 0
    [line] = [
        line for line in capsys.readouterr().err.splitlines() if "rror" in line or key in line
    ]
    assert key in line
    assert reason in line


def test_a_run_takes_no_prompt(tmp_path, capsys):
    """The options are checked before the run is read."""
    words = ["sample", tmp_path / "run", *TEXT, "--out", tmp_path / "x.npz", "--device", "cpu"]
    assert main(list(map(str, words))) != 0
    assert "needs --model and a text-to-image folder" in capsys.readouterr().err
