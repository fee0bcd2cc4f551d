"""The command ``cldsde validate --posterior``."""

from __future__ import annotations

import json
import sys

import pytest

from cldsde.cli import main
from command import refused

SAMPLER = """\
def exact(process, observation, times, n, generator):
    return process.score.data.condition(observation).sample(n, generator=generator)


def biased(process, observation, times, n, generator):
    return process.score.data.sample(n, generator=generator)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "my_posterior.py").write_text(SAMPLER)
    yield tmp_path
    sys.modules.pop("my_posterior", None)


PLANE = ("--posterior", "--quick", "--problem", "two modes")


def test_a_sampler_of_ones_own_passes_if_it_is_exact(here, capsys):
    file = here / "found.json"
    words = (*PLANE, "--sampler", "my_posterior:exact", "--json", str(file))
    assert main(["validate", *words]) == 0
    out = capsys.readouterr().out
    assert "my_posterior:exact" in out
    assert "planted: must fail" in out
    exact, *planted = json.loads(file.read_text())["posterior"]
    assert exact["verdict"] == "PASS"
    assert [error["verdict"] for error in planted] == ["FAIL", "FAIL"]


@pytest.mark.usefixtures("here")
def test_a_sampler_of_ones_own_fails_if_it_is_not(capsys):
    assert main(["validate", *PLANE, "--sampler", "my_posterior:biased"]) == 1
    assert "not the exact posterior that it claims" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sampler", "my_posterior:exact"), "add --posterior"),
        (("--posterior", "--solver", "em"), "--solver does not go with --posterior"),
        (("--posterior", "--problem", "CLD"), "--problem must be one of 'two modes'"),
        (("--posterior", "--sampler", "my_posterior:none"), "cannot be loaded"),
        (("--posterior", "--sampler", "my_posterior:__name__"), "must be a function"),
    ],
)
@pytest.mark.usefixtures("here")
def test_options_that_do_not_fit_are_refused(words, message, capsys):
    assert message in refused(capsys, "validate", *words)
