"""Images given an observation, against exact posteriors of independent Gaussian pixels."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch

from cldsde import CLD
from cldsde.errors import SettingError
from cldsde.images.config import SamplingConfig
from cldsde.images.data import FolderImages, to_unit
from cldsde.images.model import ImageSpace
from cldsde.images.sample import ImageSampler, ObservedImage
from image_data import PixelScore, random_bytes, save
from tolerances import rounding, standard_error

MEAN, VARIANCE, STD = 0.1, 0.04, 0.1
SPACE = ImageSpace((3, 4, 4))
RECIPE = SamplingConfig(solver="multistep-2-sde", nfe=20)
SHORT = dataclasses.replace(RECIPE, nfe=4)
PICTURE = torch.from_numpy(100 + random_bytes(3, 4, 4, levels=80))
HALF = torch.arange(4).expand(4, 4) < 2


def observed(operator, **options):
    low = {"downsample": (3, 2, 2)}.get(operator.partition(":")[0], (3, 4, 4))
    mask = HALF if operator == "mask" else None
    known = PICTURE[:, : low[1], : low[2]].contiguous()
    return ObservedImage(known=known, operator=operator, mask=mask, noise_std=STD, **options)


def sampled(image, seeds, sampling=RECIPE):
    score = PixelScore(CLD(), MEAN, VARIANCE)
    return ImageSampler(score, SPACE, sampling, observed=image).sample(seeds)


def posterior(image):
    """Mean and standard deviation of the pixels, by dense linear algebra."""
    seen = image.of(SPACE, "cpu").observation
    A, y = seen.dense(SPACE.shape), seen.y.flatten().double()
    gain = VARIANCE * A.mT @ torch.linalg.inv(VARIANCE * A @ A.mT + STD**2 * torch.eye(len(A)))
    mean = MEAN + gain @ (y - MEAN * A.sum(1))
    variance = VARIANCE * (torch.eye(48) - gain @ A).diagonal()
    return mean.reshape(SPACE.shape), variance.sqrt().reshape(SPACE.shape)


@pytest.mark.parametrize(
    ("operator", "method"),
    [
        ("mask", "moments"),
        *(
            pytest.param(name, "moments", marks=pytest.mark.slow)
            for name in ("grey", "downsample:2", "blur:0.4")
        ),
        ("mask", "twisted"),
    ],
)
def test_independent_pixels_have_their_exact_posterior(operator, method):
    image = observed(operator, method=method, particles=8)
    images, evaluations, _ = sampled(image, range(64))
    x = to_unit(images)
    mean, std = posterior(image)
    # The bias of K particles is of order 1/K. The solver's is 2 % of a standard deviation.
    bias = 1 / 8 if method == "twisted" else 1 / 50
    error = ((x.mean(0) - mean) / std).abs().max()
    assert error < standard_error(1, 64) + bias
    ratio = float((x.std(0) / std).mean())
    # 64 samples of 48 pixels know it to 1.3 %; the last state adds up to 4 % to observed ones.
    assert 0.95 < ratio < 1.08
    assert int(evaluations[0]) == (160 if method == "twisted" else 20)


def test_replacement_keeps_what_is_known():
    masked, grey = (
        sampled(observed(kind, method="replacement"), range(3), SHORT).images
        for kind in ("mask", "grey")
    )
    assert (masked[:, :, HALF] == PICTURE[:, HALF]).all()
    assert (masked[0] != masked[1]).any()
    # Three roundings to bytes move a mean by half a level at most.
    error = (grey.double().mean(1) - PICTURE.double().mean(0)).abs()
    assert error.max() <= 0.5 + rounding(4, 255)


def test_other_methods_take_their_own_steps():
    found = [
        sampled(
            dataclasses.replace(observed("mask", method=name), noise_std=0.5), range(2), SHORT
        ).images
        for name in ("moments", "pigdm", "dps")
    ]
    assert all((a != b).any() for a, b in combinations(found, 2))


def test_the_recommended_solver_of_an_observed_picture_is_the_multistep_solver():
    image = observed("mask")
    named = dataclasses.replace(SHORT, solver="multistep-2-sde", grid="root")
    chosen = dataclasses.replace(SHORT, solver="recommended", grid=None)
    assert torch.equal(*(sampled(image, range(2), recipe).images for recipe in (named, chosen)))


def test_steps_on_which_dps_diverges_are_rejected_by_a_rule():
    """The same pixels: the posterior is lost above the limit, and kept below."""

    def saturated(std, method="dps"):
        image = dataclasses.replace(observed("mask", method=method), noise_std=std)
        return float((sampled(image, range(8)).images % 255 == 0).float().mean())

    with pytest.raises(SettingError, match=r"method: 'dps' diverges with 19 .* below 0\.13; got 0"):
        saturated(0.02)
    assert saturated(0.02, "moments") < 0.01
    assert saturated(0.14) < 0.01
    adaptive = SamplingConfig(solver="gotta-go-fast")
    ImageSampler(PixelScore(CLD()), SPACE, adaptive, observed=observed("mask", method="dps"))


@pytest.mark.parametrize("method", ["moments", "twisted"])
def test_an_image_does_not_depend_on_its_batch(method):
    image = observed("downsample:2", method=method, particles=3)
    together, alone = (sampled(image, seeds, SHORT).images for seeds in (range(4), [2]))
    # Sums of another batch size may round to the neighbouring grey level.
    assert (together[2].int() - alone[0].int()).abs().max() <= 1


def test_the_particle_is_not_chosen_by_the_numbers_of_the_run(monkeypatch):
    """On the CPU two seeds that differ by a multiple of 2**32 are one stream."""
    states, multinomial = [], torch.multinomial

    def noted(weights, count, *, generator):
        states.append(generator.get_state())
        return multinomial(weights, count, generator=generator)

    monkeypatch.setattr(torch, "multinomial", noted)
    sampled(observed("mask", method="twisted", particles=2), range(3), SHORT)
    runs = [torch.Generator().manual_seed(seed).get_state() for seed in range(3)]
    # The state begins with the seed in 64 bits, which does not matter.
    assert len(torch.stack(states + runs)[:, 16:].unique(dim=0)) == 6


def test_sampling_ends_early_enough_for_the_noise():
    image, score = observed("mask"), PixelScore(CLD())
    latest = image.of(SPACE, "cpu").observation.end_time(CLD(), SPACE.shape)
    for t_end, expected in ((0.3, latest), (1e-3, 1e-3)):
        recipe = dataclasses.replace(RECIPE, t_end=t_end)
        assert ImageSampler(score, SPACE, recipe, observed=image).t_end == expected


def test_pictures_are_read_from_files(tmp_path):
    known, mask = tmp_path / "known.png", tmp_path / "mask.png"
    save(known, PICTURE.movedim(0, -1).numpy())
    save(mask, 255 * HALF.byte().numpy())
    found = ObservedImage.read(known, str(mask), SPACE, noise_std=STD)
    assert found.operator == "mask"
    assert found.recipe() == observed("mask").recipe()
    found = ObservedImage.read(known, "gray", SPACE, noise_std=STD)
    assert found.recipe() == observed("grey").recipe()
    assert ObservedImage.read(None, None, SPACE) is None


def test_pictures_are_cropped_and_resized_as_training_pictures_are(tmp_path):
    known, mask = tmp_path / "photos" / "0.png", tmp_path / "mask.png"
    save(known, random_bytes(20, 30, 3))
    save(mask, np.tile(np.repeat(np.uint8([255, 0]), 15), (20, 1)))
    [photo] = FolderImages(known.parent, size=4, cache=None).load(torch.tensor([0]))
    assert torch.equal(ObservedImage.read(known, "grey", SPACE).known, photo)
    assert torch.equal(ObservedImage.read(known, str(mask), SPACE).mask, HALF)
    assert ObservedImage.read(known, "downsample:2", SPACE).known.shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_std": 0.0}, "noise_std: must be finite and positive; got 0"),
        ({"mask": torch.zeros(4, 4, dtype=torch.bool)}, "observe: .* all black"),
        ({"mask": HALF[:2]}, "observe: the mask must have the picture's shape"),
        ({"operator": "blur:-1"}, "observe: must be 'mask', 'grey', 'downsample:N' or 'blur:STD'"),
        ({"operator": "downsample:2"}, r"known: .* shape \(3, 8, 8\); the model makes"),
        ({"operator": "blur:100"}, "observe: blur must be at most 4, the picture's side; got 100"),
        ({"operator": "blur:1", "method": "replacement"}, "method: 'replacement' needs a mask"),
    ],
)
def test_observations_that_make_no_sense_are_rejected(changes, message):
    given = {"known": PICTURE, "operator": "mask", "mask": HALF, **changes}
    with pytest.raises(SettingError, match=message):
        ObservedImage(**given).of(SPACE, "cpu")


def test_solvers_that_do_not_fit_the_method_are_rejected():
    for solver, method, message in (
        ("sscs", "twisted", "solver: must be multistep-2-sde"),
        ("gotta-go-fast", "replacement", "solver: must have a grid of times"),
    ):
        recipe = dataclasses.replace(RECIPE, solver=solver)
        with pytest.raises(SettingError, match=message):
            sampled(observed("mask", method=method), [0], recipe)
    exact = dataclasses.replace(observed("mask"), noise_std=1e-12)
    with pytest.raises(SettingError, match="noise_std: is so small that"):
        sampled(exact, [0])


@pytest.mark.parametrize(
    ("known", "observe", "options", "message"),
    [
        ("x.png", "nothing.png", {}, r"observe: .*nothing\.png"),
        (None, "grey", {}, "observe: needs `known`"),
        (None, None, {"noise_std": STD}, "noise_std: needs `known` and `observe`"),
    ],
)
def test_files_that_are_not_there_or_not_given_are_rejected(known, observe, options, message):
    with pytest.raises(SettingError, match=message):
        ObservedImage.read(known, observe, SPACE, **options)
