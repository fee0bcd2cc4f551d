"""Published checkpoints: what is loaded, and what is rejected."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch

from cldsde import CLD
from cldsde.pretrained import load_cld_sgm, published
from cldsde.pretrained.ncsnpp import NCSNpp
from cldsde.pretrained.published import recognise
from cldsde.pretrained.published_models import PUBLISHED
from cldsde.pretrained.published_score import Parameterisation, PublishedScore
from cldsde.score import PerturbedData
from probes import generator
from published_data import MODELS, case, checkpoint, load, save_checkpoint
from tolerances import rounding


def saved(folder, contents):
    file = folder / "checkpoint.pth"
    torch.save(contents, file)
    return file


def test_weights_that_are_not_averaged_come_from_the_model_of_one_device_or_several(tmp_path):
    contents = checkpoint("cld_fourier")
    for _ in range(2):
        score = load_cld_sgm(saved(tmp_path, contents), MODELS["cld_fourier"])
        expected = case("cld_fourier")["weights"][:4]
        assert torch.equal(score.network.embedding.frequencies, expected)
        contents["model"] = {k.removeprefix("module."): x for k, x in contents["model"].items()}


def like(model, network=None):
    """A checkpoint with the shapes of a model and no numbers."""
    network = network or model.make_network("meta")
    state, weights = network.state_dict(), {}
    for w in published._published(network):
        shape = published._published_shape(state[w.own], w)
        weights[w.name] = torch.empty(shape, device="meta")
    if model.sigmas is not None:
        largest, smallest, count = model.sigmas
        levels = np.exp(np.linspace(np.log(largest), np.log(smallest), count))
        weights["sigmas"] = torch.tensor(levels)
    return published.Checkpoint(weights, [], 1)


@pytest.mark.parametrize(
    ("family", "name", "count"),
    [
        pytest.param("cld-sgm", "cifar10", 107_593_859, marks=pytest.mark.slow),
        ("cld-sgm", "celeba_paper", 65_466_371),
        pytest.param("cld-sgm", "celeba_post_paper", 103_073_795, marks=pytest.mark.slow),
        pytest.param("cld-sgm", "cifar10_vpsde", 107_586_947, marks=pytest.mark.slow),
        ("score-sde", "vp/cifar10_ddpmpp_deep_continuous", 106_632_579),
        pytest.param(
            *("score-sde", "ve/celebahq_256_ncsnpp_continuous", 65_574_421), marks=pytest.mark.slow
        ),
        # Told apart by noise levels, among all networks.
        pytest.param("score-sde", "ve/church_ncsnpp_continuous", None, marks=pytest.mark.slow),
    ],
)
def test_weights_tell_the_settings_and_are_as_many_as_published(family, name, count):
    # Counted in networks of the two codes; the papers say 107.6, 65.5 and 103 million.
    model = PUBLISHED[family][name]
    network = model.make_network("meta")
    if count is not None:
        assert sum(p.numel() for p in network.parameters()) == count
    if family == "cld-sgm" or count is None:
        assert recognise(like(model, network), "x.pth", family) is model


def only_with_the_network_of(name, monkeypatch):
    """Leave models that share the network of one, and another: each network takes time to build."""
    model = PUBLISHED["score-sde"][name]
    same = {
        key: x
        for key, x in PUBLISHED["score-sde"].items()
        if (x.shape, x.network) == (model.shape, model.network)
    }
    assert len(same) > 1
    other = "vp/cifar10_ddpmpp_continuous"
    same[other] = PUBLISHED["score-sde"][other]
    monkeypatch.setattr(published, "PUBLISHED", {"score-sde": same})
    return model


def test_noise_levels_tell_models_of_one_network(monkeypatch):
    model = only_with_the_network_of("ve/church_ncsnpp_continuous", monkeypatch)
    assert recognise(like(model), "x.pth", "score-sde") is model


def test_folders_tell_vp_from_sub_vp(tmp_path, monkeypatch):
    name = "subvp/cifar10_ddpmpp_deep_continuous"
    model = only_with_the_network_of(name, monkeypatch)
    assert recognise(like(model), tmp_path / name / "checkpoint_15.pth", "score-sde") is model
    with pytest.raises(ValueError, match=r"config: must be given.*vp/cifar10_ddpmpp_deep_cont"):
        recognise(like(model), tmp_path / "checkpoint_15.pth", "score-sde")


def put(value, *path):
    """Change an entry of a checkpoint; Ellipsis deletes it."""
    *outer, last = path

    def change(contents):
        place = contents
        for key in outer:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        return contents

    return change


WRONG = torch.zeros(7)
LAYERS = "module.all_modules"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((put(..., key), f"missing: {key}") for key in ("model", "ema", "step")),
        (put("x", "step"), "step must be a whole number; got"),
        (put(..., "model", f"{LAYERS}.5.Conv_1.bias"), r"1 of \d+ weights are mis.*\.5\.Conv"),
        (put(WRONG, "model", f"{LAYERS}.99.weight"), r"unknown weights: all_modules\.99\.w"),
        (put(..., "ema", "shadow_params", -1), r"must hold \d+ averaged weights.*; got"),
        (put(WRONG, "model", f"{LAYERS}.3.weight"), r"\.3\.weight in model of .* have the shape"),
        (put(WRONG, "ema", "shadow_params", -1), r"bias in ema\.shadow_params of .* the shape"),
    ],
)
def test_a_wrong_checkpoint_is_rejected_with_its_fault(tmp_path, change, message):
    file = saved(tmp_path, change(checkpoint("cld_fourier")))
    with pytest.raises(ValueError, match=message):
        load_cld_sgm(file, MODELS["cld_fourier"])


def test_code_in_a_pickle_is_not_run(tmp_path):
    mark = tmp_path / "was-run"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    contents = checkpoint("cld_fourier") | {"step": Code()}
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(contents))
    for file in (tmp_path / "plain.pth", saved(tmp_path, contents)):
        with pytest.raises(ValueError, match="holds code, which is never run"):
            load_cld_sgm(file, MODELS["cld_fourier"])
    assert not mark.exists()


def test_truncated_damaged_and_missing_files_are_rejected(tmp_path):
    file = save_checkpoint("cld_fourier", tmp_path)
    whole = file.read_bytes()
    # The first instruction of the last takes from an empty stack.
    for content in (b"", whole[: len(whole) // 3], whole[:-200], b"\x80\x02s."):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"is truncated, no checkpoint of torch\.save|damaged"):
            published.read_checkpoint(file)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.pth"):
        published.read_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.fill_(torch.nan), "must be finite; it holds NaN"),
        (lambda x: x.int(), "real floating-point numbers; got torch.int32"),
        (lambda x: x.to("meta"), "must be a dense tensor"),
    ],
)
@pytest.mark.parametrize("part", ["model", "ema.shadow_params"])
def test_a_weight_that_is_no_real_number_is_named(tmp_path, part, change, message):
    contents = checkpoint("cld_fourier")
    held, key = contents["model"], f"{LAYERS}.3.weight"
    if part != "model":
        held, key = contents["ema"]["shadow_params"], -1
    held[key] = change(held[key].clone())
    with pytest.raises(ValueError, match=rf"path: .* in {part} of .* {message}"):
        load_cld_sgm(saved(tmp_path, contents), MODELS["cld_fourier"])


@pytest.mark.parametrize(
    ("name", "model", "changes", "message"),
    [
        ("vp_mixed", "cld_positional", {}, r"expected; \d+ of \d+ weights are miss"),
        ("ve_fourier", "ve_fourier", {"sigmas": (90.0, 0.01, 1000)}, "got 1000 levels up to 50"),
    ],
)
def test_a_checkpoint_of_another_model_is_rejected(tmp_path, name, model, changes, message):
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path, dataclasses.replace(MODELS[model], **changes))


def score_of(name):
    model = MODELS[name]
    network = model.make_network()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator(p.numel()))
    return PublishedScore(network, model.make_process(), model.parameterisation)


def test_predictions_agree_with_the_score():
    score, t = score_of("cld_fourier"), torch.tensor([0.2, 0.9])
    z = torch.randn(2, 2, 1, 8, 8, generator=generator())
    root = score.sde.marginal(t.double()).root[:, -1, -1].float()
    expected = -root[:, None, None, None, None] * score(z, t)
    close = rounding(80, dtype=torch.float32)
    torch.testing.assert_close(score(z, t, prediction="noise"), expected, rtol=close, atol=close)
    assert score.data_prediction(z, t).shape == (2, 1, 8, 8)
    score, z = score_of("ve_levels"), z[:, :1]
    assert torch.equal(score(z, 0.5), score(z, torch.full((2,), 0.5)))


@pytest.mark.parametrize("prediction", ["data", "score", "foo"])
def test_an_unknown_error_is_rejected_before_the_network_is_evaluated(prediction):
    how = Parameterisation(code="cld-sgm")
    score = PublishedScore(torch.nn.Module(), CLD(), how)  # without forward
    pair = PerturbedData.draw(CLD(), torch.zeros(2, 1, 8, 8), 0.5)
    with pytest.raises(ValueError, match=f"^prediction must be one of .*; got '{prediction}'"):
        score.loss(pair, prediction=prediction)


def test_numerical_eps_keeps_the_gain_finite_near_the_data():
    how = Parameterisation(code="cld-sgm", mixed=True, numerical_eps=1e-9)
    score = PublishedScore(NCSNpp((2, 8, 8), 1, channels=(4, 4)), CLD(), how)
    found = score._coefficients(torch.tensor([1e-12], dtype=torch.float64))
    # Σ_vv(0) = γM = 0.01, and all but eps of it is known from x: ℓ = 1/√(2 eps) there.
    # Coefficients are of single precision, and eps takes 1e-7 of a variance.
    close = rounding(100, dtype=torch.float32)
    assert found.gain.item() == pytest.approx(-1 / (1e-9 + 1e-2) ** 0.5, rel=close, abs=0)
    assert found.reference.item() == pytest.approx(100, rel=close, abs=0)
