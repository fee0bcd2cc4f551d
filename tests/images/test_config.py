"""Configurations are read whole or rejected with an error that names the key."""

import copy
import json
import math
import tomllib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cldsde import CLD
from cldsde.errors import SettingError
from cldsde.images.config import RunConfig, load_config
from cldsde.images.schema import leaves, with_overrides
from cldsde.images.train.loop import check_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
VALID = {
    "seed": 3,
    "data": {"name": "digits", "options": {"held_out": 0.25}, "flip": False, "dequantise": True},
    "process": {"name": "CLD", "options": {"beta": [1.0, 7.0], "mass": 0.3}},
    "network": {"name": "UNet", "options": {"channels": [16, 32], "dropout": 0.1}}
    | {"conditional": True, "label_dropout": 0.2},
    "score": {"reference": "channel"},
    "training": {"images": 1000, "batch": 64, "micro_batch": 32, "learning_rate": 1e-3}
    | {"decay": "cosine", "clip": 0.5, "precision": "bf16"},
    "sampling": {"solver": "em", "nfe": 20, "grid": "quadratic", "t_end": 1e-3},
}


def with_value(path, value, values=VALID):
    changed = copy.deepcopy(values)
    section = changed
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = value
    return changed


def prepare(values):
    """Check a configuration as ``cldsde train`` does before it makes anything."""
    config = RunConfig.from_dict(values)
    check_run(config, config.data.load())


def test_runs_of_version_0_2_keep_their_digests():
    """The start of the digests that version 0.2.0 writes for these settings."""
    values = {"seed": 3, "data": {"name": "digits"}, "process": {"name": "CLD"}}
    config = RunConfig.from_dict({**values, "training": {"images": 64, "batch": 32}})
    found = [digest[:16] for digest in (config.model_digest(), config.training_digest())]
    assert found == ["f182bccd18ef8cc0", "e48e264e4bb51ebb"]


WRONG = st.sampled_from([None, {}, [], [[1.0]], "", "x", math.nan, -math.inf, -1, 2.5, True])
# Of the values above, one may be right for a key.
ALLOWED = {
    **dict.fromkeys(("data.flip", "data.dequantise", "network.conditional"), (True,)),
    **dict.fromkeys(("sampling.t_start", "sampling.t_end", "sampling.grid"), (None,)),
    "training.micro_batch": (None,),
    "training.clip": (None, 2.5),
    **dict.fromkeys(("process.options.mass", "process.options.beta"), (2.5,)),
    "training.learning_rate": (2.5,),
}


@settings(max_examples=max(40, 4 * settings().max_examples - 120))  # more than 1,000 if deep
@given(st.data())
def test_malformed_configurations_are_rejected_naming_the_key(data):
    """One fault in a valid configuration: a wrong value, an unknown key or a missing one."""
    name = data.draw(st.sampled_from(sorted(leaves(VALID))))
    path = name.split(".")
    fault = data.draw(st.sampled_from(["value", "unknown", "section"]))
    if fault == "value":
        value = data.draw(WRONG)
        if any(value is right or value == right for right in ALLOWED.get(name, ())):
            return
        changed, key = with_value(path, value), path[-1]
    elif fault == "unknown":
        letters = st.characters(codec="ascii", categories=["Ll"])
        key = path[-1] + data.draw(st.text(letters, min_size=1, max_size=3))
        changed = with_value((*path[:-1], key), 1)
    else:
        key, path = path[0], path[:1]
        if key == "seed":
            return
        changed = copy.deepcopy(VALID)
        changed[key] = data.draw(st.one_of(st.none(), st.integers(), st.text(max_size=3)))
    with pytest.raises(SettingError) as caught:
        prepare(changed)
    # Lower layers name their arguments in words: their error has the key of the section.
    full, error = ".".join((*path[:-1], key)), caught.value
    section, _, last = full.rpartition(".")
    named = f"{error.key}.".startswith(f"{full}.")
    assert named or (error.key == section and error.reason.startswith(last)), error


def test_a_configuration_goes_through_every_format(tmp_path):
    """In TOML a word stands for None; short names of solvers become the full ones."""
    config = RunConfig.from_dict(VALID)
    assert config.training.steps == 16
    assert config.process.make().drift(0.5).tolist() == CLD((1.0, 7.0), 0.3).drift(0.5).tolist()
    assert RunConfig.from_dict(config.to_dict()) == config
    toml, values = config.to_toml(), config.to_dict()
    assert tomllib.loads(toml)["latent"] == "none"
    assert values["sampling"]["solver"] == "euler-maruyama"
    marked = "\ufeff" + toml  # by some editors, of the order of bytes
    texts = [(".toml", marked), (".json", json.dumps(values)), (".yaml", yaml.safe_dump(values))]
    for suffix, text in texts:
        file = tmp_path / f"config{suffix}"
        file.write_text(text, encoding="utf-8")
        assert load_config(file).to_dict() == values


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_configurations_of_the_repository_are_valid(file):
    load_config(file)


def test_overrides_are_put_in_place(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[training]\nimages = 100\n")
    words = ["training.batch=32", "training.clip=none", "process.options.beta=[1, 3]"]
    config = load_config(file, words)
    assert (config.training.batch, config.training.clip) == (32, None)
    assert config.process.options == {"beta": (1, 3)}


FLOW = ["process={name='RectifiedFlow'}", "score.reference=scalar", "score.prediction=flow"]
LATENT = ["data.dequantise=false", "score.reference=scalar", "latent.pretraining=64"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.optimiser=Adm"], r"training\.optimiser: .*did you mean Adam\?"),
        (["training.optimiser_options.bets=1"], r"training\.optimiser_options: .*'bets'"),
        (["training.optimiser_options.differentiable=true"], r"optimiser_options: .*leaf"),
        (["training.ema_decays=0.999"], r"training\.ema_decays: must be a list; got 0\.999"),
        (["training.times=mode", "training.weighting=likelihood"], "'reweighted' if times is 'mo"),
        (["data.name=folder", "data.options={path='x', size=8, cache=''}"], "cache: must not be e"),
        (["network.options.channels=[1099511627776]"], "channels.*: must be less than .* 16384"),
        (["network.name=NCSNpp", "network.options={channels=[8], fur=true}"], r"options\.fur"),
        (["network.name=NCSNpp", "network.options={channels=[8], fir=1}"], r"options\.fir"),
        (["network.name=NCSNpp", "network.options={fir=true}"], r"options\.channels: is missing"),
        (["training.snapshots_by=fd"], r"snapshots_by: 'fd' needs training\.measure"),
        (["training.snapshots_by=held_out_loss", "data.options={held_out=0}"], "needs held-out im"),
        (["seed.x=1", "seed.x.y=3"], "not a section"),
        (["seed=" + "[" * 5000], r"seed: must be a valid integer; got '\[\["),
        (["score.prediction=flow"], "score.prediction: must be 'noise' .* CLD, which has 2"),
        ([*FLOW, "score.mixing=-3"], "score.mixing: must be None if prediction is 'flow'"),
        ([*FLOW, "training.conditioning=all"], "training.conditioning: must be 'data' if score"),
        (["latent.pretraining=64"], r"data\.dequantise"),
        ([*LATENT, "score.reference=pixel"], r"score\.reference"),
        ([*LATENT, "latent.pretraining=1000"], r"latent\.pretraining"),
        ([*LATENT, "latent.blocks=100000"], "latent.blocks: must be less than .* 256"),
        ([*LATENT, "latent.channel=3"], r"latent\.channel: unknown key; did you mean channels"),
        ([*LATENT, "latent.channels=[8, 16]"], "latent: groups must divide each of the ch"),
        ([*LATENT, "latent.channels=[16, 16, 16, 16, 16]"], r"latent: channels .* divisible"),
        ([*LATENT, "network.options.channels=[16, 16, 16, 16]"], r"network\.options: channels"),
    ],
    ids=lambda words: str(words[-1])[:60],
)
def test_settings_that_do_not_fit_are_rejected_by_their_keys(words, message):
    with pytest.raises(SettingError, match=message):
        prepare(with_overrides(VALID, words))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "training = ["),
        ("a.yaml", "- 1\n- 2"),
        ("a.yaml", "? [1]\n: 2"),
        ("a.yaml", "training: !!python/object/apply:os.getcwd []"),
        ("a.yaml", "training: {images: 640, images: 3}"),
        ("a.yaml", "data: &all\n  options: *all\n"),
        ("a.json", '{"training": {"images": 640, "images": 3}}'),
        ("a.txt", "seed = 1"),
    ],
)
def test_files_that_are_no_configuration_are_rejected_by_name(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingError, match=name):
        load_config(tmp_path / name)


def test_the_digest_of_a_model_does_not_depend_on_training():
    config = RunConfig.from_dict(VALID)
    longer = RunConfig.from_dict(with_value(("training", "images"), 2000))
    other = RunConfig.from_dict(with_value(("process", "options", "mass"), 0.31))
    digest, *others = (some.model_digest() for some in (config, longer, other))
    assert others[0] == digest != others[1]
    places = ({}, {"workers": 2}, {"path": "elsewhere"})
    data = [{"name": "folder", "options": {"path": ".", "size": 8, **place}} for place in places]
    folders = [RunConfig.from_dict({**VALID, "data": some}) for some in data]
    assert len({some.model_digest() for some in folders}) == 1
