"""Training: reproducible, resumable to the bit, the same on any number of processes."""

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
from torch import nn

from cldsde.cli import main
from cldsde.errors import SettingError
from cldsde.images import model as models
from cldsde.images.config import RunConfig
from cldsde.images.data import ArrayImages, DataSet, augment
from cldsde.images.evaluate.results import read_results
from cldsde.images.model import MODEL, STATE_KIND, ImageSpace, load_model
from cldsde.images.power_averages import WIDTHS
from cldsde.images.runs import METRICS, STATE, RunFolder
from cldsde.images.streams import image_order, stream
from cldsde.images.tensor_files import load_tensors
from cldsde.images.train import learner
from cldsde.images.train.engine import check_run
from cldsde.images.train.learner import learning_rates
from cldsde.score import PerturbedData, TimeSampler
from probes import generator
from tiny_runs import NETWORK, SHORT, noise_images
from tolerances import EPS32, standard_error
from trainings import DATA, assert_same_bits, configured, interrupt, metrics, trained

BOTH = {"flip": True, "dequantise": True}
CONFIG = {
    "seed": 5,
    "data": BOTH,
    "network": {"options": {**NETWORK, "dropout": 0.1}},
    "training": {**SHORT, "images": 64, "micro_batch": 16, "sample_every": 64}
    | {"learning_rate": 1e-3, "warmup": 16, "decay": "cosine"}
    | {"trackers": ["tensorboard"], "ema_decays": [0.0], "power_averages": True},
    "sampling": {"solver": "euler-maruyama", "nfe": 3},
}
SUMS = 1e-5  # relative, of losses that sum 4,000 numbers of single precision in another order
# Adam's step does not know how small a gradient is: if one is all rounding, so is its step. A share
# of this size of the weights has such gradients.
ROUNDED_STEPS = 1e-2
CONDITIONAL = {"conditional": True}
ONE_STEP = {"images": 16, "trackers": [], "ema_decays": [], "power_averages": False}


def config(*, network: dict | None = None, **training) -> RunConfig:
    return configured(CONFIG, network=network or {}, training=training)


def plain(**training) -> RunConfig:
    return config(network={"options": NETWORK}, **training)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run and its model."""
    folder = tmp_path_factory.mktemp("loop") / "whole"
    state = torch.get_rng_state()
    model = trained(folder, config())
    assert torch.equal(torch.get_rng_state(), state)
    return folder, model


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """A run that stopped after its last state but one, and a step beyond."""
    folder = tmp_path_factory.mktemp("loop") / "stopped"
    interrupt(folder, config(), 48)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of a run that was interrupted."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def assert_finishes(folder, whole):
    assert_same_bits(trained(folder, config()), whole[1])
    assert metrics(folder) == metrics(whole[0])


def test_an_interrupted_run_ends_with_the_same_bits_images_numbers_and_events(
    stopped, whole, defaults
):
    """Also if it is resumed with another default device."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    torch.set_default_device("meta")
    with (stopped / METRICS).open("a") as file:
        file.write('{"images": 4')  # cut off
    assert_finishes(stopped, whole)
    assert [line["images"] for line in metrics(stopped)] == [16, 32, 48, 64]
    files = [f"snapshots/power-{width}-000000000064.safetensors" for width in WIDTHS]
    for name in ("samples/0000000064.png", *files):
        assert (stopped / name).read_bytes() == (whole[0] / name).read_bytes()
    # An average without memory has the weights of the last step.
    torch.set_default_device(None)
    raw, average = (load_model(stopped / name) for name in (STATE, "ema-0.0.safetensors"))
    assert_same_bits(raw.model, average.model)
    assert average.digest != load_model(stopped).digest
    events = EventAccumulator(str(stopped / "cldsde"))
    events.Reload()
    for name in ("loss", "seconds"):
        found = {one.step: one.value for one in events.Scalars(f"training/{name}")}
        lines = map(json.loads, (stopped / METRICS).read_text().splitlines())
        single = pytest.approx({line["images"]: line[name] for line in lines}, rel=EPS32, abs=0)
        assert found == single


def test_a_finished_run_is_loaded_and_its_model_made_again_from_its_state(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    content = (folder / MODEL).read_bytes()
    assert_finishes(folder, whole)
    assert_same_bits(load_model(folder).model, whole[1])
    (folder / MODEL).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{MODEL} is damaged .*delete it, to repeat the train"):
        trained(folder, config())
    (folder / MODEL).unlink()
    trained(folder, config())
    assert (folder / MODEL).read_bytes() == content


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        *((1, MODEL), (2, STATE)),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, STATE), (2, MODEL))),
    ],
)
def test_a_kill_between_two_files_of_a_checkpoint_leaves_a_run_that_resumes(
    whole, tmp_path, monkeypatch, checkpoint, name
):
    folder, replace, written = tmp_path / "run", Path.replace, []

    def killed(source, target):
        replace(source, target)
        written.append(target.name)
        if written.count(name) == checkpoint:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, config())
    assert_finishes(folder, whole)
    assert (folder / MODEL).read_bytes() == (whole[0] / MODEL).read_bytes()


def write_config(folder, **training):
    """A configuration of digits."""
    file = folder / "config.json"
    settings = config(**{"micro_batch": 8, **training})
    file.write_text(json.dumps({**settings.to_dict(), "data": BOTH}))
    return file


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_the_state_and_the_command_resumes(
    tmp_path, monkeypatch, capsys, number, code
):
    log, out, whole = RunFolder.log, tmp_path / "run", tmp_path / "whole"
    file = write_config(tmp_path, save_every=64, held_out=8)
    command = ["train", str(file), "--device", "cpu", "--out"]

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
    assert "stopping after this step; again to stop at once" in capsys.readouterr().err
    assert load_tensors(out / STATE, STATE_KIND)[1]["step"] == "3"
    assert [main([*command, str(folder)]) for folder in (out, whole)] == [0, 0]
    assert_same_bits(load_model(out).model, load_model(whole).model)
    assert metrics(out) == metrics(whole)


def test_settings_that_no_weight_depends_on_may_change_on_the_way(stopped, whole):
    training = {**CONFIG["training"], "log_every": 32, "save_every": 16, "sample_every": 48}
    sampling = {"solver": "sscs", "nfe": 4, "t_end": 1e-2}
    settings = RunConfig.from_dict({**CONFIG, "training": training, "sampling": sampling})
    assert_same_bits(whole[1], trained(stopped, settings))
    assert load_model(stopped).config == settings
    with pytest.raises(ValueError, match=r"other settings \(training.learning_rate\)"):
        trained(stopped, config(learning_rate=2e-3))


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_damaged_foreign_or_lost_state_is_rejected_by_name(stopped):
    before = contents(stopped)

    def assert_rejected(message, settings=None, data=DATA):
        with pytest.raises(ValueError, match=message):
            trained(stopped, settings or config(), data)

    state, values = ((stopped / x).read_bytes() for x in (STATE, "config.json"))
    for damaged in (state[:-100], b"", state[:-1] + bytes([state[-1] ^ 1])):
        (stopped / STATE).write_bytes(damaged)
        assert_rejected(rf"{STATE} cannot be used")
    (stopped / STATE).write_bytes(state)
    assert_rejected("have changed", data=DATA._replace(train=noise_images(seed=2, classes=3)))
    faster = config(learning_rate=2e-3)
    (stopped / "config.json").write_text(json.dumps(faster.to_dict()))
    assert_rejected("written for other settings", faster)
    (stopped / "config.json").write_bytes(values)
    (stopped / STATE).unlink()
    assert_rejected(rf"{STATE}, is missing")
    (stopped / STATE).write_bytes(state)
    assert contents(stopped) == before
    (stopped / METRICS).write_bytes(b"\xff\xfe\x00")
    assert_rejected(r"metrics\.jsonl is damaged .*delete it")


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_state(
    stopped, tmp_path, monkeypatch
):
    before = (stopped / STATE).read_bytes()
    monkeypatch.setattr(learner, "augment", lambda x, *_, **__: torch.full(x.shape, torch.nan))
    for folder, message in ((stopped, "learning_rate"), (tmp_path / "new", "no state was saved")):
        with pytest.raises(FloatingPointError, match=message):
            trained(folder, config())
    assert (stopped / STATE).read_bytes() == before


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("function", "message", "saved"),
    [
        ("cldsde.images.tensor_files.save_file", "not all of the state of 64 images could", "2"),
        ("cldsde.images.train.loop.save_grid", "0000000064.png cannot be written", "4"),
        ("tensorboard.summary.writer.record_writer.RecordWriter.write", "cldsde cannot", "2"),
    ],
)
def test_a_full_disk_is_reported_and_the_last_state_stays(
    stopped, whole, monkeypatch, capfd, function, message, saved
):
    with monkeypatch.context() as patch:
        patch.setattr(function, no_room)
        # pytest has a hook of its own, TensorBoard writes in a thread.
        patch.setattr(threading, "excepthook", threading.__excepthook__)
        expected = rf"{message}.*No space left.*; the last state saved stays, {STATE}$"
        with pytest.raises(OSError, match=expected):
            trained(stopped, config())
    assert load_tensors(stopped / STATE, STATE_KIND)[1]["step"] == saved
    assert "Traceback" not in capfd.readouterr().err
    assert not list(stopped.glob(".partial-*"))
    assert_finishes(stopped, whole)


def test_a_longer_cosine_is_noted_and_a_shorter_training_rejected(stopped, capsys):
    trained(stopped, config(images=80))
    assert "the learning rate jumps, as its cosine now ends at training.images = 80" in (
        capsys.readouterr().err
    )
    with pytest.raises(SettingError, match=r"training\.images: can grow, but not shrink.* got 16"):
        trained(stopped, config(images=16))


def test_data_without_variance_are_rejected():
    black = ArrayImages(torch.zeros(64, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(SettingError, match="data: all pixels of all training images have the same"):
        check_run(configured(CONFIG, data={"dequantise": False}), DataSet(black, None))


def test_an_untrained_model_has_the_loss_of_its_reference_on_gaussian_data(tmp_path):
    """Held-out loss of the untrained model: the noise that a Gaussian leaves open."""
    n = 4000
    pixels = 140 + 60 * torch.randn(n, 1, 4, 4, generator=generator())
    gaussian = ArrayImages(pixels.round().clamp(0, 255).to(torch.uint8))
    short = {"images": 500, "batch": 500, "learning_rate": 1e-12, "held_out": n, "t_min": 1e-3}
    model = trained(tmp_path, plain(**short, micro_batch=None), DataSet(gaussian, gaussian))
    t = torch.linspace(1e-3, 1, 20001, dtype=torch.float64)
    expected = torch.trapezoid(model.score.residual_variance(t), t) / (1 - 1e-3)
    # n images of 16 pixels, weighted so that each has the same expected share, relative standard
    # deviation √2 per pixel.
    tolerance = standard_error(2**0.5, 16 * n)
    found = metrics(tmp_path)[-1]["held_out_loss"]
    assert found == pytest.approx(float(expected), rel=tolerance, abs=0)


def test_three_steps_are_those_of_the_formulas(tmp_path):
    """Weighted loss, clipped gradient, learning rate and the average, one by one.

    Noise does not depend on the micro-batch.
    """
    changes = {"clip": 0.02, "warmup": 40, "ema_decay": 0.3, "weight_decay": 0.1}
    settings = plain(images=48, micro_batch=8, **changes)
    found = trained(tmp_path, settings)
    space = ImageSpace.of(DATA.train, settings)
    model = models.make_model(settings, space, models.data_statistics(settings, DATA.train))
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    weights = list(model.parameters())
    average = [w.detach().clone() for w in weights]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.1)
    sampler = TimeSampler(model.score.residual_variance, settings.training.t_min)
    for step in range(3):
        t, weight = sampler.sample(16, generator=stream(5, "times", step))
        blocks, noise = [], [stream(5, "noise", step, block) for block in range(2)]
        for block, rows in enumerate(image_order(5, 64, 16 * step, 16).split(8)):
            source = stream(5, "presentation", step, block)
            blocks.append(augment(DATA.train.load(rows), 256, **BOTH, generator=source))
        pair = PerturbedData.draw(model.score.sde, torch.cat(blocks), t, generator=noise)
        error = model.score(pair.z, t, prediction="noise") - pair.target("noise")
        loss = (weight * error.square().flatten(1).mean(1)).mean()
        logged = metrics(tmp_path)[step]["loss"]
        assert logged == pytest.approx(float(loss.detach()), rel=SUMS, abs=0)
        optimiser.zero_grad()
        loss.backward()
        norm = float(torch.stack([w.grad.norm() for w in weights]).norm())
        assert norm > 0.02
        for w in weights:
            w.grad *= 0.02 / norm
        rate = 1e-3 * min(1, 16 * (step + 1) / 40) * (1 + math.cos(math.pi * step / 3)) / 2
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        for w, a in zip(weights, average, strict=True):
            a.lerp_(w.detach(), 1 - min(0.3, (step + 1) / (step + 10)))
    expected, trained_to = (
        nn.utils.parameters_to_vector(each).detach() for each in (average, found.parameters())
    )
    assert float((trained_to - expected).norm()) < ROUNDED_STEPS * float((expected - start).norm())


def test_classes_are_learnt_and_some_are_hidden(tmp_path):
    settings = config(network=CONDITIONAL)
    model = trained(tmp_path, settings)
    space = load_model(tmp_path).space
    assert space.classes == 3
    always = config(network={**CONDITIONAL, "label_dropout": 0.0})
    assert ImageSpace.of(DATA.train, always).always_classes
    # Training has changed the embedding of every class, and the embedding of no class.
    before, after = (
        m.state_dict()["score.network.network.class_embedding.weight"]
        for m in (models.make_model(settings, space), model)
    )
    rate = CONFIG["training"]["learning_rate"]  # a step of Adam, of which the average keeps a part
    assert ((before - after).abs().amax(1) > rate / 10).all()


def test_a_network_that_is_shown_estimates_is_trained_and_loaded(tmp_path):
    model = trained(tmp_path, configured(CONFIG, score={"inputs": "estimate"}, training=ONE_STEP))
    loaded = load_model(tmp_path).score
    z = loaded.sde.prior.sample((2, 1, 4, 4), generator=generator(1))
    assert torch.equal(loaded(z, 0.5), model.score.eval()(z, 0.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": "all", "times": "uniform"},
        {"weighting": "likelihood", "precision": "bf16"},
        {"weighting": "kappa", "times": "uniform", "clip": None},
        {"optimiser": "RAdam", "optimiser_options": {"betas": [0.8, 0.9]}},
    ],
)
def test_every_option_of_training_trains(tmp_path, changes):
    model = trained(tmp_path, config(**ONE_STEP, **changes))
    assert all(line["loss"] > 0 for line in metrics(tmp_path))
    assert all(bool(x.isfinite().all()) for x in model.state_dict().values())


FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize(
    ("sections", "processes", "variables", "message"),
    [
        ({"training": {"batch": 16}}, 3, {}, r"training\.batch\b"),
        ({"training": {"batch": 32, "micro_batch": 12}}, 1, {}, r"training\.micro_batch\b"),
        ({"training": {"precision": "fp16"}}, 1, {}, r"training\.precision: 'fp16' needs a GPU"),
        ({"score": {"mixing": -3.0}}, 2, FSDP, r"score\.mixing: .*not supported with FSDP"),
        ({"training": {"optimiser": "Adafactor"}}, 2, FSDP, r"training\.optimiser: 'Adafactor' is"),
        ({}, 2, {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "unset FSDP_ACTIVATION_CHECK"),
    ],
)
def test_settings_that_do_not_fit_the_machine_are_rejected(
    monkeypatch, sections, processes, variables, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=message):
        check_run(configured(CONFIG, **sections), DATA, device="cpu", processes=processes)


def test_the_inverse_square_root_follows_the_warm_up():
    settings = config(decay="inverse_square_root", warmup=32, learning_rate=1.0)
    rates = [learning_rates(settings, step)[0] for step in range(6)]
    expected = [1 / 2, 1, *(math.sqrt(2 / n) for n in (3, 4, 5, 6))]
    assert rates == pytest.approx(expected, rel=EPS32, abs=0)


def test_a_rejected_training_does_not_disturb_the_next_one(tmp_path):
    conditional = config(network=CONDITIONAL, precision="bf16", **ONE_STEP)
    with pytest.raises(ValueError, match="the images have no classes"):
        trained(tmp_path / "a", conditional, DataSet(noise_images(8), DATA.held_out))
    trained(tmp_path / "b", conditional)
    trained(tmp_path / "c", config(**ONE_STEP))


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_losses(tmp_path):
    found = []
    for compiled in (False, True):
        trained(tmp_path / str(compiled), plain(compile=compiled))
        found.append([line["loss"] for line in metrics(tmp_path / str(compiled))])
    # Before the first update they differ by the rounding of float32. Adam's first updates are ±lr
    # even if a gradient is mere rounding: from then on losses differ by a share of lr.
    assert found[0][0] == pytest.approx(found[1][0], rel=SUMS, abs=0)
    assert found[0] == pytest.approx(found[1], rel=CONFIG["training"]["learning_rate"], abs=0)


def start(folder, *arguments: object, processes: int = 1):
    """A process of the command, or several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [sys.executable, *(launcher if processes > 1 else []), "-m", "cldsde"]
    # In the repository `python -m` would take the folder cldsde/ for the whole package.
    options = {"cwd": folder, "stdout": subprocess.DEVNULL}
    with (folder / "stderr.txt").open("w") as errors:
        return subprocess.Popen(
            [*words, *map(str, arguments), "--device", "cpu"], stderr=errors, **options
        )


def run(folder, *arguments: object, **options) -> None:
    code = start(folder, *arguments, **options).wait(timeout=300)
    assert code == 0, (folder / "stderr.txt").read_text()[-3000:]


@pytest.mark.slow
def test_a_signal_to_two_processes_saves_one_state(tmp_path):
    file = write_config(tmp_path, images=160_000, save_every=160_000, sample_every=160_000)
    out = tmp_path / "run"
    process = start(tmp_path, "train", file, "--out", out, processes=2)
    while not (out / METRICS).exists():  # both have begun
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) != 0
    seen = int(load_tensors(out / STATE, STATE_KIND)[1]["images_seen"])
    assert 0 < seen < 160_000
    # They agree every eighth step.
    assert seen % (8 * 16) == 0


@pytest.mark.slow
def test_two_processes_train_sample_and_evaluate_as_one(tmp_path):
    file, results = write_config(tmp_path), []
    for processes in (1, 2):
        run(tmp_path, "train", file, "--out", tmp_path / str(processes), processes=processes)
        words = ("--seeds", "0-20", "--batch", "4", "--out", tmp_path / f"samples-{processes}")
        run(tmp_path, "sample", tmp_path / "1", *words, processes=processes)
        found = tmp_path / f"evaluation-{processes}.jsonl"
        words = ("--samples", 21, "--repeats", 2, "--batch", 4, "--metrics", "fd,bpd")
        words += ("--nfe", "4,6", "--likelihood-images", 4, "--out", found)
        for _ in range(2):  # the second time all is there
            run(tmp_path, "evaluate", tmp_path / "1", *words, processes=processes)
        results.append([(one.key, one.numbers, one.nfe) for one in read_results(found).values()])
    assert results[0] == results[1]
    assert len(results[0]) == 5
    for first, second in zip(*(metrics(tmp_path / str(n)) for n in (1, 2)), strict=True):
        for name in ("loss", "held_out_loss"):
            # Each of a dozen steps of Adam adds to the difference.
            assert first[name] == pytest.approx(second[name], rel=12 * SUMS, abs=0)
    first, second = (sorted((tmp_path / f"samples-{n}").iterdir()) for n in (1, 2))
    assert len(first) == 21
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]


@pytest.mark.slow
def test_shared_weights_train_resume_and_are_saved_as_whole_ones(tmp_path, monkeypatch):
    more = {"snapshots": 1, "snapshots_by": "held_out_loss", "ema_decays": [0.0]}
    file = write_config(tmp_path, decay="constant", **more)
    values = json.loads(file.read_text())
    # No dropout: its masks depend on the number of processes. The network has a buffer.
    options = {"channels": [8], "blocks": 1, "fourier_scale": 16.0}
    values["network"] = {"name": "NCSNpp", "options": options}
    file.write_text(json.dumps(values))
    whole, shared, single = (tmp_path / name for name in ("whole", "shared", "single"))
    run(tmp_path, "train", file, "--out", whole, processes=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # as `accelerate launch` does
    begun = ("train", file, "--set", "training.images=32", "--out", shared)
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert start(tmp_path, *begun, processes=2).wait(timeout=300) != 0
    assert "FSDP needs its version 2" in (tmp_path / "stderr.txt").read_text()
    monkeypatch.setenv("FSDP_VERSION", "2")
    run(tmp_path, *begun, processes=2)
    shutil.copytree(shared, single)
    run(tmp_path, "train", file, "--out", shared, processes=2)
    run(tmp_path, "train", file, "--out", single)
    model = load_model(whole)
    begin = models.make_model(model.config, model.space).parameters()
    begin = nn.utils.parameters_to_vector(begin).detach()
    names = sorted(x.relative_to(whole) for x in whole.rglob("*.safetensors"))
    for folder in (shared, single):
        assert sorted(x.relative_to(folder) for x in folder.rglob("*.safetensors")) == names
        for first, second in zip(metrics(folder), metrics(whole), strict=True):
            for name in ("loss", "held_out_loss", "gradient_norm"):
                assert first[name] == pytest.approx(second[name], rel=12 * SUMS, abs=0)
        for name in names:
            found, expected = (
                nn.utils.parameters_to_vector(load_model(x / name).model.parameters())
                for x in (folder, whole)
            )
            change = float((expected - begin).norm())
            assert float((found - expected).norm()) < ROUNDED_STEPS * change


@pytest.mark.slow
def test_twenty_killed_runs_resume_and_end_with_the_same_bits(tmp_path):
    file = write_config(tmp_path, images=8000, save_every=16, log_every=16, sample_every=800)
    out, killed = tmp_path / "whole", tmp_path / "killed"
    run(tmp_path, "train", file, "--out", out)
    draw, state = random.Random(0), killed / STATE
    for _ in range(20):
        process = start(tmp_path, "train", file, "--out", killed)
        began, before = time.monotonic(), state.stat().st_mtime_ns if state.exists() else 0
        while time.monotonic() - began < 60 and process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None
        process.kill()
        process.wait()
    run(tmp_path, "train", file, "--out", killed)
    assert_same_bits(load_model(out).model, load_model(killed).model)
    assert metrics(out) == metrics(killed)


def test_the_seed_decides_on_order_and_noise_and_each_pass_has_its_order():
    orders = [image_order(seed, 99, 0, 198) for seed in (0, 1)]
    draws = [torch.rand(9, generator=stream(seed, "noise", 0)) for seed in (0, 1)]
    assert not torch.equal(*orders)
    assert not torch.equal(*draws)
    assert not torch.equal(*orders[0].split(99))
