"""Published checkpoints: what is loaded, and what is rejected."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch

from cldsde import CLD
from cldsde.pretrained import load_cld_sgm, published
from cldsde.pretrained.published import recognise
from cldsde.pretrained.published_models import PUBLISHED
from cldsde.pretrained.published_score import Parameterisation, PublishedScore
from cldsde.score import PerturbedData
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


def like(model):
    """A checkpoint with the shapes of a model and no numbers."""
    network = model.make_network("meta")
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
    ],
)
def test_weights_tell_the_settings_and_are_as_many_as_published(family, name, count):
    # Counted in networks of the two codes; the papers say 107.6, 65.5 and 103 million.
    model = PUBLISHED[family][name]
    assert sum(p.numel() for p in model.make_network("meta").parameters()) == count
    if family == "cld-sgm":
        assert recognise(like(model), "x.pth", family) is model


def test_noise_levels_and_folders_tell_models_of_one_network(tmp_path, monkeypatch):
    model, counts = MODELS["ve_fourier"], {"ve/a": 500, "ve/b": 1000, "ve/c": 1000}
    known = {name: dataclasses.replace(model, sigmas=(50.0, 0.01, n)) for name, n in counts.items()}
    monkeypatch.setattr(published, "PUBLISHED", {"score-sde": known})
    found = like(known["ve/c"])
    assert recognise(found, tmp_path / "ve/c/checkpoint_15.pth", "score-sde") is known["ve/c"]
    with pytest.raises(ValueError, match=r"config: must be given.*: ve/b, ve/c$"):
        recognise(found, tmp_path / "checkpoint_15.pth", "score-sde")


WEIGHT = "module.all_modules.3.weight"


def changed(part, value):
    """Change a weight of a checkpoint, or the last averaged one."""

    def change(contents):
        held = contents["model"] if part == "model" else contents["ema"]["shadow_params"]
        key = WEIGHT if part == "model" else -1
        held[key] = value(held[key].clone())

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("ema"), "missing: ema"),
        (lambda found: found.update(step="x"), "step must be a whole number; got"),
        (lambda found: found["model"].update(more=torch.zeros(1)), "unknown weights: more"),
        (lambda found: found["ema"]["shadow_params"].pop(), r"\d+ averaged weights.*; got \d+"),
        (changed("model", lambda x: x[1:]), r"\.3\.weight in model of .* have the shape"),
        (changed("ema", lambda x: x[1:]), r"bias in ema\.shadow_params of .* have the shape"),
        (changed("model", lambda x: x.fill_(torch.nan)), "in model of .* finite; it holds NaN"),
        (changed("ema", lambda x: x.fill_(torch.nan)), "in ema.* must be finite; it holds NaN"),
        (changed("model", lambda x: x.int()), "real floating-point numbers; got torch.int32"),
        (changed("model", lambda x: x.to("meta")), "must be a dense tensor"),
    ],
)
def test_a_wrong_checkpoint_is_rejected_with_its_fault(tmp_path, change, message):
    contents = checkpoint("cld_fourier")
    change(contents)
    with pytest.raises(ValueError, match=message):
        load_cld_sgm(saved(tmp_path, contents), MODELS["cld_fourier"])


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
    ("name", "model", "changes", "message"),
    [
        ("vp_mixed", "cld_positional", {}, r"expected; \d+ of \d+ weights are miss"),
        ("ve_fourier", "ve_fourier", {"sigmas": (90.0, 0.01, 1000)}, "got 1000 levels up to 50"),
    ],
)
def test_a_checkpoint_of_another_model_is_rejected(tmp_path, name, model, changes, message):
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path, dataclasses.replace(MODELS[model], **changes))


def test_an_error_of_data_is_rejected_before_the_network_is_evaluated():
    score = PublishedScore(torch.nn.Module(), CLD(), Parameterisation(code="cld-sgm"))
    pair = PerturbedData.draw(CLD(), torch.zeros(2, 1, 8, 8), 0.5)
    with pytest.raises(ValueError, match=r"^prediction must be one of .*; got 'data'"):
        score.loss(pair, prediction="data")


def test_numerical_eps_keeps_the_gain_finite_near_the_data():
    how = Parameterisation(code="cld-sgm", mixed=True, numerical_eps=1e-9)
    score = PublishedScore(torch.nn.Identity(), CLD(), how)
    found = score._coefficients(torch.tensor([1e-12], dtype=torch.float64))
    # Σ_vv(0) = γM = 0.01, and all but eps of it is known from x: ℓ = 1/√(2 eps) there.
    # Coefficients are of single precision, and eps takes 1e-7 of a variance.
    close = rounding(100, dtype=torch.float32)
    assert found.gain.item() == pytest.approx(-1 / (1e-9 + 1e-2) ** 0.5, rel=close, abs=0)
    assert found.reference.item() == pytest.approx(100, rel=close, abs=0)
