"""Training: reproducible, resumable to the bit, the same on any number of processes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from cldsde.images.config import RunConfig, load_config
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
from cldsde.images.sample.sampler import class_batches
from cldsde.images.streams import image_order, stream
from cldsde.images.tensor_files import load_tensors
from cldsde.images.train.engine import check_run
from cldsde.images.train.loop import STATE, train
from cldsde.images.train.state import KIND, Meter, TrainingState
from cldsde.score import PerturbedData, TimeSampler

CONFIG = {
    "seed": 5,
    "data": {"flip": True, "dequantise": True},
    "network": {"options": {"channels": [16, 16], "dropout": 0.1}},
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


@pytest.mark.parametrize("name", ["CLD", "PSLD", "VPSDE"])
def test_a_network_that_is_shown_estimates_is_trained_and_loaded(tmp_path, name):
    values = {**CONFIG, "process": {"name": name}, "score": {"inputs": "estimate"}}
    settings = RunConfig.from_dict(values)
    whole = trained(tmp_path, settings)
    loaded = load_model(tmp_path).score
    z = loaded.sde.prior.sample((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(z, 0.5), whole.score.eval()(z, 0.5))
    vp = make_network(
        RunConfig.from_dict({**CONFIG, "process": {"name": "VPSDE"}}), (1, 8, 8), None
    )
    sizes = {key: value.shape for key, value in loaded.network.state_dict().items()}
    assert sizes == {key: value.shape for key, value in vp.state_dict().items()}


def test_what_no_weight_depends_on_may_change_on_the_way(tmp_path):
    whole = trained(tmp_path / "a", config())
    with pytest.raises(StopTrainingError):
        train(config(), DATA, InterruptedRun(tmp_path / "b", config().to_dict()), device="cpu")
    training = {**CONFIG["training"], "log_every": 32, "save_every": 16, "sample_every": 48}
    sampling = {"solver": "sscs", "nfe": 4, "t_end": 1e-2}
    settings = RunConfig.from_dict({**CONFIG, "training": training, "sampling": sampling})
    run = RunFolder(tmp_path / "b", settings.to_dict(), free=settings.FREE)
    assert_same_bits(whole, train(settings, DATA, run, device="cpu"))
    assert load_model(tmp_path / "b").config == settings
    other = config(learning_rate=2e-3)
    with pytest.raises(ValueError, match=r"other settings \(training.learning_rate\)"):
        RunFolder(tmp_path / "b", other.to_dict(), free=other.FREE)


def test_a_finished_run_is_loaded(tmp_path):
    whole = trained(tmp_path, config())
    before = (tmp_path / "metrics.jsonl").read_text()
    assert_same_bits(whole, trained(tmp_path, config()))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert_same_bits(whole, load_model(tmp_path).model)


def test_a_damaged_model_of_a_finished_run_is_told_with_what_it_takes_to_have_it_again(tmp_path):
    trained(tmp_path, config())
    whole = (tmp_path / MODEL).read_bytes()
    (tmp_path / MODEL).write_bytes(whole[:-1])
    words = rf"{MODEL} is damaged .*delete it to have it made again$"
    with pytest.raises(ValueError, match=words):
        trained(tmp_path, config())


def test_another_seed_trains_another_model(tmp_path):
    a = trained(tmp_path / "a", config())
    b = trained(tmp_path / "b", dataclasses.replace(config(), seed=6))
    assert not torch.equal(*(m.score.network.network.conv_in.weight for m in (a, b)))


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
            "network": {"options": {"channels": [16, 16]}},
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
    space = ImageSpace.of(gaussian, settings)
    model = make_model(settings, space, data_statistics(settings, gaussian))
    trained(tmp_path, settings, data)
    measured = metrics(tmp_path)[-1]["held_out_loss"]
    t = torch.linspace(1e-3, 1, 20001, dtype=torch.float64)
    expected = torch.trapezoid(model.score.residual_variance(t), t) / (1 - 1e-3)
    # 4,000 images of 64 pixels, weighted so that each has the same expected share, relative
    # standard deviation √2 a pixel: five standard errors.
    assert measured == pytest.approx(float(expected), rel=5 * 2**0.5 / (4000 * 64) ** 0.5)


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_state(tmp_path):
    interrupted(tmp_path, config())
    before = (tmp_path / STATE).read_bytes()

    run = RunFolder(tmp_path, config().to_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.import_module("cldsde.images.train.feed"),
            "augment",
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

    monkeypatch.setattr("cldsde.images.tensor_files.save_file", full)
    with pytest.raises(OSError, match=r"64 images could be saved.*No space left"):
        trained(tmp_path, config())
    assert load_tensors(tmp_path / STATE, KIND)[1]["step"] == "2"
    assert not list(tmp_path.glob(".partial-*"))
    monkeypatch.undo()
    assert_same_bits(trained(tmp_path / "whole", config()), trained(tmp_path, config()))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples/0000000048.png"])
def test_a_full_disk_is_said_with_the_file_of_the_run_that_found_no_room(
    tmp_path, monkeypatch, name
):
    log, write = RunFolder.log, RunFolder.write
    monkeypatch.setattr(
        RunFolder, "log", lambda run, record: full_at(name, run, log, "metrics.jsonl", record)
    )
    monkeypatch.setattr(RunFolder, "write", lambda run, *rest: full_at(name, run, write, *rest))
    settings = config(sample_every=48)
    with pytest.raises(OSError, match=r"cannot be written \(No space left") as caught:
        trained(tmp_path, settings)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name} ")
    assert message.endswith(f"the last state saved stays, {STATE}")
    del caught  # and with it the run, which is locked
    monkeypatch.undo()
    assert_same_bits(trained(tmp_path / "whole", settings), trained(tmp_path, settings))


def full_at(full, run, writer, name, *rest):
    """Write a file of a run, but for one after the first state."""
    if name == full and (run / STATE).exists():
        raise OSError(28, "No space left on device")
    return writer(run, *rest) if writer.__name__ == "log" else writer(run, name, *rest)


@pytest.mark.parametrize("broken", ["write", "flush"])
def test_events_that_find_no_room_end_the_training_with_their_folder(tmp_path, monkeypatch, broken):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, broken, full)
    # TensorBoard writes in a thread, whose traceback is printed.
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    with pytest.raises(OSError, match=r"tensorboard cannot be written \(No space left"):
        trained(tmp_path, config())


def test_events_are_those_of_the_metrics_also_of_a_run_that_was_interrupted(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(tmp_path, config())
    trained(tmp_path, config())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "seconds"):
        found = {one.step: one.value for one in events.Scalars(f"training/{name}")}
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        # TensorBoard's are of single precision.
        assert found == pytest.approx({line["images"]: line[name] for line in lines}, rel=1e-6)


def test_a_damaged_state_is_refused_by_name(tmp_path):
    interrupted(tmp_path, config())
    whole = (tmp_path / STATE).read_bytes()
    for damaged in (whole[:-100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{STATE} cannot be used"):
            trained(tmp_path, config())


def test_classes_are_learnt_and_some_are_hidden(tmp_path):
    values = {**CONFIG, "network": {**CONFIG["network"], "conditional": True}}
    settings = RunConfig.from_dict(values)
    model = trained(tmp_path, settings)
    assert load_model(tmp_path).space.classes == 3
    z = torch.randn(1, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given, hidden = (
        model.score(z, 0.5, condition=torch.tensor([label]), prediction="noise") for label in (0, 3)
    )
    # Each embedding was trained: the class's own and the one that stands for no class.
    assert float((given - hidden).norm() / given.norm()) > 1e-4
    fresh = make_model(settings, load_model(tmp_path).space)
    before, after = (
        m.state_dict()["score.network.network.class_embedding.weight"] for m in (fresh, model)
    )
    assert ((before - after).abs().amax(1) > 1e-4).all()


def test_a_network_that_is_always_told_of_a_class_draws_no_image_of_none(tmp_path):
    network = {**CONFIG["network"], "conditional": True, "label_dropout": 0.0}
    settings = RunConfig.from_dict({**CONFIG, "network": network})
    trained(tmp_path, settings)
    space = load_model(tmp_path).space
    assert space.always_classes
    assert class_batches(space, range(5), 2) == [(0, [0, 3]), (1, [1, 4]), (2, [2])]


def test_metrics_of_a_resumed_run_are_those_of_a_whole_one(tmp_path):
    """Where states are saved between two lines of metrics, too."""
    settings = config(save_every=32, log_every=48)
    whole = trained(tmp_path / "a", settings)
    with pytest.MonkeyPatch.context() as patch:
        save = TrainingState.save

        def stop(self, run, step, seconds, sums):
            save(self, run, step, seconds, sums)
            if step == 4:
                raise StopTrainingError

        patch.setattr(TrainingState, "save", stop)
        with pytest.raises(StopTrainingError):
            trained(tmp_path / "b", settings)
    assert_same_bits(whole, trained(tmp_path / "b", settings))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def interrupted(folder, settings: RunConfig, data: DataSet = DATA):
    with pytest.raises(StopTrainingError):
        train(settings, data, InterruptedRun(folder, settings.to_dict()), device="cpu")


def test_a_state_of_other_settings_or_other_data_is_refused(tmp_path):
    interrupted(tmp_path / "a", config())
    interrupted(tmp_path / "b", config(learning_rate=2e-3))
    (tmp_path / "b" / STATE).write_bytes((tmp_path / "a" / STATE).read_bytes())
    with pytest.raises(ValueError, match="written for other settings"):
        trained(tmp_path / "b", config(learning_rate=2e-3))
    with pytest.raises(ValueError, match="the data have changed"):
        trained(tmp_path / "a", config(), DataSet(images(2), images(1, 16)))
    assert (tmp_path / "a" / STATE).exists()


def test_a_run_whose_state_is_lost_does_not_begin_again(tmp_path):
    interrupted(tmp_path, config())
    model = (tmp_path / MODEL).read_bytes()
    (tmp_path / STATE).unlink()
    with pytest.raises(ValueError, match=rf"{STATE}, is missing"):
        trained(tmp_path, config())
    assert (tmp_path / MODEL).read_bytes() == model


def test_three_steps_are_those_of_the_formulas(tmp_path):
    """Weighted loss, clipped gradient, learning rate, Adam and the average, one by one."""
    values = config(
        images=48, clip=0.02, warmup=40, decay="cosine", ema_decay=0.3, weight_decay=0.1
    ).to_dict()
    values["network"] = {"options": {"channels": [16, 16]}}
    settings = RunConfig.from_dict(values)
    found = trained(tmp_path, settings)
    space = ImageSpace.of(DATA.train, settings)
    model = make_model(settings, space, data_statistics(settings, DATA.train))
    weights = list(model.parameters())
    average = [w.detach().clone() for w in weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    sampler = TimeSampler(model.score.residual_variance, settings.training.t_min)
    for step in range(3):
        t, weight = sampler.sample(16, generator=stream(5, "times", step))
        rows = image_order(5, 64, 16 * step, 16).split(8)
        x = torch.cat(
            [
                augment(
                    DATA.train.load(some),
                    256,
                    flip=True,
                    dequantise=True,
                    generator=stream(5, "presentation", step, block),
                )
                for block, some in enumerate(rows)
            ]
        )
        noise = [stream(5, "noise", step, block) for block in range(2)]
        pair = PerturbedData.draw(model.score.sde, x, t, generator=noise)
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
    # Adam's step does not know how small a gradient is: where one is all rounding, so is its step.
    start, expected, trained_to = (
        torch.cat([w.detach().flatten() for w in each])
        for each in (make_model(settings, space).parameters(), average, found.parameters())
    )
    assert float((trained_to - expected).norm()) < 1e-2 * float((expected - start).norm())


def test_the_environment_does_not_change_a_training(tmp_path, monkeypatch):
    whole = trained(tmp_path / "a", config())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert_same_bits(whole, trained(tmp_path / "b", config()))


def test_losses_of_several_processes_are_taken_up_together():
    """A state is written by one process, and read by all of them."""
    meters: list[Meter] = []

    class Engine:
        device = torch.device("cpu")

        def reduce(self, x, how):
            assert how == "mean"
            return torch.stack([meter.sums for meter in meters]).mean(0)

    def add(*losses):
        for meter, loss in zip(meters, losses, strict=True):
            meter.add(*[{"score": torch.tensor(loss), "autoencoder": torch.tensor(0.0)}] * 2)

    meters += [Meter(Engine(), ["score", "autoencoder"]) for _ in range(2)]
    add(1.0, 3.0)
    before, saved = meters[0].means(), meters[0].shared()
    for meter in meters:
        meter.sums.copy_(saved)
    assert meters[1].means() == before
    assert (before["loss"], before["score_gradient_norm"]) == (2.0, 2.0)
    add(4.0, 8.0)
    found = meters[0].means()
    assert (found["loss"], found["score_gradient_norm"]) == (4.0, 4.0)
    assert found["autoencoder_loss"] == 0.0


def test_what_was_never_saved_is_not_said_to_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("cldsde.images.train.feed"),
        "augment",
        lambda x, levels, **options: torch.full(x.shape, torch.nan),
    )
    with pytest.raises(FloatingPointError, match="no state was saved before"):
        trained(tmp_path, config())


def test_a_smaller_micro_batch_accumulates_the_same_gradient(tmp_path):
    """Noise does not depend on it; without dropout only the order of sums does."""
    values = {**config().to_dict(), "network": {"options": {"channels": [16, 16]}}}
    losses = []
    for micro in (None, 8):
        values["training"]["micro_batch"] = micro
        trained(tmp_path / str(micro), RunConfig.from_dict(values))
        losses.append([line["loss"] for line in metrics(tmp_path / str(micro))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "processes", "key"),
    [
        ({"batch": 16}, 3, "training.batch"),
        ({"batch": 8}, 2, "training.batch"),
        ({"batch": 32, "micro_batch": 12}, 1, "training.micro_batch"),
        ({"precision": "fp16"}, 1, "training.precision"),
    ],
)
def test_what_does_not_fit_the_machine_is_refused(changes, processes, key):
    with pytest.raises(ValueError, match=rf"{key}\b"):
        check_run(config(**changes), DATA, device="cpu", processes=processes)


def test_a_refused_training_leaves_the_next_one_alone(tmp_path):
    values = config(precision="bf16").to_dict()
    values["network"] = {**values["network"], "conditional": True}
    conditional = RunConfig.from_dict(values)
    with pytest.raises(ValueError, match="the images have no classes"):
        trained(tmp_path / "a", conditional, unlabelled())
    trained(tmp_path / "b", conditional)
    trained(tmp_path / "c", config())


def unlabelled() -> DataSet:
    return DataSet(ArrayImages(DATA.train.load(torch.arange(8))), DATA.held_out)


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
def test_every_way_to_train_trains(tmp_path, changes):
    trained(tmp_path, config(**changes))
    assert all(line["loss"] > 0 for line in metrics(tmp_path))


def test_half_precision_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="precision"):
        trained(tmp_path, config(precision="fp16"))


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_losses(tmp_path):
    losses = []
    for compiled in (False, True):
        values = config(compile=compiled).to_dict()
        values["network"] = {"options": {"channels": [16, 16]}}  # masks of dropout differ
        trained(tmp_path / str(compiled), RunConfig.from_dict(values))
        losses.append([line["loss"] for line in metrics(tmp_path / str(compiled))])
    # Before the first update they differ by the rounding of float32. Adam's first updates are ±lr
    # even where a gradient is mere rounding: from then on losses differ by a share of lr, 1e-3.
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
    values = config(**training).to_dict()
    values["data"] = {"name": "digits", "options": {}, "flip": True, "dequantise": True}
    file = folder / "config.json"
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_the_run_goes_on_to_the_same_bits(tmp_path, number, code):
    file = write_config(tmp_path, images=1600, save_every=1600, log_every=160, sample_every=1600)
    out = tmp_path / "run"
    words = command("train", file, "--out", out, "--device", "cpu")
    process = start_command(tmp_path, words)
    began = time.monotonic()
    while not (out / "metrics.jsonl").exists() and time.monotonic() - began < 120:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == code, (tmp_path / "stderr.txt").read_text()[-3000:]
    assert (out / STATE).exists()
    settings = load_config(file)
    data = settings.data.load()
    resumed = train(settings, data, RunFolder(out, settings.to_dict()), device="cpu")
    whole = trained(tmp_path / "whole", settings, data)
    assert_same_bits(whole, resumed)
    assert metrics(tmp_path / "whole") == metrics(out)


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
    out = tmp_path / "whole"
    run_command(tmp_path, command("train", file, "--out", out, "--device", "cpu"))
    killed = tmp_path / "killed"
    words = command("train", file, "--out", killed, "--device", "cpu")
    draw = random.Random(0)
    kills = 0
    while kills < 20:
        process = start_command(tmp_path, words)
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
        if (killed / STATE).exists():
            load_tensors(killed / STATE, KIND)
        if (killed / MODEL).exists():
            load_model(killed)
    assert kills == 20
    run_command(tmp_path, words)
    assert_same_bits(load_model(out).model, load_model(killed).model)
    assert metrics(out) == metrics(killed)
