"""Models of diffusers from the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from cldsde.cli import main

pytest.importorskip("diffusers")


@pytest.fixture
def sampled(diffusers_model, tmp_path):
    def images(*options, source=diffusers_model):
        out = tmp_path / "x.npz"
        words = ["sample", "--model", source, "--nfe", 6, "--seeds", "2-4", "--class", 0]
        words += [*options, "--device", "cpu", "--overwrite", "--out", out]
        assert main(list(map(str, words))) == 0
        return np.load(out)["images"]

    return images


def test_options_choose_process_solver_class_and_observation(diffusers_model, sampled, tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "small.png")
    known = ["--known", tmp_path / "small.png", "--observe", "downsample:2", "--noise-std", 0.2]
    cld = ["--process", "CLD"]
    plain = sampled(*cld)
    others = [[*cld, *more] for more in (["--solver", "em"], ["--class", 1], known)]
    for options in (*others, [*cld, "--process-set", "friction=1.5"], ["--process", "VPSDE"]):
        found = sampled(*options)
        assert found.shape == plain.shape
        assert not np.array_equal(found, plain), options
    same = sampled(*cld, source=diffusers_model / "model_index.json")
    assert np.array_equal(same, plain)


@pytest.mark.usefixtures("untrained_classifier")
def test_a_model_is_evaluated_against_the_data_of_a_run(diffusers_model, digits_run, tmp_path):
    out = tmp_path / "results.jsonl"
    config = digits_run.with_name("tiny.toml")
    words = ["evaluate", "--model", diffusers_model, "--reference", config, "--out", out]
    words += ["--nfe", 4, "--samples", 6, "--device", "cpu"]
    assert main(list(map(str, words))) == 0
    [result] = map(json.loads, out.read_text().splitlines())
    assert result["numbers"]["fd"] > 0
