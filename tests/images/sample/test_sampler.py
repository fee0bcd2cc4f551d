"""Images from seeds: the same in any batch, of the requested class, in whole files."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from cldsde import CLD, VESDE, VPSDE, GuidedScore, ReverseProcess, solvers
from cldsde.errors import SettingError
from cldsde.images import Run, as_pictures
from cldsde.images.config import SamplingConfig
from cldsde.images.model import KIND, MODEL, ImageSpace, load_model, model_notes
from cldsde.images.runs import RunFolder
from cldsde.images.sample import outputs
from cldsde.images.sample.outputs import SampleRequest, check_output, draw_to
from cldsde.images.sample.sampler import (
    ImageSampler,
    changed_recipe,
    make_plan,
    make_solver,
)
from cldsde.images.tensor_files import save_tensors
from cldsde.solvers import recommended
from image_data import PixelScore
from tolerances import rounding, standard_error

SPACE = ImageSpace((3, 4, 4))
FIXED = SamplingConfig(solver="sscs", nfe=6, t_end=1e-2)
MERGED = SamplingConfig(solver="sscs", nfe=7, options={"merge": False})


@pytest.fixture(scope="module")
def run(labelled_run):
    return load_model(labelled_run)


@pytest.fixture
def request_of(run):
    """Make a request of the run for some seeds, in batches of two."""

    def request(count=4, seeds=None, **changes):
        sampler = ImageSampler.of(run, **{"sampling": FIXED, "batch": 2, **changes})
        seeds = range(count) if seeds is None else seeds
        return SampleRequest(sampler, seeds, run.digest)

    return request


def names(folder):
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("sde", [CLD(), VPSDE()], ids=["CLD", "VP"])
def test_images_have_the_distribution_of_the_exact_score(sde):
    sampling = dataclasses.replace(FIXED, solver="multistep-2-sde", nfe=40)
    sampler = ImageSampler(PixelScore(sde, 0.2, 0.09), SPACE, sampling)
    images, evaluations, _ = sampler.sample(range(200))
    assert (evaluations == 40).all()
    x, bias = images.double() / 127.5 - 1, 5e-3  # rounding to bytes, and the solver's 2e-3
    assert abs(float(x.mean()) - 0.2) < standard_error(0.3, x.numel()) + bias
    assert abs(float(x.std()) - 0.3) < standard_error(0.3 / 2**0.5, x.numel()) + bias


def test_an_image_depends_on_its_seed_alone():
    score = PixelScore(CLD())
    together, apart = (
        ImageSampler(score, SPACE, FIXED, batch=n).sample(range(10)).images for n in (10, 3)
    )
    some = ImageSampler(score, SPACE, FIXED).sample([7, 2]).images
    assert torch.equal(together, apart)
    assert torch.equal(some, together[[7, 2]])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_seeds_may_be_a_tensor_or_an_array(make):
    sampler = ImageSampler(PixelScore(CLD()), SPACE, FIXED)
    images = sampler.sample([7, 2]).images
    assert torch.equal(sampler.sample(make([7, 2])).images, images)
    with pytest.raises(SettingError, match=r"seeds: must be a sequence of integers; got .*3"):
        sampler.sample(make(3))
    with pytest.raises(TypeError, match=r"seeds must be integers in \[0, 2³²\).*; got 7.0"):
        sampler.sample(make([7.0, 2.0]))


def test_a_solve_that_fails_raises_and_does_not_warn():
    with pytest.raises(FloatingPointError, match="sscs failed: the state is not finite"):
        ImageSampler(PixelScore(CLD(), torch.inf), SPACE, FIXED).sample(range(2))
    with pytest.raises(SettingError, match="seeds: must be one or more; got none"):
        ImageSampler(PixelScore(CLD()), SPACE, FIXED).sample([])


@pytest.mark.parametrize(
    ("name", "nfe"),
    [
        ("euler-maruyama", 5),
        ("stochastic-heun", 12),
        ("stochastic-heun", 13),
        ("torchdiffeq-rk4", 15),
    ],
)
def test_budgets_are_used_and_not_exceeded(name, nfe):
    sampling = SamplingConfig(solver=name, nfe=nfe, t_end=1e-2)
    process, solver = ReverseProcess(CLD(), PixelScore(CLD())), make_solver(sampling)
    times = make_plan(process.score, sampling).times
    found = solvers.solve(process, solver, torch.zeros(1, 2, 3, 4, 4), times, denoise=True)
    assert nfe - solver.facts.nfe_per_step < found.nfev <= nfe


def test_models_of_dequantised_levels_return_the_levels():
    """Bins about their centres: data within 0.02 bins of one level are that level."""
    levels, level = 17, 5
    score = PixelScore(VPSDE(), (2 * level + 1) / levels - 1, (0.02 * 2 / levels) ** 2)
    space = ImageSpace((1, 4, 4), levels, dequantised=True)
    sampling = SamplingConfig(solver="multistep-2", nfe=20)
    found = ImageSampler(score, space, sampling).sample(range(4))
    assert (found.images == level).all()
    assert as_pictures(found)[0].getextrema() == (80, 80)  # 5/16 of 255


def test_evaluations_of_adaptive_solvers_are_counted_per_image():
    sampling = SamplingConfig(solver="probability-flow", options={"rtol": 1e-2, "atol": 1e-2})
    together, apart = (
        ImageSampler(PixelScore(VPSDE()), SPACE, sampling, batch=n).sample(range(6)) for n in (6, 4)
    )
    assert torch.equal(together.evaluations, apart.evaluations)
    assert (together.evaluations > 6).all()


def test_options_of_parts_of_solvers_are_passed_on_or_rejected():
    def made(**options):
        return make_solver(SamplingConfig(solver="predictor-corrector", options=options))

    own = solvers.PredictorCorrector(solvers.ReverseDiffusion(), solvers.Langevin(snr=0.1))
    assert made(corrector={"snr": 0.1}) == own
    with pytest.raises(ValueError, match=r"corrector\.snrr: unknown key; did you mean snr"):
        made(corrector={"snrr": 1})
    with pytest.raises(ValueError, match="corrector: snr must be finite and"):
        made(corrector={"snr": -1.0})


def test_classes_of_all_images_and_of_each(run, request_of, tmp_path):
    draw_to(tmp_path / "all.npz", request_of(5, label="all", guidance=2))
    found = np.load(tmp_path / "all.npz")
    assert found["labels"].tolist() == [0, 1, 2, 0, 1]
    assert found["seeds"].tolist() == list(range(5))
    space = dataclasses.replace(run.space, always_classes=True)
    unnamed = ImageSampler(run.score, space, FIXED, batch=2).sample(range(5))
    assert unnamed.evaluations.tolist() == [FIXED.nfe] * 5
    for label in (0, 2):
        guided = ImageSampler.of(run, FIXED, label=label, guidance=2).sample(range(5)).images
        own = ImageSampler(run.score, space, FIXED, label=label).sample(range(5)).images
        assert np.array_equal(guided[label::3].movedim(1, -1), found["images"][label::3])
        assert torch.equal(own[label::3], unnamed.images[label::3])
    assert [space.label(x) for x in ("stripe", "1", 2, "7")] == [1, 1, 2, 2]


def test_an_interrupted_request_resumes(request_of, tmp_path, monkeypatch):
    out, drawn, draw = tmp_path / "x.npz", [], ImageSampler.draw
    draw_to(tmp_path / "whole.npz", request_of(9))

    def interrupted(self, seeds, *arguments):
        drawn.append(seeds)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(self, seeds, *arguments)

    monkeypatch.setattr(ImageSampler, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_to(out, request_of(9))
    assert not out.exists()
    draw_to(out, request_of(9))
    assert drawn[3:] == [[4, 5], [6, 7], [8]]
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert names(tmp_path) == {"x.npz", "whole.npz"}


def test_finished_samples_outlast_another_batch_and_are_deleted_only_on_request(
    request_of, tmp_path, monkeypatch
):
    out = tmp_path / "x.npz"
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_gather", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            draw_to(out, request_of(4, label="all"))
    for changes in ({"sampling": MERGED}, {"label": 0}, {"count": 5}):
        with pytest.raises(SettingError, match=r"out: .*holds finished samples for .*overwrite"):
            check_output(out, request_of(**{"count": 4, "label": "all", **changes}))
    check_output(out, request_of(4), overwrite=True)
    other = request_of(4, label="all", batch=4)
    check_output(out, other)
    monkeypatch.setattr(ImageSampler, "draw", mock.Mock(side_effect=AssertionError("sampled")))
    [part, *_] = tmp_path.glob("x.npz.parts-*/*.npy")
    content = part.read_bytes()
    part.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{part.name} is damaged .*; delete it to have"):
        draw_to(out, other)
    part.write_bytes(content)
    draw_to(out, other)
    assert np.load(out)["labels"].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("name", ["x.npz", "x.png", "x"])
def test_links_are_followed_and_stay(request_of, tmp_path, name):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / f"y{Path(name).suffix}", tmp_path / name
    target.touch() if target.suffix else target.mkdir()
    link.symlink_to(target)
    check_output(link, request_of(2), overwrite=True)
    draw_to(link, request_of(2))
    assert link.is_symlink()
    assert names(tmp_path) == {"far", name}
    assert names(target.parent) == {target.name}
    assert target.stat().st_size > 0


def test_links_to_nothing_and_pipes_are_rejected(request_of, tmp_path):
    (tmp_path / "x.npz").symlink_to(tmp_path / "nowhere" / "x.npz")
    os.mkfifo(tmp_path / "y.npz")
    for name in ("x.npz", "y.npz"):
        with pytest.raises(SettingError, match=r"out: .*link to nothing, a pipe or a device"):
            check_output(tmp_path / name, request_of(2), overwrite=True)
    assert names(tmp_path) == {"x.npz", "y.npz"}


def test_two_calls_do_not_write_to_one_place_at_a_time(request_of, tmp_path, monkeypatch):
    out, draw, drawn = tmp_path / "x.npz", ImageSampler.draw, []

    def meanwhile(self, seeds, label, start):
        drawn.append(seeds)
        if len(drawn) == 1:
            with pytest.raises(ValueError, match=r"x\.npz is being written by another process"):
                draw_to(out, request_of(5))
            draw_to(tmp_path / "y.npz", request_of(1))
        return draw(self, seeds, label, start)

    monkeypatch.setattr(ImageSampler, "draw", meanwhile)
    draw_to(out, request_of(3))
    assert drawn == [[0, 1], [0], [2]]
    assert len(np.load(out)["images"]) == 3
    assert names(tmp_path) == {"x.npz", "y.npz"}


def test_a_folder_holds_the_pictures_of_one_request_after_any_interruption(
    request_of, tmp_path, monkeypatch
):
    """Interrupted as the pictures are drawn, and after they were put in place."""
    out, interrupt = tmp_path / "x", KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "picture", mock.Mock(side_effect=interrupt))
        with pytest.raises(KeyboardInterrupt):
            draw_to(out, request_of(4))
    assert not out.exists()
    out.mkdir()  # an empty folder is taken
    second = request_of(seeds=range(9, 12))
    check_output(out, second, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_drop_parts", mock.Mock(side_effect=[None, interrupt]))
        with pytest.raises(KeyboardInterrupt):
            draw_to(out, second)
    assert names(out) == {"09.png", "10.png", "11.png"}
    with pytest.raises(ValueError, match="x holds files already"):
        check_output(out, request_of(seeds=range(9, 13)))
    check_output(out, second, overwrite=True)
    monkeypatch.setattr(ImageSampler, "draw", mock.Mock(side_effect=interrupt))
    draw_to(out, second)
    assert names(tmp_path) == {"x"}
    assert len(names(out)) == 3


@pytest.mark.parametrize(
    ("out", "owner", "call", "file"),
    [
        ("x.npz", os, "fsync", r"x\.npz\.parts-\w+/0000000000\.npy"),
        ("x", Image.Image, "save", r"x\.parts-\w+/\.partial-whole/0\.png"),
    ],
)
def test_a_full_disk_is_reported_with_the_file(
    request_of, tmp_path, monkeypatch, out, owner, call, file
):
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(owner, call, mock.Mock(side_effect=full))
        message = rf"^{tmp_path}/{file} cannot be written \(No space left.*resumes"
        with pytest.raises(OSError, match=message):
            draw_to(tmp_path / out, request_of(2))
    draw_to(tmp_path / out, request_of(2))
    assert names(tmp_path) == {out}


def test_parts_of_other_requests_are_dropped_and_other_folders_left_alone(request_of, tmp_path):
    for name in ("x.npz.parts-0123456789abcdef", "x.npz.parts", "x.npz.parts-mine"):
        (tmp_path / name).mkdir()
    draw_to(tmp_path / "x.npz", request_of(1))
    assert names(tmp_path) == {"x.npz", "x.npz.parts", "x.npz.parts-mine"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": "2"}, "batch: must be a valid integer; got '2'"),
        ({"seeds": 5}, "seeds: must be a sequence of integers; got 5"),
        ({"guidance": 2.0}, "guidance: needs a class"),
        ({"solver": "dpm-solver"}, "solver: .* got 'dpm-solver'; did you mean"),
        ({"t_start": 1e-3, "t_end": 1e-2}, "^t_end: "),
    ],
)
def test_arguments_that_make_no_sense_are_named(labelled_run, changes, message):
    with pytest.raises(SettingError, match=message):
        Run.load(labelled_run).sample(**changes)


def test_half_precision_needs_a_gpu_and_a_picture_holds_4096_images(run, request_of, tmp_path):
    with pytest.raises(SettingError, match="precision: 'fp16' needs a GPU"):
        ImageSampler.of(run, FIXED, precision="fp16")
    with pytest.raises(SettingError, match="out: a picture holds 4096 images at most"):
        check_output(tmp_path / "x.png", request_of(5000))


def test_samples_are_not_resumed_after_a_change_of_the_recommended_table(
    run, tmp_path, monkeypatch
):
    """Half of the images would come from another sampler."""

    def request():
        sampler = ImageSampler.of(run, SamplingConfig(nfe=6), batch=1)
        return SampleRequest(sampler, range(2), run.digest)

    out, draw = tmp_path / "x.npz", ImageSampler.draw
    drawn = mock.Mock(side_effect=[draw(request().sampler, [0]), KeyboardInterrupt])
    with monkeypatch.context() as patch:
        patch.setattr(ImageSampler, "draw", drawn)
        with pytest.raises(KeyboardInterrupt):
            draw_to(out, request())
    check_output(out, request())  # the same call resumes
    later = [
        dataclasses.replace(x, ends=(x.ends[0], x.ends[1] + 0.1)) for x in recommended.RECOMMENDED
    ]
    monkeypatch.setattr(recommended, "RECOMMENDED", tuple(later))
    with pytest.raises(SettingError, match=r"holds finished samples for .* with other settings"):
        check_output(out, request())


def test_folders_without_a_whole_model_are_rejected(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(run.config.to_dict()))
    with pytest.raises(ValueError, match=r"has no model\.safetensors; it has "):
        load_model(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=r"is of a comparison; see .*/models"):
        load_model(tmp_path)
    (tmp_path / MODEL).write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"config\.json is no configuration"):
        load_model(tmp_path)


def test_weights_of_another_configuration_are_rejected(run, tmp_path):
    config = run.config
    folder, values = RunFolder(tmp_path, config.to_dict()), config.to_dict()
    notes = model_notes(config, run.space, 1)
    save_tensors(folder / MODEL, KIND, run.model.state_dict(), notes)
    assert load_model(tmp_path).images_seen == 1
    for section, changes in (
        ("process", {"options": {"mass": 0.3}}),
        ("data", {"dequantise": True}),
        ("data", {"options": {"seed": 9}}),
        ("training", {"t_min": 1e-2}),
    ):
        changed = {**values, section: {**values[section], **changes}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="another process, other networks or data"):
            load_model(tmp_path)


def test_other_fields_and_options_are_kept_but_another_solver_has_its_own_defaults():
    changed = changed_recipe(MERGED, {"score_step": "midpoint"}, nfe=9)
    options = {"merge": False, "score_step": "midpoint"}
    assert changed == SamplingConfig(solver="sscs", nfe=9, options=options)
    own = SamplingConfig(solver="own_solvers:CentredEuler")  # code, which the caller names
    assert changed_recipe(own, solver=own.solver) == own
    assert changed_recipe(MERGED, solver="em") == SamplingConfig(solver="euler-maruyama", nfe=7)
    with pytest.raises(SettingError, match="grid: probability-flow is adaptive"):
        changed_recipe(MERGED, solver="probability-flow", grid="root")


@pytest.mark.covering
@pytest.mark.parametrize("sde", [VPSDE(), CLD(), VESDE(sigma_max=10.0)], ids=repr)
@pytest.mark.parametrize("nfe", [2, 5, 7, 20])
def test_the_recommended_recipe_is_that_of_sample(sde, nfe):
    score = PixelScore(sde)
    sampler = ImageSampler(score, SPACE, SamplingConfig(nfe=nfe))
    found, expected = (
        sampler.plan,
        solvers.recommend(ReverseProcess(sde, score), nfe, shape=SPACE.shape),
    )
    assert found.settings == expected
    assert (found.solver, found.denoise) == (expected.solver, True)
    early = ImageSampler(score, SPACE, SamplingConfig(nfe=nfe, t_end=0.1))
    assert abs(early.t_end - 0.1) <= rounding(scale=0.1)


@pytest.mark.parametrize("changes", [{"grid": "root"}, {"denoise": False}])
def test_the_recommended_solver_leaves_no_choice(changes):
    with pytest.raises(SettingError, match=f"{next(iter(changes))}: needs a solver by name"):
        changed_recipe(SamplingConfig(), **changes)
    with pytest.raises(SettingError, match="options: needs a solver by name"):
        changed_recipe(SamplingConfig(), {"order": 2})
    named = changed_recipe(SamplingConfig(), solver="sscs", t_start=0.9, t_end=0.1, **changes)
    assert named.grid == "root"
    assert changed_recipe(named, solver="recommended") == SamplingConfig()


def test_what_the_recommended_solver_cannot_do_names_its_setting():
    guided = GuidedScore(PixelScore(CLD()), PixelScore(CLD()), 2.0)
    with pytest.raises(SettingError, match="nfe: 3 evaluations are too few"):
        make_plan(guided, SamplingConfig(nfe=3))
    late = SamplingConfig(t_start=0.1, t_end=0.2)
    with pytest.raises(SettingError, match="t_end: the range of times"):
        make_plan(PixelScore(CLD()), late)
