"""A training can be prolonged, start from other weights, and keep snapshots."""

import json
import shutil
from typing import Any

import pytest
import torch

from cldsde import images
from cldsde.errors import SettingError
from cldsde.images.config import RunConfig
from cldsde.images.data import digits
from cldsde.images.evaluate.evaluation import Evaluation
from cldsde.images.model import MODEL, STATE_KIND, load_model
from cldsde.images.runs import STATE
from cldsde.images.tensor_files import load_tensors
from cldsde.images.train import check_run, loop, summary
from tiny_runs import NETWORK, SHORT
from tolerances import EPS32, rounding
from trainings import assert_same_bits, configured, metrics
from trainings import trained as trained_on

EVERY = {"log_every": 16, "save_every": 16, "sample_every": 32, "held_out": 8}
VALUES = {
    "process": {"name": "VPSDE"},
    "network": {"options": NETWORK},
    "training": {**SHORT, "images": 32, "batch": 8, "learning_rate": 1e-3, **EVERY},
    "sampling": {"solver": "euler-maruyama", "nfe": 3},
}
DATA = digits()


def config(*, network: Any = None, process: Any = None, **training: Any) -> RunConfig:
    return configured(VALUES, network=network or {}, process=process or {}, training=training)


def trained(folder, settings=None):
    return trained_on(folder, settings or config(), DATA)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longer") / "run"
    trained(folder)
    return folder


@pytest.mark.slow
def test_a_finished_run_is_prolonged_to_the_bits_of_one_that_was_long(finished, tmp_path):
    """Also a run from before some settings existed."""
    run = shutil.copytree(finished, tmp_path / "run")
    values = json.loads((run / "config.json").read_text())
    for section, key in (("score", "code"), ("training", "snapshots_by"), ("training", "measure")):
        del values[section][key]
    (run / "config.json").write_text(json.dumps(values))
    longer = trained(run, config(images=64, held_out=4))
    assert_same_bits(longer, trained(tmp_path / "long", config(images=64)))
    assert load_model(run).images_seen == 64


def test_a_run_that_kept_no_state_is_not_prolonged(tmp_path):
    trained(tmp_path, config(keep_state=False, images=8))
    with pytest.raises(ValueError, match=r"resume from.*is missing; put it back"):
        trained(tmp_path, config(images=16))


def test_weights_of_another_run_are_rejected(finished, tmp_path):
    other = tmp_path / "run"
    trained(other, configured(VALUES, seed=7, training={"images": 8}))
    shutil.copy(finished / MODEL, other / MODEL)
    with pytest.raises(ValueError, match="belongs to another run, with another seed or other"):
        load_model(other)


def test_a_training_starts_from_the_weights_of_a_run_or_of_a_diffusers_folder(finished, tmp_path):
    whole = images.Run.load(finished)
    whole.to_diffusers(tmp_path / "net")
    with pytest.raises(SettingError, match="folder: must not be there yet"):
        whole.to_diffusers(finished)
    for source in (finished, tmp_path / "net"):
        folder = tmp_path / f"from-{source.name}"
        settings = config(images=8, learning_rate=1e-30, init_from=str(source), ema_decays=[0.5])
        trained(folder, settings)
        for file in (MODEL, "ema-0.5.safetensors"):
            tuned = load_model(folder / file).score.network.state_dict()
            for name, value in whole.score.network.state_dict().items():
                # After one step of a vanishing learning rate.
                torch.testing.assert_close(tuned[name], value, rtol=EPS32, atol=EPS32, msg=name)
        state, _ = load_tensors(folder / STATE, STATE_KIND)
        # Names of version 0.2, whose runs can be trained further.
        assert {"average", "average1", "model"} <= {name.partition(".")[0] for name in state}
    # A resumed run does not need the weights that it started from.
    changes = {"init_from": str(tmp_path / "gone"), "ema_decays": [0.5]}
    longer = config(images=16, learning_rate=1e-30, **changes)
    images.Run.train(longer, DATA, tmp_path / "from-net", progress=False)
    with pytest.raises(SettingError, match="init_from: there is no folder"):
        images.Run.train(longer, DATA, tmp_path / "new")
    other = config(init_from=str(tmp_path / "net"), process={"name": "CLD"})
    with pytest.raises(SettingError, match=r"training\.init_from: weights of .*net cannot be used"):
        trained(tmp_path / "other", other)


@pytest.mark.parametrize(
    ("changes", "distances", "kept"),
    [
        ({}, {}, [24, 32]),
        ({"snapshots_by": "fd", "measure": "fd"}, {8: 3.0, 16: 1.0, 24: 4.0, 32: 2.0}, [16, 32]),
    ],
)
def test_the_last_or_best_snapshots_are_kept(tmp_path, monkeypatch, changes, distances, kept):
    values = iter(distances.values())
    monkeypatch.setattr(
        *(loop.Evaluation, "measure"), lambda *_: {"fd": {"frechet_distance": next(values)}}
    )
    trained(tmp_path, config(save_every=8, snapshots=2, measure_samples=2, **changes))
    files = (tmp_path / "snapshots").glob("*.safetensors")
    assert sorted(int(file.stem) for file in files) == kept
    assert {line["images"]: line["fd"] for line in metrics(tmp_path) if "fd" in line} == distances


def test_snapshots_and_raw_weights_are_loaded_by_their_file(tmp_path):
    trained(tmp_path, config(save_every=8, snapshots=2, images=24))
    snapshots = sorted((tmp_path / "snapshots").glob("*.safetensors"))
    loaded = [load_model(file) for file in (*snapshots, tmp_path, tmp_path / STATE)]
    assert [one.images_seen for one in loaded] == [16, 24, 24, 24]
    assert_same_bits(loaded[1].model, loaded[2].model)
    assert len({one.digest for one in loaded}) == 3  # the last snapshot is the model
    trained(tmp_path / "raw", config(images=8, ema_decay=0.0))
    average, raw = (load_model(tmp_path / "raw" / name) for name in (MODEL, STATE))
    assert_same_bits(average.model, raw.model)
    with pytest.raises(ValueError, match=r"has no snapshots/000000000008\.safetensors"):
        load_model(tmp_path / "snapshots/000000000008.safetensors")


@pytest.mark.usefixtures("untrained_classifier")
def test_the_distance_is_that_of_an_evaluation_of_the_same_seeds(tmp_path):
    settings = config(images=8, save_every=8, measure="fd", measure_samples=10)
    trained(tmp_path, settings)
    [found] = [line["fd"] for line in metrics(tmp_path) if "fd" in line]
    evaluation = Evaluation(data=DATA, samples=10, first_seed=2**31, batch=10, folder=tmp_path)
    [result] = evaluation.of_run(load_model(tmp_path), [settings.sampling], tmp_path / "x.jsonl")
    # The same images to the bit, and sums of float64 over all images and features.
    exact = pytest.approx(found, rel=rounding(len(DATA.train), 1e3), abs=0)
    assert result.numbers["fd"] == exact


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, inputs, outputs, *, classes=None, width: int = 4):
        super().__init__()
        first = nn.Conv2d(inputs * shape[0], width, 3, padding=1)
        last = nn.Conv2d(width, outputs * shape[0], 3, padding=1)
        self.layers = nn.Sequential(first, nn.BatchNorm2d(width), last)

    def forward(self, z, clock, label=None):
        return self.layers(z)
"""


def test_a_network_of_ones_own_is_trained_and_loaded_if_it_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    network, run = {"name": "own_network:Net", "options": {"width": 3}}, tmp_path / "run"
    model = trained(run, config(network=network, images=8))
    with pytest.raises(SettingError, match=r"own_network:Net, is code outside of cldsde"):
        images.Run.load(run)
    assert_same_bits(model, images.Run.load(run, trust=True).model)
    assert any("running_mean" in name and x.any() for name, x in model.named_buffers())
    with pytest.raises(SettingError, match=r"network\.options\.widht: unknown key; did you mean"):
        check_run(config(network={**network, "options": {"widht": 3}}), DATA)


def test_the_start_tells_of_data_model_and_device():
    text = " ".join(summary(config(), DATA, "cpu"))
    words = ["1,438 images of 1×8×8", "17 levels", "10 classes", "359 held out (20%)", "fp32"]
    assert [x for x in (*words, "VPSDE, UNet") if x not in text] == [], text


def test_a_run_is_trained_loaded_and_sampled_from_python(tmp_path):
    settings = config(images=8)
    run = images.Run.train(settings, DATA, tmp_path / "run", device="cpu", progress=False)
    again = images.Run.load(str(tmp_path / "run"))
    first, second = (one.sample(range(3), nfe=4) for one in (run, again))
    assert torch.equal(first.images, second.images)
    assert first.evaluations.tolist() == [4, 4, 4]
    assert images.as_array(first).shape == (3, 8, 8, 1)
    assert [picture.size for picture in images.as_pictures(first)] == [(8, 8)] * 3
    assert torch.equal(run.sample([2], nfe=4).images[0], first.images[2])
    assert repr(again.process) == repr(run.score.sde)
    with pytest.raises(SettingError, match="label: the network was not trained with classes"):
        run.sample(label=1)


def test_a_training_can_go_on_while_its_error_is_held(tmp_path, monkeypatch):
    """As a notebook holds it."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_signals", None)
        with pytest.raises(TypeError) as held:
            trained(tmp_path / "run", config(images=16))
    trained(tmp_path / "run", config(images=16))
    del held
