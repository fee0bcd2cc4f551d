"""Training: reproducible, resumable to the bit, the same on any number of processes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cldsde.cli import main
from cldsde.images.config import RunConfig
from cldsde.images.data import ArrayImages, DataSet, augment
from cldsde.images.model import (
    MODEL,
    ImageSpace,
    data_statistics,
    load_model,
    make_model,
    make_network,
)
from cldsde.images.runs import RunFolder
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.streams import image_order, stream
from cldsde.images.tensor_files import load_tensors
from cldsde.images.train.engine import check_run
from cldsde.images.train.loop import STATE, train
from cldsde.images.train.state import KIND
from cldsde.score import PerturbedData, TimeSampler
from tiny_runs import NETWORK, noise_images

CONFIG = {
    "seed": 5,
    "data": {"flip": True, "dequantise": True},
    "network": {"options": {**NETWORK, "dropout": 0.1}},
    "training": {
        "images": 96,
        "batch": 16,
        "micro_batch": 8,
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
PLAIN = {"options": NETWORK}  # without dropout
DATA = DataSet(noise_images(classes=3), noise_images(16, 1, classes=3))


def config(*, network: dict | None = None, **training) -> RunConfig:
    values = {**CONFIG, "training": {**CONFIG["training"], **training}}
    return RunConfig.from_dict({**values, "network": network or CONFIG["network"]})


def trained(folder, settings: RunConfig | None = None, data: DataSet = DATA):
    settings = settings or config()
    return train(settings, data, RunFolder(folder, settings.to_dict()), device="cpu")


def metrics(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_bits(first, second):
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


class StopTrainingError(Exception):
    pass


class InterruptedRun(RunFolder):
    """A run that stops after its last state but one, and a step beyond."""

    def log(self, record):
        super().log(record)
        if record["images"] == 80:
            raise StopTrainingError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run and its model."""
    folder = tmp_path_factory.mktemp("loop") / "whole"
    state = torch.get_rng_state()
    model = trained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    return folder, model


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop") / "stopped"
    with pytest.raises(StopTrainingError):
        train(config(), DATA, InterruptedRun(folder, config().to_dict()), device="cpu")
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of a run that was interrupted."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def assert_finishes(folder, whole):
    """The run ends with the bits and numbers of the one that was never interrupted."""
    assert_same_bits(trained(folder), whole[1])
    assert metrics(folder) == metrics(whole[0])


def test_an_interrupted_run_ends_with_the_same_bits_numbers_and_events(stopped, whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert_finishes(stopped, whole)
    assert [line["images"] for line in metrics(stopped)] == [16, 32, 48, 64, 80, 96]
    assert [file.name for file in (stopped / "samples").iterdir()] == ["0000000096.png"]
    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    for name in ("loss", "seconds"):
        found = {one.step: one.value for one in events.Scalars(f"training/{name}")}
        lines = map(json.loads, (stopped / "metrics.jsonl").read_text().splitlines())
        # TensorBoard's are of single precision.
        assert found == pytest.approx({line["images"]: line[name] for line in lines}, rel=1e-6)


def test_a_finished_run_is_loaded(whole, tmp_path):
    before = (whole[0] / "metrics.jsonl").read_text()
    assert_same_bits(trained(whole[0]), whole[1])
    assert (whole[0] / "metrics.jsonl").read_text() == before
    assert_same_bits(load_model(whole[0]).model, whole[1])
    folder = shutil.copytree(whole[0], tmp_path / "run")
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-1])
    message = rf"{MODEL} is damaged .*delete it to have it made again$"
    with pytest.raises(ValueError, match=message):
        trained(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_the_command_resumes(tmp_path, monkeypatch, number, code):
    log, out = RunFolder.log, tmp_path / "run"
    values = {**config(save_every=96, held_out=8).to_dict(), "data": CONFIG["data"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    command = ["train", str(tmp_path / "config.json"), "--device", "cpu", "--out"]

    def signalled(run, record):
        log(run, record)
        if record["images"] == 48:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", signalled)
        try:
            found = main([*command, str(out)])
        except SystemExit as stop:
            found = stop.code
    assert found == code
    assert load_tensors(out / STATE, KIND)[1]["step"] == "3"
    for folder in (out, tmp_path / "whole"):
        assert main([*command, str(folder)]) == 0
    assert_same_bits(*(load_model(folder).model for folder in (out, tmp_path / "whole")))
    assert metrics(out) == metrics(tmp_path / "whole")


def test_settings_that_no_weight_depends_on_may_change_on_the_way(stopped, whole):
    training = {**CONFIG["training"], "log_every": 32, "save_every": 16, "sample_every": 48}
    sampling = {"solver": "sscs", "nfe": 4, "t_end": 1e-2}
    settings = RunConfig.from_dict({**CONFIG, "training": training, "sampling": sampling})
    run = RunFolder(stopped, settings.to_dict(), free=settings.FREE)
    assert_same_bits(whole[1], train(settings, DATA, run, device="cpu"))
    assert load_model(stopped).config == settings
    del run
    other = config(learning_rate=2e-3)
    with pytest.raises(ValueError, match=r"other settings \(training.learning_rate\)"):
        RunFolder(stopped, other.to_dict(), free=other.FREE)


def test_a_damaged_foreign_or_lost_state_is_rejected_by_name(stopped, whole):
    state = (stopped / STATE).read_bytes()
    for damaged in (state[:-100], b"", state[:-1] + bytes([state[-1] ^ 1])):
        (stopped / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{STATE} cannot be used"):
            trained(stopped)
    (stopped / STATE).write_bytes(state)
    with pytest.raises(ValueError, match="the data have changed"):
        trained(stopped, data=DataSet(noise_images(seed=2, classes=3), DATA.held_out))
    other = config(learning_rate=2e-3)
    values = (stopped / "config.json").read_text()
    (stopped / "config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(ValueError, match="written for other settings"):
        trained(stopped, other)
    (stopped / "config.json").write_text(values)
    model = (stopped / MODEL).read_bytes()
    (stopped / STATE).unlink()
    with pytest.raises(ValueError, match=rf"{STATE}, is missing"):
        trained(stopped)
    assert (stopped / MODEL).read_bytes() == model
    (stopped / STATE).write_bytes(state)
    assert_finishes(stopped, whole)


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_state(
    stopped, tmp_path, monkeypatch
):
    before = (stopped / STATE).read_bytes()
    feed = importlib.import_module("cldsde.images.train.feed")
    monkeypatch.setattr(feed, "augment", lambda x, *_, **__: torch.full(x.shape, torch.nan))
    with pytest.raises(FloatingPointError, match="learning_rate"):
        trained(stopped)
    assert (stopped / STATE).read_bytes() == before
    with pytest.raises(FloatingPointError, match="no state was saved before"):
        trained(tmp_path / "new")


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", [STATE, "metrics.jsonl", "samples/0000000096.png"])
def test_a_full_disk_is_reported_and_the_last_state_stays(stopped, whole, monkeypatch, name):
    def full(run, file, *rest):
        return (no_room if file == name else write)(run, file, *rest)

    write = RunFolder.write
    with monkeypatch.context() as patch:
        if name == STATE:
            patch.setattr("cldsde.images.tensor_files.save_file", no_room)
        elif name == "metrics.jsonl":
            patch.setattr(RunFolder, "log", no_room)
        else:
            patch.setattr(RunFolder, "write", full)
        with pytest.raises(OSError, match="No space left") as caught:
            trained(stopped)
    message = str(caught.value)
    if name == STATE:
        assert "not all of the state of 96 images could be saved" in message
    else:
        assert message.startswith(f"{stopped / name} cannot be written (No space left")
        assert message.endswith(f"the last state saved stays, {STATE}")
    del caught  # and with it the run, which is locked
    saved = "6" if name.endswith("png") else "4"  # the picture comes after the last state
    assert load_tensors(stopped / STATE, KIND)[1]["step"] == saved
    assert not list(stopped.glob(".partial-*"))
    assert_finishes(stopped, whole)


@pytest.mark.parametrize("broken", ["write", "flush"])
def test_events_that_find_no_room_end_the_training_with_its_state(
    stopped, whole, monkeypatch, broken
):
    from tensorboard.summary.writer.record_writer import RecordWriter

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, broken, no_room)
        # TensorBoard writes in a thread, whose traceback is printed.
        patch.setattr(threading, "excepthook", lambda *_: None)
        message = r"tensorboard cannot be written \(No space left on device\); the last state"
        with pytest.raises(OSError, match=message):
            assert_finishes(stopped, whole)
    assert load_tensors(stopped / STATE, KIND)


def test_an_untrained_model_has_the_loss_of_its_reference_on_gaussian_data(tmp_path):
    """Held-out loss of the untrained model: the noise that a Gaussian leaves open."""
    n, generator = 4000, torch.Generator().manual_seed(0)
    pixels = 140 + 60 * torch.randn(n, 1, 4, 4, generator=generator)
    gaussian = ArrayImages(pixels.round().clamp(0, 255).to(torch.uint8))
    short = {"images": 500, "batch": 500, "learning_rate": 1e-12, "held_out": n, "t_min": 1e-3}
    settings = config(network=PLAIN, **short, micro_batch=None)
    space = ImageSpace.of(gaussian, settings)
    model = make_model(settings, space, data_statistics(settings, gaussian))
    trained(tmp_path, settings, DataSet(gaussian, gaussian))
    t = torch.linspace(1e-3, 1, 20001, dtype=torch.float64)
    expected = torch.trapezoid(model.score.residual_variance(t), t) / (1 - 1e-3)
    # n images of 16 pixels, weighted so that each has the same expected share, relative standard
    # deviation √2 per pixel: five standard errors.
    tolerance = 5 * (2 / (16 * n)) ** 0.5
    assert metrics(tmp_path)[-1]["held_out_loss"] == pytest.approx(float(expected), rel=tolerance)


def test_three_steps_are_those_of_the_formulas(tmp_path):
    """Weighted loss, clipped gradient, learning rate, Adam and the average, one by one."""
    changes = {"clip": 0.02, "warmup": 40, "ema_decay": 0.3, "weight_decay": 0.1}
    settings = config(network=PLAIN, images=48, **changes)
    found = trained(tmp_path, settings)
    space = ImageSpace.of(DATA.train, settings)
    model = make_model(settings, space, data_statistics(settings, DATA.train))
    weights = list(model.parameters())
    average = [w.detach().clone() for w in weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    sampler = TimeSampler(model.score.residual_variance, settings.training.t_min)
    for step in range(3):
        t, weight = sampler.sample(16, generator=stream(5, "times", step))
        blocks = [
            augment(
                DATA.train.load(rows),
                256,
                flip=True,
                dequantise=True,
                generator=stream(5, "presentation", step, block),
            )
            for block, rows in enumerate(image_order(5, 64, 16 * step, 16).split(8))
        ]
        noise = [stream(5, "noise", step, block) for block in range(2)]
        pair = PerturbedData.draw(model.score.sde, torch.cat(blocks), t, generator=noise)
        error = model.score(pair.z, t, prediction="noise") - pair.target("noise")
        loss = (weight * error.square().flatten(1).mean(1)).mean()
        gradient = torch.autograd.grad(loss, weights)
        norm = float(torch.stack([g.norm() for g in gradient]).norm())
        assert norm > 0.02
        rate = 1e-3 * min(1, 16 * (step + 1) / 40) * (1 + math.cos(math.pi * step / 3)) / 2
        with torch.no_grad():
            for w, g, a, m, v in zip(weights, gradient, average, first, second, strict=True):
                m.lerp_(g * 0.02 / norm, 1 - 0.9)
                v.lerp_((g * 0.02 / norm).square(), 1 - 0.999)
                direction = m / (1 - 0.9 ** (step + 1))
                size = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                w.mul_(1 - 0.1 * rate).sub_(rate * direction / size)
                a.lerp_(w, 1 - min(0.3, (step + 1) / (step + 10)))
    # Adam's step does not know how small a gradient is: if one is all rounding, so is its step.
    start, expected, trained_to = (
        torch.cat([w.detach().flatten() for w in each])
        for each in (make_model(settings, space).parameters(), average, found.parameters())
    )
    assert float((trained_to - expected).norm()) < 1e-2 * float((expected - start).norm())


def test_a_seed_decides_and_the_environment_does_not(tmp_path, monkeypatch, whole):
    other = trained(tmp_path / "a", dataclasses.replace(config(), seed=6))
    weights = [model.score.network.network.conv_in.weight for model in (whole[1], other)]
    assert not torch.equal(*weights)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert_same_bits(whole[1], trained(tmp_path / "b"))


def test_a_smaller_micro_batch_accumulates_the_same_gradient(tmp_path):
    """Noise does not depend on it; without dropout only the order of sums does."""
    losses = []
    for micro in (None, 8):
        trained(tmp_path / str(micro), config(network=PLAIN, micro_batch=micro))
        losses.append([line["loss"] for line in metrics(tmp_path / str(micro))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_classes_are_learnt_and_some_are_hidden(tmp_path):
    settings = config(network={**CONFIG["network"], "conditional": True})
    model = trained(tmp_path, settings)
    assert load_model(tmp_path).space.classes == 3
    z = torch.randn(1, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    given, hidden = (
        model.score(z, 0.5, condition=torch.tensor([label]), prediction="noise") for label in (0, 3)
    )
    # Each embedding was trained: the class's own and the one that stands for no class. Single
    # precision has 1e-7.
    assert float((given - hidden).norm() / given.norm()) > 1e-5
    fresh = make_model(settings, load_model(tmp_path).space)
    before, after = (
        m.state_dict()["score.network.network.class_embedding.weight"] for m in (fresh, model)
    )
    assert ((before - after).abs().amax(1) > 1e-4).all()


def test_a_network_that_is_always_told_a_class_samples_no_image_of_none(tmp_path):
    network = {**CONFIG["network"], "conditional": True, "label_dropout": 0.0}
    trained(tmp_path, config(network=network, images=16))
    model = load_model(tmp_path)
    assert model.space.always_classes
    batches = ImageSampler.of(model, model.sampling, batch=2).batches(range(5))
    assert batches == [(0, [0, 3]), (1, [1, 4]), (2, [2])]


@pytest.mark.parametrize("name", ["CLD", "PSLD", "VPSDE"])
def test_a_network_that_is_shown_estimates_is_trained_and_loaded(tmp_path, name):
    values = config(images=16).to_dict()
    values |= {"process": {"name": name}, "score": {"inputs": "estimate"}}
    whole = trained(tmp_path, RunConfig.from_dict(values))
    loaded = load_model(tmp_path).score
    z = loaded.sde.prior.sample((2, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(z, 0.5), whole.score.eval()(z, 0.5))
    vp = RunConfig.from_dict({**CONFIG, "process": {"name": "VPSDE"}})
    sizes = {key: x.shape for key, x in loaded.network.state_dict().items()}
    expected = make_network(vp, (1, 4, 4), None).state_dict()
    assert sizes == {key: x.shape for key, x in expected.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": "all"},
        {"weighting": "likelihood"},
        {"weighting": "log_snr"},
        {"weighting": "log_snr", "times": "uniform", "log_snr_mean": 0.0, "log_snr_std": 2.0},
        {"times": "uniform"},
        {"precision": "bf16"},
        {"clip": None, "weight_decay": 0.1},
    ],
)
def test_every_option_of_training_trains(tmp_path, changes):
    trained(tmp_path, config(images=32, sample_every=32, **changes))
    assert all(line["loss"] > 0 for line in metrics(tmp_path))


@pytest.mark.parametrize(
    ("changes", "processes", "key"),
    [
        ({"batch": 16}, 3, "training.batch"),
        ({"batch": 8}, 2, "training.batch"),
        ({"batch": 32, "micro_batch": 12}, 1, "training.micro_batch"),
        ({"precision": "fp16"}, 1, "training.precision"),  # which needs a GPU
    ],
)
def test_settings_that_do_not_fit_the_machine_are_rejected(changes, processes, key):
    with pytest.raises(ValueError, match=rf"{key}\b"):
        check_run(config(**changes), DATA, device="cpu", processes=processes)


def test_a_rejected_training_does_not_disturb_the_next_one(tmp_path):
    conditional = config(
        network={**CONFIG["network"], "conditional": True}, precision="bf16", images=16
    )
    unlabelled = DataSet(noise_images(8), DATA.held_out)
    with pytest.raises(ValueError, match="the images have no classes"):
        trained(tmp_path / "a", conditional, unlabelled)
    trained(tmp_path / "b", conditional)
    trained(tmp_path / "c", config(images=16))


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_losses(tmp_path):
    losses = []
    for compiled in (False, True):
        trained(tmp_path / str(compiled), config(network=PLAIN, compile=compiled))
        losses.append([line["loss"] for line in metrics(tmp_path / str(compiled))])
    # Before the first update they differ by the rounding of float32. Adam's first updates are ±lr
    # even if a gradient is mere rounding: from then on losses differ by a share of lr, 1e-3.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def command(*arguments: object, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        start += [*launcher, str(processes)]
    return [*start, "-m", "cldsde", *map(str, arguments)]


def start_command(folder, words: list[str]) -> subprocess.Popen:
    # In the repository `python -m` would take the folder cldsde/ for the whole package.
    with (folder / "stderr.txt").open("w") as errors:
        return subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def run_command(folder, words: list[str]) -> None:
    code = start_command(folder, words).wait(timeout=300)
    assert code == 0, (folder / "stderr.txt").read_text()[-3000:]


def write_config(folder, **training):
    file = folder / "config.json"
    file.write_text(json.dumps({**config(**training).to_dict(), "data": CONFIG["data"]}))
    return file


@pytest.mark.slow
def test_two_processes_train_and_sample_as_one(tmp_path):
    file = write_config(tmp_path)
    for processes in (1, 2):
        arguments = ("train", file, "--out", tmp_path / str(processes))
        run_command(tmp_path, command(*arguments, processes=processes))
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for first, second in zip(one, two, strict=True):
        # Sums of float32 in another order, over a dozen steps of Adam.
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["held_out_loss"] == pytest.approx(second["held_out_loss"], rel=1e-4)
    for processes in (1, 2):
        arguments = ("sample", tmp_path / "1", "--seeds", "0-20", "--batch", "4")
        arguments += ("--out", tmp_path / f"samples-{processes}", "--device", "cpu")
        run_command(tmp_path, command(*arguments, processes=processes))
    first, second = (sorted((tmp_path / f"samples-{n}").iterdir()) for n in (1, 2))
    assert len(first) == 21
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]


@pytest.mark.slow
def test_twenty_killed_runs_resume_and_end_with_the_same_bits(tmp_path):
    file = write_config(tmp_path, images=1600, save_every=16, log_every=16, sample_every=160)
    out, killed = tmp_path / "whole", tmp_path / "killed"
    run_command(tmp_path, command("train", file, "--out", out, "--device", "cpu"))
    words = command("train", file, "--out", killed, "--device", "cpu")
    draw, state = random.Random(0), killed / STATE
    for _ in range(20):
        process = start_command(tmp_path, words)
        began, before = time.monotonic(), state.stat().st_mtime_ns if state.exists() else 0
        while time.monotonic() - began < 60 and process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if state.exists():
            load_tensors(state, KIND)
        if (killed / MODEL).exists():
            load_model(killed)
    run_command(tmp_path, words)
    assert_same_bits(load_model(out).model, load_model(killed).model)
    assert metrics(out) == metrics(killed)
