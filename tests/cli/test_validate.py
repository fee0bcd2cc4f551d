"""The command ``cldsde validate``: verdicts as exit codes, files, rejections and interruption."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cldsde
from cldsde.cli import main, validate
from cldsde.solvers import named_solvers
from cldsde.validation import problems
from cldsde.validation.report import Report
from command import rejected

# A user's solvers: Euler–Maruyama with coefficients of mid time, and what can be wrong with it.
MODULE = '''\
import shutil
from dataclasses import dataclass

import torch

from cldsde.solvers.authoring import AffineSolver, Facts, Stage, Stages, as_blocks


@dataclass(frozen=True, kw_only=True)
class CentredEuler(AffineSolver):
    CLAIMS = {"weak_order": 1}

    @property
    def facts(self):
        return Facts(applies_to="every linear SDE", nfe_per_step=1, **self.CLAIMS)

    def prepare(self, process, times):
        sde, middle = process.sde, (times[:-1] + times[1:]) / 2
        h = -times.diff()[:, None, None]
        F, G = sde.drift(middle), sde.diffusion(middle)
        state = torch.eye(sde.components, dtype=torch.float64) - h * F
        score = h * (G @ G.mT)[..., list(sde.driven)]
        noise = as_blocks(h.sqrt() * G)
        return Stages.of(Stage(as_blocks(state), as_blocks(score), noise=noise))


class Claiming(CentredEuler):
    CLAIMS = {"weak_order": 2}


class Doubtful(CentredEuler):
    CLAIMS = {"weak_order": 1.25}


class Unproven(CentredEuler):
    CLAIMS = {"weak_order": 1, "strong_order": 1}


class Wordy(CentredEuler):
    CLAIMS = {"weak_order": "1"}


class Undeclared(CentredEuler):
    @property
    def facts(self):
        raise RuntimeError("facts\\nin two lines")


class Broken(CentredEuler):
    def step(self, z, *arguments):
        return super().step(z, *arguments)[0] * float("nan"), ()


class Raising(CentredEuler):
    def step(self, z, *arguments):
        return z[:, 7], ()


class Growing(CentredEuler):
    def step(self, z, *arguments):
        return 3 * super().step(z, *arguments)[0], ()


class Leaving(CentredEuler):
    def step(self, z, *arguments):
        raise SystemExit(0)


class Drawing(CentredEuler):
    def step(self, z, *arguments):
        z, memory = super().step(z, *arguments)
        return z + 0.1 * torch.randn_like(z), memory


class Late(CentredEuler):
    """Breaks for the number of states of the diagram of work, which no check has."""

    def step(self, z, *arguments):
        if len(z) == 8192:
            raise RuntimeError("too\\nmany")
        return super().step(z, *arguments)


class Interrupted(CentredEuler):
    """Interrupted on processes of two components."""

    def step(self, z, *arguments):
        if z.shape[1] == 2:
            raise KeyboardInterrupt
        return super().step(z, *arguments)


class Removing(CentredEuler):
    def prepare(self, process, times):
        shutil.rmtree("gone", ignore_errors=True)
        return super().prepare(process, times)


@dataclass(frozen=True, kw_only=True)
class Needy(CentredEuler):
    option: float


class Key(CentredEuler):
    def __init__(self):
        raise KeyError("no\\nkey")


class Exit(CentredEuler):
    def __init__(self):
        raise SystemExit(0)
'''
QUICK = "--quick --problem CLD"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a module of solvers; changes of the search path are undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "my.py").write_text(MODULE)
    (tmp_path / "my_typo.py").write_text("class Mine(:\n")
    (tmp_path / "my_raising.py").write_text("raise RuntimeError('no module\\ntoday')\n")
    (tmp_path / "my_leaving.py").write_text("raise SystemExit('bye')\n")
    yield tmp_path
    for name in ("my", "my_typo", "my_raising", "my_leaving"):
        sys.modules.pop(name, None)


def run(arguments: str) -> int:
    return main(["validate", *arguments.split()])


def read(file: Path) -> dict[str, Any]:
    """A report, in strict JSON."""
    no_json = lambda token: pytest.fail(f"{token} is no JSON")  # noqa: E731
    result: dict[str, Any] = json.loads(file.read_text(), parse_constant=no_json)
    return result


def test_solvers_that_keep_their_claims_pass_with_a_report_and_a_page(capsys, here):
    """Also a solver of one's own, found in the current folder."""
    solvers = "--solver sscs --solver my:CentredEuler --solver em"
    assert run(f"{QUICK} {solvers} --out deep/page --json deep/page/report.json") == 0
    captured = capsys.readouterr()
    line, count = [line for line in captured.out.splitlines() if line.startswith("sscs")]
    assert line.split("  ")[0] == "sscs: weak order"
    assert "1 PASS" in line
    assert count.split("  ")[0] == "sscs: NFE per step"
    page = here / "deep" / "page" / "index.html"
    assert captured.out.endswith(f"\n3 of 3 pass.\nThe page is {page.resolve()}\n")
    assert {file.name for file in page.parent.iterdir()} == {"index.html", "report.json"}
    # Work and precision on CLD, and the errors of the three solvers.
    assert page.read_text(encoding="utf-8").count("data:image/svg+xml;base64,") == 4
    report = read(page.with_name("report.json"))
    own, em = "my:CentredEuler", "euler-maruyama"
    assert report["summary"] == {"sscs": "PASS", own: "PASS", em: "PASS"}
    assert (report["complete"], report["cldsde"]) == (True, cldsde.__version__)
    kinds = {"sscs": ["weak order"], own: ["weak order"], em: ["weak order", "strong order"]}
    assert [(check["subject"], check["kind"]) for check in report["checks"]] == [
        (name, kind) for name in kinds for kind in (*kinds[name], "NFE per step")
    ]
    for check in [check for check in report["checks"] if check["estimate"]]:
        assert (check["verdict"], check["problem"]) == ("PASS", "CLD")
        assert abs(check["measured"] - 1) < 0.1
        assert len(check["estimate"]["levels"]) == 5
    (table,) = report["work_precision"]
    assert (table["problem"], table["metric"]) == ("CLD", "moments")
    assert {point["solver"] for point in table["points"]} == set(kinds)


@pytest.mark.parametrize(
    ("arguments", "words", "last", "summary"),
    [
        (
            f"{QUICK} --solver my:Claiming",
            "my:Claiming, weak order on CLD: The order ",
            "error: 1 of 1 failed: my:Claiming",
            {"my:Claiming": "FAIL"},
        ),
        (
            f"{QUICK} --solver my:Doubtful",
            "Inconclusive checks: 1 of 2 of my:Doubtful",
            "are inconclusive, because no problem confirmed a declared order: my:Doubtful",
            {"my:Doubtful": "INCONCLUSIVE"},
        ),
        (
            f"{QUICK} --solver my:Drawing",
            "different results; does the solver draw noise outside `noise.normal`?",
            "error: 1 of 1 failed: my:Drawing",
            {"my:Drawing": "FAIL"},
        ),
        (
            f"{QUICK} --solver my:Late --solver sscs --out page",
            "my:Late, work and precision on CLD: RuntimeError: too many",
            "error: 1 of 2 failed: my:Late",
            {"my:Late": "FAIL", "sscs": "PASS"},
        ),
        (
            "--quick --problem VE --solver sscs",
            "SSCS needs",
            "error: --solver sscs was not measured: ",
            {},
        ),
        (
            f"{QUICK} --solver predictor-corrector",
            "predictor-corrector declares no order, and its samples were not checked",
            "error: ",
            {"predictor-corrector": "INCONCLUSIVE"},
        ),
    ],
)
def test_solvers_that_are_not_confirmed_are_no_success(
    capsys, here, arguments, words, last, summary
):
    assert run(f"{arguments} --json report.json") == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert last in captured.err.splitlines()[-1]
    assert read(here / "report.json")["summary"] == summary


@pytest.mark.usefixtures("here")
def test_the_table_says_why_nothing_confirms_an_order(capsys):
    assert run("--quick --problem VP --problem CLD --solver my:Unproven") == 1
    _, reasons, closing = capsys.readouterr().out.split("\n\n")
    assert reasons == (
        "my:Unproven, strong order on VP, CLD: `strong_order=1` is declared but `path_noise` is "
        "missing: implement it or drop the claim"
    )
    assert closing == "0 of 1 pass.\n"


def test_broken_solvers_do_not_keep_others_from_their_report(capsys, here):
    names = ["Broken", "Raising", "Growing", "Leaving", "Undeclared", "Wordy"]
    broken = " ".join(f"--solver my:{name}" for name in names)
    assert run(f"{QUICK} {broken} --solver sscs --json report.json --out page") == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    reasons = captured.err.rpartition("\n\n")[2].splitlines()
    assert reasons.pop().startswith("cldsde validate: error: 6 of 7 failed: my:Broken, my:Raising")
    assert {reason.partition(",")[0] for reason in reasons} == {f"my:{name}" for name in names}
    report = read(here / "report.json")
    assert report["complete"] is True
    assert report["summary"] == {f"my:{name}": "FAIL" for name in names} | {"sscs": "PASS"}
    assert "sscs: weak order" in captured.out
    assert (here / "page" / "index.html").exists()


def test_distributions_of_solvers_are_measured_on_rings_and_drawn(capsys, here):
    arguments = ["validate", "--quick", "--problem", "CLD, ring", "--solver", "sscs"]
    assert main([*arguments, "--out", "page", "--json", "ring.json"]) == 0
    report = read(here / "ring.json")
    (check,) = report["checks"]
    found = (check["kind"], check["problem"], check["verdict"], check["declared"])
    assert found == ("distribution", "CLD, ring", "PASS", None)
    assert 0 < check["measured"] < 1  # of the allowed error
    text = f"{check['measured']:.2f} of the allowed error"
    assert text in capsys.readouterr().out
    assert text in (here / "page" / "index.html").read_text(encoding="utf-8")
    assert "sliced W₂" in check["message"]
    assert "modes' spread" in check["message"]
    (table,) = report["work_precision"]
    assert (table["problem"], table["metric"]) == ("CLD, ring", "spread")
    assert all(point["error"] > 0 for point in table["points"])


def test_the_seed_decides_on_samples(here):
    for file, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert run(f"{QUICK} --solver em --seed {seed} --json {file}") == 0
    first, again, other = (
        [check["measured"] for check in read(here / file)["checks"]] for file in "abc"
    )
    assert first == again
    assert first[0] == other[0]  # the weak order is exact
    assert first[1] != other[1]


class Limited(io.TextIOWrapper):
    """A stdout of Windows before UTF-8."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="cp1252")


class Full(io.StringIO):
    """A file on a disk without space."""

    def flush(self) -> None:
        if self.getvalue():
            raise OSError(28, "No space left on device")


def test_letters_that_the_terminal_does_not_know_are_replaced(monkeypatch, here):
    out = Limited()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(Report, "to_text", lambda self: "sscs: W₂ is 0.1")
    assert run(f"{QUICK} --solver sscs --json report.json") == 0
    assert read(here / "report.json")["complete"] is True
    assert out.buffer.getvalue().decode("cp1252").startswith("sscs: W? is 0.1")


def test_a_table_that_cannot_be_printed_is_no_success(capsys, monkeypatch, here):
    monkeypatch.setattr(sys, "stdout", Full())
    assert run(f"{QUICK} --solver sscs --json report.json") == 1
    assert "the table cannot be printed: OSError" in capsys.readouterr().err.splitlines()[-1]
    assert read(here / "report.json")["complete"] is True


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Windows break otherwise")
def test_results_are_written_if_nobody_reads_the_table(here):
    """As of ``cldsde validate | head -0``."""
    command = [sys.executable, "-m", "cldsde", "validate", *QUICK.split(), "--solver", "sscs"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as broken:
        result = subprocess.run(
            [*command, "--json", "report.json"],
            stdout=broken,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=here,
        )
    assert result.returncode == 0, result.stderr
    assert "Broken" not in result.stderr
    report = read(here / "report.json")
    assert (report["complete"], report["summary"]) == (True, {"sscs": "PASS"})


@pytest.fixture
def unworkable(monkeypatch):
    """Fail on any work."""
    monkeypatch.setattr(validate, "checks", lambda *_, **__: pytest.fail("work was done"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--solver", "sscss"], ["'sscss'", "module:ClassName", *named_solvers()]),
        (["--solver", "cldsde.solvers:NoSuchSolver"], ["NoSuchSolver"]),
        (["--solver", "json:JSONDecoder"], ["must be a solver"]),
        (["--solver", "cldsde.solvers:Solver"], ["cldsde.solvers:Solver"]),
        (["--solver", "my:Needy"], ["my:Needy"]),
        (["--solver", "my:Key"], ["my:Key", "KeyError"]),
        (["--solver", "my:Exit"], ["my:Exit", "SystemExit"]),
        (["--solver", "my_typo:Mine"], ["my_typo"]),
        (["--solver", "my_raising:Mine"], ["my_raising:Mine", "RuntimeError: no module today"]),
        (["--solver", "my_leaving:Mine"], ["my_leaving:Mine", "SystemExit: bye"]),
        (["--problem", "CLD, rotation", "--solver", "sscs"], ["'CLD, rotation'", "sscs"]),
        (["--problem", "VP, two points", "--solver", "sscs"], ["'VP, two points'", "no check"]),
        (["--problem", "CLDD"], ["'CLDD'", *map(repr, problems())]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", "9223372036854775808"], ["--seed"]),
        (["--json", ""], ["--json"]),
        (["--json", "x" * 252], ["name too long"]),
        (["--json", "taken.json"], ["taken.json.part"]),
        (["--json", "no_such_folder/report.json"], ["no_such_folder"]),
        (["--json", "/proc/report.json"], ["/proc"]),
        (["--out", "new", "--json", f"new/{'x' * 252}"], ["name too long"]),
        (["--out", ""], ["--out"]),
        (["--out", "file"], ["file"]),
        (["--out", "full"], ["index.html"]),
        (["--out", "/proc/page"], ["/proc"]),
        (["--quik"], ["quik"]),
    ],
    ids=lambda words: " ".join(words)[:40] if words[0].startswith("--") else None,
)
@pytest.mark.usefixtures("unworkable")
def test_wrong_arguments_are_rejected_before_any_work(capsys, here, arguments, words):
    (here / "file").write_text("text")
    (here / "taken.json.part").mkdir()
    (here / "full" / "index.html").mkdir(parents=True)
    before = sorted(here.iterdir())
    message = rejected(capsys, "validate", "--quick", *arguments)
    assert message.startswith("cldsde")
    assert all(word in message for word in words)
    left = sorted(file for file in here.iterdir() if file.name != "__pycache__")
    assert left == before
    assert (here / "file").read_text() == "text"


def test_an_interruption_keeps_finished_checks(capsys, here):
    (here / "report.json").write_text("of another time")
    words = "--quick --problem VP --problem CLD --solver my:Interrupted"
    assert run(f"{words} --json report.json --out page") == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("cldsde validate: interrupted")
    assert "Traceback" not in captured.err
    report = read(here / "report.json")
    assert report["complete"] is False
    made = [(check["problem"], check["kind"], check["verdict"]) for check in report["checks"]]
    assert made == [("VP", "weak order", "PASS"), ("VP", "NFE per step", "PASS")]
    assert "my:Interrupted: weak order" in captured.out
    assert "interrupted, incomplete" in (here / "page" / "index.html").read_text()
    assert not list(here.glob("*.part"))
    assert run(f"{QUICK} --solver my:Interrupted --json report.json") == 130
    report = read(here / "report.json")
    assert (report["complete"], report["checks"]) == (False, [])
    assert capsys.readouterr().out.split()[:2] == ["declared", "measured"]


def test_results_that_cannot_be_written_are_printed_and_other_files_are_kept(
    capsys, here, monkeypatch
):
    (here / "gone").mkdir()
    assert run(f"{QUICK} --solver my:Removing --json gone/report.json --out page") == 1
    captured = capsys.readouterr()
    assert "my:Removing: weak order" in captured.out
    assert captured.err.count("retried at the end") == 1
    last = captured.err.splitlines()[-1]
    assert last.startswith("cldsde validate: error: --json cannot be written: FileNotFoundError")
    assert "weak order" in (here / "page" / "index.html").read_text(encoding="utf-8")

    def fail(self: Report, folder: Path) -> None:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(Report, "write_html", fail)
    assert run(f"{QUICK} --solver sscs --out page --json report.json") == 1
    captured = capsys.readouterr()
    assert "--out cannot be written: RuntimeError: no fonts" in captured.err.splitlines()[-1]
    assert read(here / "report.json")["summary"] == {"sscs": "PASS"}
    assert "sscs: weak order" in captured.out


@pytest.mark.slow
def test_the_quick_validation_of_the_package_passes(here):
    assert run("--quick --json all.json") == 0
    report = read(here / "all.json")
    assert set(report["summary"]) == {"kernels", *named_solvers()}
    assert "FAIL" not in report["summary"].values()


SAMPLER = """\
def exact(process, observation, times, n, generator):
    return process.score.data.condition(observation).sample(n, generator=generator)


def biased(process, observation, times, n, generator):
    return process.score.data.sample(n, generator=generator)
"""
TWO_MODES = ["validate", "--posterior", "--quick", "--problem", "two modes", "--sampler"]


@pytest.mark.parametrize("name", ["exact", "biased"])
def test_a_posterior_sampler_of_ones_own_passes_only_if_it_is_exact(here, capsys, name):
    with (here / "my.py").open("a") as file:
        file.write(SAMPLER)
    code = main([*TWO_MODES, f"my:{name}", "--json", "found.json"])
    captured = capsys.readouterr()
    own, *planted = [row["verdict"] for row in read(here / "found.json")["posterior"]]
    assert (code, own) == ((0, "PASS") if name == "exact" else (1, "FAIL"))
    assert planted == ["FAIL", "FAIL"]
    assert "planted: must fail" in captured.out
    assert ("not the exact posterior that it claims" in captured.err) == (name == "biased")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--sampler my:exact", "add --posterior"),
        ("--posterior --solver em", "--solver does not go with --posterior"),
        ("--posterior --problem CLD", "--problem must be one of 'two modes'"),
        ("--posterior --sampler my:none", "cannot be loaded"),
        ("--posterior --sampler my:__name__", "must be a function"),
    ],
)
@pytest.mark.usefixtures("here")
def test_wrong_arguments_of_posteriors_are_rejected(arguments, words, capsys):
    assert words in rejected(capsys, "validate", *arguments.split())
