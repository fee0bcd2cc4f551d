"""Training: reproducible, resumable to the bit, the same on any number of processes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from cldsde.images.config import RunConfig
from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.files import load_tensors
from cldsde.images.model import MODEL, load_model, make_model_of
from cldsde.images.runs import RunFolder
from cldsde.images.training import STATE, train

CONFIG = {
    "seed": 5,
    "data": {"flip": True, "dequantise": True},
    "network": {"options": {"channels": [8, 8], "dropout": 0.1}},
    "training": {
        "images": 96,
        "batch": 8,
        "micro_batch": 4,
        "learning_rate": 1e-3,
        "warmup": 16,
        "decay": "cosine",
        "ema_decay": 0.9,
        "log_every": 16,
        "save_every": 32,
        "sample_every": 96,
    },
    "sampling": {"solver": "euler-maruyama", "nfe": 3},
}


def config(**training) -> RunConfig:
    return RunConfig.from_dict({**CONFIG, "training": {**CONFIG["training"], **training}})


def images(seed: int = 0, count: int = 64) -> ArrayImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (count,), generator=generator)
    return ArrayImages(pixels, labels=labels, classes=3)


DATA = DataSet(images(0), images(1, 16))


def trained(folder, settings: RunConfig, data: DataSet = DATA):
    run = RunFolder(folder, settings.to_dict())
    return train(settings, data, run, device="cpu")


def metrics(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_bits(first, second):
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


class StopTrainingError(Exception):
    pass


class InterruptedRun(RunFolder):
    """A run that stops when metrics of some length are logged."""

    at = 80

    def log(self, record):
        super().log(record)
        if record["images"] == self.at:
            raise StopTrainingError


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path):
    whole = trained(tmp_path / "a", config())
    with pytest.raises(StopTrainingError):
        train(config(), DATA, InterruptedRun(tmp_path / "b", config().to_dict()), device="cpu")
    assert (tmp_path / "b" / STATE).exists()
    assert_same_bits(whole, trained(tmp_path / "b", config()))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert not (tmp_path / "b" / STATE).exists()


def test_a_finished_run_is_loaded(tmp_path):
    whole = trained(tmp_path, config())
    before = (tmp_path / "metrics.jsonl").read_text()
    assert_same_bits(whole, trained(tmp_path, config()))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert_same_bits(whole, load_model(tmp_path).score)


def test_another_seed_trains_another_model(tmp_path):
    a = trained(tmp_path / "a", config())
    b = trained(tmp_path / "b", dataclasses.replace(config(), seed=6))
    assert not torch.equal(a.network.network.conv_in.weight, b.network.network.conv_in.weight)


def test_training_leaves_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    trained(tmp_path, config())
    assert torch.equal(torch.get_rng_state(), state)


def test_metrics_grids_and_events_are_written(tmp_path):
    trained(tmp_path, config())
    assert [line["images"] for line in metrics(tmp_path)] == [16, 32, 48, 64, 80, 96]
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["0000000096.png"]
    assert any(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())


def test_an_untrained_model_has_the_loss_of_its_reference_on_gaussian_data(tmp_path):
    """Held-out loss of the untrained model: the noise that a Gaussian leaves open."""
    generator = torch.Generator().manual_seed(0)
    pixels = 140 + 60 * torch.randn(4000, 1, 8, 8, generator=generator)
    gaussian = ArrayImages(pixels.round().clamp(0, 255).to(torch.uint8))
    settings = RunConfig.from_dict(
        {
            "network": {"options": {"channels": [8, 8]}},
            "training": {
                **CONFIG["training"],
                "images": 16,
                "learning_rate": 1e-12,
                "held_out": 4000,
                "t_min": 1e-3,
            },
            "sampling": CONFIG["sampling"],
        }
    )
    data = DataSet(gaussian, gaussian)
    model = make_model_of(settings, gaussian)
    trained(tmp_path, settings, data)
    measured = metrics(tmp_path)[-1]["held_out_loss"]
    t = torch.linspace(1e-3, 1, 20001, dtype=torch.float64)
    expected = torch.trapezoid(model.residual_variance(t), t) / (1 - 1e-3)
    # 4,000 images of 64 pixels, weighted so that each has the same expected share, relative
    # standard deviation √2 a pixel: five standard errors.
    assert measured == pytest.approx(float(expected), rel=5 * 2**0.5 / (4000 * 64) ** 0.5)


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_state(tmp_path):
    with pytest.raises(StopTrainingError):
        train(config(), DATA, InterruptedRun(tmp_path, config().to_dict()), device="cpu")
    before = (tmp_path / STATE).read_bytes()

    run = RunFolder(tmp_path, config().to_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cldsde.images.training.augment",
            lambda x, levels, **options: torch.full(x.shape, torch.nan),
        )
        with pytest.raises(FloatingPointError, match="learning_rate"):
            train(config(), DATA, run, device="cpu")
    assert (tmp_path / STATE).read_bytes() == before
    del run
    assert_same_bits(trained(tmp_path / "whole", config()), trained(tmp_path, config()))


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    calls = []

    def full(tensors, file, metadata):
        calls.append(file)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return save(tensors, file, metadata=metadata)

    from safetensors.torch import save_file as save

    monkeypatch.setattr("cldsde.images.files.save_file", full)
    with pytest.raises(OSError, match=r"64 images could not be saved.*No space left"):
        trained(tmp_path, config())
    assert load_tensors(tmp_path / STATE, "a training state of cldsde, version 1")[1]["step"] == "4"
    assert not list(tmp_path.glob(".partial-*"))
    monkeypatch.undo()
    assert_same_bits(trained(tmp_path / "whole", config()), trained(tmp_path, config()))


def test_a_damaged_state_is_refused_by_name(tmp_path):
    with pytest.raises(StopTrainingError):
        train(config(), DATA, InterruptedRun(tmp_path, config().to_dict()), device="cpu")
    whole = (tmp_path / STATE).read_bytes()
    for damaged in (whole[:-100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{STATE} is damaged"):
            trained(tmp_path, config())


def test_classes_are_learnt_and_some_are_hidden(tmp_path):
    values = {**CONFIG, "network": {**CONFIG["network"], "conditional": True}}
    settings = RunConfig.from_dict(values)
    model = trained(tmp_path, settings)
    assert load_model(tmp_path).space.classes == 3
    z, t = torch.zeros(1, 2, 1, 8, 8), torch.tensor([0.5])
    outputs = [model(z, t, condition=torch.tensor([label])) for label in (0, 3)]
    assert not torch.equal(*outputs)
    unlabelled = DataSet(ArrayImages(DATA.train.load(torch.arange(8))), DATA.held_out)
    with pytest.raises(ValueError, match="conditional"):
        trained(tmp_path / "b", settings, unlabelled)


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": "all"},
        {"weighting": "likelihood"},
        {"times": "uniform"},
        {"precision": "bf16"},
        {"clip": None, "weight_decay": 0.1},
    ],
)
def test_every_way_to_train_trains(tmp_path, changes):
    trained(tmp_path, config(**changes))
    assert all(line["loss"] > 0 for line in metrics(tmp_path))


def test_half_precision_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="precision"):
        trained(tmp_path, config(precision="fp16"))


def command(folder, *arguments, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        start += [*launcher, str(processes)]
    return [*start, "-m", "cldsde", *arguments]


def write_config(folder, **training):
    values = config(**training).to_dict()
    values["data"] = {"name": "digits", "options": {}, "flip": True, "dequantise": True}
    file = folder / "config.json"
    file.write_text(json.dumps(values))
    return file


def run_command(words: list[str]) -> None:
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_and_sample_as_one(tmp_path):
    file = write_config(tmp_path)
    for processes in (1, 2):
        out = str(tmp_path / str(processes))
        arguments = ("train", str(file), "--out", out, "--device", "cpu")
        run_command(command(tmp_path, *arguments, processes=processes))
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for first, second in zip(one, two, strict=True):
        # Sums of float32 in another order, over a dozen steps of Adam.
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["held_out_loss"] == pytest.approx(second["held_out_loss"], rel=1e-4)
    for processes in (1, 2):
        out = str(tmp_path / f"samples-{processes}")
        arguments = ("sample", str(tmp_path / "1"), "--seeds", "0-20", "--batch", "4")
        run_command(
            command(tmp_path, *arguments, "--out", out, "--device", "cpu", processes=processes)
        )
    first, second = (sorted((tmp_path / f"samples-{n}").iterdir()) for n in (1, 2))
    assert len(first) == 21
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]


@pytest.mark.slow
def test_twenty_killed_runs_resume_and_end_with_the_same_bits(tmp_path):
    file = write_config(tmp_path, images=1600, save_every=16, log_every=16, sample_every=160)
    out = tmp_path / "whole"
    run_command(command(tmp_path, "train", str(file), "--out", str(out), "--device", "cpu"))
    killed = tmp_path / "killed"
    words = command(tmp_path, "train", str(file), "--out", str(killed), "--device", "cpu")
    draw = random.Random(0)
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        state = killed / STATE
        began, before = time.monotonic(), state.stat().st_mtime_ns if state.exists() else 0
        while time.monotonic() - began < 60 and process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        kinds = {STATE: "a training state", MODEL: "an image model"}
        for name, kind in kinds.items():
            if (killed / name).exists():
                load_tensors(killed / name, f"{kind} of cldsde, version 1")
    assert kills == 20
    run_command(words)
    assert_same_bits(load_model(out).score, load_model(killed).score)
    assert metrics(out) == metrics(killed)
