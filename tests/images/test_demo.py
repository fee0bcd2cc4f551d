"""The demonstration and its command ``cldsde demo``."""

import gc
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from cldsde.cli import main
from cldsde.images import demo
from cldsde.images.evaluate.classifier import ImageClassifier
from cldsde.images.schema import plain
from command import rejected
from tolerances import EPS32


def tiny(seed: int = 0, device: str = "cpu", **_: object) -> demo.DemoConfig:
    """A demonstration in which everything runs and nothing is learnt."""
    short = {"images": 48, "batch": 16, "log_every": 16, "save_every": 16, "sample_every": 48}
    words = [f"training.{key}={value}" for key, value in short.items()]
    words += [f"seed={seed}", "network.options.channels=[16]"]
    model = demo.load_config(demo._CONFIG, words)
    return demo.DemoConfig(model=model, device=device, nfe=(3, 5), samples=80)


@pytest.fixture(scope="module")
def tiny_demo():
    """Replace the quick demonstration by a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.DemoConfig, "make", tiny)
        patch.setattr(demo, "train_classifier", lambda *_, **__: (ImageClassifier(1, 10).eval(), 1))
        yield ["demo", "--quick", "--device", "cpu", "--out"]


@pytest.fixture(scope="module")
def finished(tiny_demo, tmp_path_factory):
    torch.manual_seed(0)  # of the classifier
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main([*tiny_demo, str(folder)]) == 0
    gc.collect()  # the lock of the run goes with the last reference to it
    return folder


def distances(results: dict) -> dict[str, dict[int, list[float]]]:
    """Fréchet distances of the sets of images by solver and score evaluations."""
    return {
        row["label"]: {cell["nfe"]: cell["measures"]["fd"] for cell in row["cells"]}
        for row in results["rows"]
    }


def test_a_demonstration_writes_a_whole_run_folder(finished):
    pictures = {"distances.png", "samples.png", "trajectories.png"}
    numbers = {"config.json", "results.json", "samples.npz", "table.md"}
    assert {file.name for file in finished.iterdir()} == {"model"} | numbers | pictures
    results = json.loads((finished / "results.json").read_text())
    counts = {
        name: {nfe: len(sets) for nfe, sets in row.items()}
        for name, row in distances(results).items()
    }
    assert counts == {name: {3: 3, 5: 3} for name in ("EM", "SSCS", "multistep")}
    assert sum(results["class_shares"]) == pytest.approx(1, rel=4 * EPS32, abs=0)


def test_a_finished_demonstration_is_reported_again_at_once(tiny_demo, finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.iterdir()}
    assert main([*tiny_demo, str(finished)]) == 0
    assert (finished / "table.md").read_text() in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in finished.iterdir()} == before
    message = rejected(capsys, *tiny_demo, finished, "--seed", 1)
    assert "other settings (model.seed)" in message


def test_a_demonstration_resumes_to_the_same_images(tiny_demo, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "samples.npz").unlink()
    torch.manual_seed(0)
    assert main([*tiny_demo, str(folder)]) == 0
    images, again = (np.load(run / "samples.npz")["images"] for run in (finished, folder))
    assert np.array_equal(images, again)
    tables = [(run / "table.md").read_text().partition("Took") for run in (finished, folder)]
    assert tables[0][0] == tables[1][0]
    (folder / "model" / "model.safetensors").write_bytes(b"short")
    (folder / "results.json").unlink()  # so that the run resumes
    gc.collect()
    assert main([*tiny_demo, str(folder)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.safetensors is damaged" in error
    assert "delete it" in error


@pytest.mark.slow
def test_the_quick_demonstration_generates_digits(tmp_path):
    """Already the short training leaves a Gaussian fitted to the pixels far behind."""
    folder = tmp_path / "run"
    command = [sys.executable, "-I", "-m", "cldsde", "demo", "--quick", "--device", "cpu", "--out"]
    result = subprocess.run([*command, folder], capture_output=True, text=True, check=True)
    assert (folder / "table.md").read_text() in result.stdout
    assert "loss=" in result.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results["accuracy"] >= 0.97
    # About 0.3 of it. The mean of three sets of 300 images scatters by a tenth of itself.
    assert sum(distances(results)["multistep"][50]) / 3 <= results["baseline"] / 2
    assert min(results["class_shares"]) > 0
    lines = (folder / "model" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["held_out_loss"] for line in lines]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_full_demonstration_generates_digits_of_every_class(tmp_path, seed):
    config = demo.DemoConfig.make(seed)
    folder = demo.RunFolder(tmp_path / "run", plain(config))
    demo.run_demo(config, folder)
    results = json.loads((folder / "results.json").read_text())
    assert results["accuracy"] >= 0.97
    assert all(0.04 <= share <= 0.18 for share in results["class_shares"])
    means = {
        name: {nfe: sum(sets) / len(sets) for nfe, sets in row.items()}
        for name, row in distances(results).items()
    }
    assert means["SSCS"][100] <= results["baseline"] / 4
    # Three sets of 1,000 images scatter by a tenth of their mean.
    assert means["multistep"][10] < 1.2 * min(means[name][50] for name in ("EM", "SSCS"))
