"""Images from seeds: the same in any batch, of the class and picture that are asked for."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cldsde import CLD, VPSDE, GaussianMixture, ReverseProcess, solvers
from cldsde.images.config import RunConfig, SamplingConfig
from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.model import ImageSpace, load_model
from cldsde.images.runs import RunFolder
from cldsde.images.sample import outputs as sample_files
from cldsde.images.sample.outputs import alone, check_output, draw_to
from cldsde.images.sample.request import SampleRequest
from cldsde.images.sample.sampler import (
    ahead,
    draw_images,
    make_solver,
    time_grid,
)
from cldsde.images.train.loop import train

SPACE = ImageSpace((3, 4, 4))
FIXED = SamplingConfig(solver="sscs", nfe=6, t_end=1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A conditional model of colour images, hardly trained."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(64) % 3
    data = DataSet(*(ArrayImages(pixels, labels=labels, classes=3) for _ in range(2)))
    config = RunConfig.from_dict(
        {
            "network": {"options": {"channels": [16, 16]}, "conditional": True},
            "training": {"images": 256, "batch": 32, "learning_rate": 0.01, "ema_decay": 0.5},
            "sampling": dataclasses.asdict(FIXED),
        }
    )
    folder = tmp_path_factory.mktemp("run")
    train(config, data, RunFolder(folder, config.to_dict()), device="cpu")
    return load_model(folder)


def exact_score(sde):
    """Score of images of independent Gaussian pixels, a mean and a variance for all."""
    return GaussianMixture([1.0], [[0.2]], [[[0.09]]]).score(sde)


def pixel_score(sde):
    score = exact_score(sde)

    def of_pixels(z, t):
        flat = z.movedim(1, -1).reshape(-1, z.shape[1], 1)
        times = t.repeat_interleave(z[0, 0].numel())
        found = score(flat, times)
        return found.reshape(len(z), *z.shape[2:], -1).movedim(-1, 1)

    return of_pixels


@pytest.mark.parametrize("sde", [CLD(), VPSDE()], ids=["CLD", "VP"])
def test_images_have_the_law_of_the_exact_score(sde):
    sampling = dataclasses.replace(FIXED, solver="multistep-2-sde", nfe=40)
    images, evaluations = draw_images(pixel_score(sde), SPACE, range(400), sampling, sde=sde)
    assert (evaluations == 40).all()
    x = images.double() / 127.5 - 1
    n = x.numel()
    # Five standard errors, the rounding to bytes and the solver's error (2e-3 at 40 evaluations).
    assert float(x.mean()) == pytest.approx(0.2, abs=5 * 0.3 / n**0.5 + 5e-3)
    assert float(x.std()) == pytest.approx(0.3, rel=5 / (2 * n) ** 0.5 + 1e-2)


def test_an_image_depends_on_its_seed_alone():
    score = pixel_score(CLD())
    together = draw_images(score, SPACE, range(10), FIXED, sde=CLD(), batch=10).images
    apart = draw_images(score, SPACE, range(10), FIXED, sde=CLD(), batch=3).images
    some = draw_images(score, SPACE, [7, 2], FIXED, sde=CLD()).images
    assert torch.equal(together, apart)
    assert torch.equal(some, together[[7, 2]])
    assert not torch.equal(together[0], together[1])


def test_inputs_are_made_one_ahead_in_their_order():
    made = []
    for used, item in enumerate(ahead(lambda i: made.append(i) or 2 * i, range(5))):
        assert item == 2 * used
        assert len(made) <= used + 2
    assert made == list(range(5))
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda i: 1 / i, [1, 0]))


@pytest.fixture
def prepared(monkeypatch):
    """Number of tables that are made."""
    made, prepare = [], solvers.SSCS.prepare
    monkeypatch.setattr(solvers.SSCS, "prepare", lambda *a: made.append(1) or prepare(*a))
    return made


def test_tables_are_computed_once_for_all_batches(run, prepared):
    score = pixel_score(CLD())
    found = draw_images(score, SPACE, range(256), FIXED, sde=CLD(), batch=64)
    assert len(found.images) == 256
    assert len(prepared) == 1
    # Of three classes, one after the other.
    space = dataclasses.replace(run.space, always_classes=True)
    draw_images(run.score, space, range(6), FIXED, batch=1)
    assert len(prepared) == 2


@pytest.mark.parametrize("label", [None, "all"])
def test_tables_of_a_request_are_computed_once_for_all_batches(run, prepared, tmp_path, label):
    request = SampleRequest(model=run, sampling=FIXED, seeds=range(6), batch=2, label=label)
    draw_to(tmp_path / "x.npz", request)
    assert len(prepared) == 1


def test_a_solve_that_fails_raises_and_does_not_warn():
    with pytest.raises(FloatingPointError, match="sscs failed: the state is not finite"):
        draw_images(lambda z, t: z[:, 1:] / 0, SPACE, range(2), FIXED, sde=CLD())


@pytest.mark.parametrize(
    "name",
    ["euler-maruyama", "sscs", "stochastic-heun", "splitting-obab", "torchdiffeq-rk4"],
)
@pytest.mark.parametrize("nfe", [5, 12, 31])
def test_budgets_are_used_and_not_exceeded(name, nfe):
    sampling = SamplingConfig(solver=name, nfe=nfe, t_end=1e-2)
    process = ReverseProcess(CLD(), pixel_score(CLD()))
    solver = make_solver(sampling)
    times = time_grid(process, solver, sampling)
    start = torch.zeros(1, 2, 3, 4, 4)
    found = solvers.solve(process, solver, start, times, denoise=True)
    assert found.nfev <= nfe
    longer = dataclasses.replace(sampling, nfe=nfe + solver.facts.nfe_per_step)
    assert len(time_grid(process, solver, longer)) == len(times) + 1


def test_models_of_dequantised_levels_draw_the_levels_back():
    """Bins about their centres: a law of sd 0.02 bins around one level is that level."""
    levels, level = 17, 5
    centre = (2 * level + 1) / levels - 1
    data = GaussianMixture([1.0], [[centre]], [[[(0.02 * 2 / levels) ** 2]]])

    def score(z, t):
        flat = z.movedim(1, -1).reshape(-1, z.shape[1], 1)
        times = t.repeat_interleave(z[0, 0].numel())
        found = data.score(VPSDE())(flat, times)
        return found.reshape(len(z), *z.shape[2:], -1).movedim(-1, 1)

    space = ImageSpace((1, 4, 4), levels, dequantised=True)
    sampling = SamplingConfig(solver="multistep-2", nfe=20)
    images = draw_images(score, space, range(4), sampling, sde=VPSDE()).images
    assert (images == level).all()


def test_evaluations_of_adaptive_solvers_are_those_of_each_image():
    sampling = SamplingConfig(solver="probability-flow", options={"rtol": 1e-2, "atol": 1e-2})
    score = pixel_score(VPSDE())
    together = draw_images(score, SPACE, range(6), sampling, sde=VPSDE(), batch=6)
    apart = draw_images(score, SPACE, range(6), sampling, sde=VPSDE(), batch=4)
    assert together.evaluations.dtype == torch.int64
    assert torch.equal(together.evaluations, apart.evaluations)
    assert (together.evaluations > 6).all()


def test_images_and_evaluations_of_all_classes_are_in_the_order_of_the_seeds(run):
    space = dataclasses.replace(run.space, always_classes=True)
    found = draw_images(run.score, space, range(7), FIXED)
    assert found.evaluations.tolist() == [FIXED.nfe] * 7
    for label in range(3):
        own = draw_images(run.score, space, range(label, 7, 3), FIXED, label=label).images
        assert torch.equal(own, found.images[label::3])


def test_budgets_too_small_for_a_step_are_refused():
    sampling = SamplingConfig(solver="stochastic-heun", nfe=2)
    process = ReverseProcess(CLD(), pixel_score(CLD()))
    with pytest.raises(ValueError, match="nfe: 2 evaluations are too few"):
        time_grid(process, make_solver(sampling), sampling)


def test_options_of_parts_of_solvers_are_passed_on_or_refused():
    def made(**corrector):
        options = {"corrector": corrector}
        return make_solver(SamplingConfig(solver="predictor-corrector", options=options))

    corrector = solvers.Langevin(snr=0.1)
    assert made(snr=0.1) == solvers.PredictorCorrector(solvers.ReverseDiffusion(), corrector)
    with pytest.raises(
        ValueError, match=r"options\.corrector\.snrr: unknown key; did you mean snr"
    ):
        made(snrr=0.1)
    with pytest.raises(ValueError, match=r"options\.corrector: snr must be finite and positive"):
        made(snr=-1.0)


def test_options_of_solvers_are_passed_on_or_refused():
    options = {"rtol": 0.5}
    solver = make_solver(SamplingConfig(solver="gotta-go-fast", options=options))
    assert solver.rtol == 0.5
    with pytest.raises(ValueError, match=r"options\.rtl: unknown key .*score_step"):
        make_solver(SamplingConfig(solver="sscs", options={"rtl": 0.5}))
    with pytest.raises(ValueError, match="one of"):
        make_solver(SamplingConfig(solver="sscz"))


def test_classes_of_all_images_and_of_each(run, tmp_path):
    everything = SampleRequest(model=run, sampling=FIXED, seeds=range(6), label="all", guidance=2)
    check(everything, tmp_path / "all.npz")
    draw_to(tmp_path / "all.npz", everything)
    found = np.load(tmp_path / "all.npz")
    assert found["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert found["seeds"].tolist() == list(range(6))
    for label in range(3):
        one = dataclasses.replace(everything, label=label)
        draw_to(tmp_path / "one.npz", one)
        images = np.load(tmp_path / "one.npz")["images"]
        assert np.array_equal(images[[label, label + 3]], found["images"][[label, label + 3]])


def test_an_interrupted_drawing_goes_on_and_other_settings_start_again(run, tmp_path, monkeypatch):
    out = tmp_path / "x.npz"
    request = SampleRequest(model=run, sampling=FIXED, seeds=range(9), batch=2)
    draw_to(tmp_path / "whole.npz", request)
    drawn: list[list[int]] = []
    draw = SampleRequest.draw

    def interrupted(self, label, seeds, start):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(seeds)
        return draw(self, label, seeds, start)

    monkeypatch.setattr(SampleRequest, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_to(out, request)
    assert not out.exists()
    drawn[:] = [[], []]
    monkeypatch.setattr(SampleRequest, "draw", lambda *a: drawn.append(a[2]) or draw(*a))
    draw_to(out, request)
    assert drawn[2:] == [[4, 5], [6, 7], [8]]
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"x.npz", "whole.npz"}


def test_processes_share_the_work(run, tmp_path):
    request = SampleRequest(model=run, sampling=FIXED, seeds=range(7), batch=2)
    draw_to(tmp_path / "one", request)

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        shares = [
            pool.submit(
                draw_to, tmp_path / "two", request, process=i, processes=2, wait=barrier.wait
            )
            for i in range(2)
        ]
    for share in shares:
        share.result()
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_two_calls_do_not_draw_to_one_place_at_a_time(run, tmp_path, monkeypatch):
    out = tmp_path / "x.npz"
    first = SampleRequest(model=run, sampling=FIXED, seeds=range(3), batch=2)
    draw, drawn = SampleRequest.draw, []

    def meanwhile(self, label, seeds, start):
        drawn.append(seeds)
        for other in (first, dataclasses.replace(first, seeds=range(5))):
            for attempt in (check_unused, lambda out, other=other: draw_to(out, other)):
                with pytest.raises(ValueError, match=r"x\.npz is being written by another process"):
                    attempt(out)
        draw_to(tmp_path / "y.npz", second)
        return draw(self, label, seeds, start)

    second = dataclasses.replace(first, seeds=range(1))
    object.__setattr__(second, "draw", lambda *a: draw(second, *a))
    monkeypatch.setattr(SampleRequest, "draw", meanwhile)
    draw_to(out, first)
    assert drawn == [[0, 1], [2]]
    assert len(np.load(out)["images"]) == 3
    assert {file.name for file in tmp_path.iterdir()} == {"x.npz", "y.npz"}
    check_unused(out)


def check(request, out):
    """What ``cldsde sample`` does before it samples."""
    request.check()
    check_output(out, request)


def check_unused(out):
    with alone(out):
        pass


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_folder_holds_the_pictures_of_one_request_whatever_was_cut_off_before(
    run, tmp_path, monkeypatch
):
    out = tmp_path / "x"
    first = SampleRequest(model=run, sampling=FIXED, seeds=range(4), batch=2)
    with monkeypatch.context() as patch:
        turns = iter((sample_files.picture, interrupt))

        def in_turn(*arguments):
            return next(turns)(*arguments)

        patch.setattr(sample_files, "picture", in_turn)
        with pytest.raises(KeyboardInterrupt):
            draw_to(out, first)
    assert not out.exists()
    out.mkdir()  # an empty folder is taken
    second = dataclasses.replace(first, seeds=range(2, 4))
    check(second, out)
    draw_to(out, second)
    assert sorted(file.name for file in out.iterdir()) == ["2.png", "3.png"]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_was_put_in_place_before_an_interruption_is_done(run, tmp_path, monkeypatch):
    out = tmp_path / "x"
    request = SampleRequest(model=run, sampling=FIXED, seeds=range(9, 12))
    with monkeypatch.context() as patch:
        patch.setattr(sample_files, "_drop_parts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw_to(out, request)
    assert sorted(file.name for file in out.iterdir()) == ["09.png", "10.png", "11.png"]
    other = dataclasses.replace(request, seeds=range(9, 13))
    with pytest.raises(ValueError, match="x holds files already"):
        check(other, out)
    check(request, out)
    monkeypatch.setattr(SampleRequest, "draw", interrupt)
    draw_to(out, request)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert len(list(out.iterdir())) == 3


def test_pictures_are_brought_to_the_disk_all_at_once_before_their_folder_is_there(
    run, tmp_path, monkeypatch, capsys
):
    out, fsync, synced = tmp_path / "x", os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(1) or fsync(handle))

    def sync():
        assert not out.exists()
        synced.append(len(list((tmp_path / "x.parts" / ".partial-whole").iterdir())))

    monkeypatch.setattr(os, "sync", sync)
    draw_to(out, SampleRequest(model=run, sampling=FIXED, seeds=range(5), batch=3))
    assert synced == [1, 1, 1, 5]  # the request, two parts, the pictures
    assert "pictures: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "file"),
    [
        ("x.npz", "x.npz.parts/00000000.npy"),
        ("x.png", "x.png"),
        ("x", "x.parts/.partial-whole/0.png"),
    ],
)
def test_a_full_disk_is_said_with_the_file_that_found_no_room(
    run, tmp_path, monkeypatch, out, file
):
    request = SampleRequest(model=run, sampling=FIXED, seeds=range(2))

    def full(write):
        def written(*arguments, **options):
            if arguments[-1].suffix == Path(file).suffix:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*arguments, **options)

        return written

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full(Path.replace))
        patch.setattr(Image.Image, "save", full(Image.Image.save))
        with pytest.raises(OSError, match=r"cannot be written \(No space left.*resumes") as caught:
            draw_to(tmp_path / out, request)
    assert str(caught.value).startswith(f"{tmp_path / file} ")
    draw_to(tmp_path / out, request)
    assert [left.name for left in tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("names", [["notes.txt"], ["00000000.npy"]])
def test_folders_that_only_look_like_parts_are_left_alone(run, tmp_path, names):
    request = SampleRequest(model=run, sampling=FIXED, seeds=range(1))
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    for name in names:
        (parts / name).write_text("mine")
    for attempt in (partial(check, request), lambda out: draw_to(out, request)):
        with pytest.raises(ValueError, match=r"x\.npz\.parts is needed, but holds other files"):
            attempt(tmp_path / "x.npz")
    assert {file.name: file.read_text() for file in parts.iterdir()} == dict.fromkeys(names, "mine")


def test_files_that_were_put_beside_parts_meanwhile_are_left_alone(run, tmp_path):
    request = SampleRequest(model=run, sampling=FIXED, seeds=range(1))
    mine = tmp_path / "x.npz.parts" / "notes.txt"
    draw_to(tmp_path / "x.npz", request, wait=lambda: mine.write_text("mine"))
    assert [file.name for file in mine.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "out", "message"),
    [
        ({"batch": 0}, "x.npz", "batch: "),
        ({"guidance": 2.0}, "x.npz", "guidance: needs a class"),
        ({"guidance": float("nan"), "label": 0}, "x.npz", "guidance: must be finite"),
        ({}, "x.jpg", "out: must be"),
        ({}, "/", "out: must name a file, or a folder"),
        ({}, "..", "out: must name a file, or a folder"),
        ({"seeds": range(5000)}, "x.png", "a picture holds"),
        ({"sampling": SamplingConfig(solver="nothing")}, "x.npz", "one of"),
    ],
)
def test_requests_that_make_no_sense_are_refused(run, tmp_path, changes, out, message):
    request = SampleRequest(**{"model": run, "sampling": FIXED, "seeds": range(4), **changes})
    with pytest.raises(ValueError, match=message):
        check(request, tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_models_are_refused_where_anything_is_wrong(run, tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        load_model(tmp_path / "mistyped")
    (tmp_path / "config.json").write_text(json.dumps(run.config.to_dict()))
    with pytest.raises(ValueError, match=r"has no model\.safetensors yet"):
        load_model(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=r"is of a comparison; its models are in .*/models"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)


def test_weights_of_another_configuration_are_refused(run, tmp_path):
    from cldsde.images.model import MODEL, save_model

    config = run.config
    folder = RunFolder(tmp_path, config.to_dict())
    save_model(folder / MODEL, run.model.state_dict(), config, run.space, 1)
    assert load_model(tmp_path).images_seen == 1
    values = config.to_dict()
    for section, changes in (
        ("process", {"options": {"mass": 0.3}}),
        ("data", {"dequantise": not config.data.dequantise}),
        ("data", {"options": {**config.data.options, "seed": 9}}),
        ("training", {"t_min": 1e-2}),
    ):
        other = {**values, section: {**values[section], **changes}}
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="another process, other networks or data"):
            load_model(tmp_path)
