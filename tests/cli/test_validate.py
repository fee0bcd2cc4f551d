"""The command ``cldsde validate``: verdicts as exit codes, files, refusals, and interruption."""

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
from command import refused

# What a user may write: Euler–Maruyama with coefficients of mid time.
EXAMPLE = '''\
from dataclasses import dataclass

import torch

from cldsde.solvers.authoring import AffineSolver, Facts, Stage, Stages, as_blocks


@dataclass(frozen=True, kw_only=True)
class CentredEuler(AffineSolver):
    """Euler–Maruyama with coefficients of mid time."""

    @property
    def facts(self):
        return Facts(applies_to="every linear SDE", nfe_per_step=1, weak_order=1)

    def prepare(self, process, times):
        sde, middle = process.sde, (times[:-1] + times[1:]) / 2
        h = -times.diff()[:, None, None]
        F, G = sde.drift(middle), sde.diffusion(middle)
        state = torch.eye(sde.components, dtype=torch.float64) - h * F
        score = h * (G @ G.mT)[..., list(sde.driven)]
        noise = as_blocks(h.sqrt() * G)
        return Stages.of(Stage(as_blocks(state), as_blocks(score), noise=noise))
'''
QUICK = ("validate", "--quick", "--problem", "CLD")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to stand in; what the command does to the search path is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def run(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)  # what argparse says, never a user's solver


def read(file: Path) -> dict[str, Any]:
    """A report, strictly."""

    def refuse(token: str) -> None:
        pytest.fail(f"{token} is no JSON")

    result: dict[str, Any] = json.loads(file.read_text(), parse_constant=refuse)
    return result


@pytest.fixture
def unworkable(monkeypatch):
    """Fail on any work."""

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("work was done")

    monkeypatch.setattr(validate, "checks", fail)


def test_a_solver_that_keeps_its_word_passes(capsys, here):
    assert run(*QUICK, "--solver", "sscs") == 0
    captured = capsys.readouterr()
    line, count = [line for line in captured.out.splitlines() if line.startswith("sscs")]
    assert line.split("  ")[0] == "sscs: weak order"
    assert count.split("  ")[0] == "sscs: NFE per step"
    assert "1 PASS" in line
    assert "CLD" in line
    assert "checks" in captured.err
    assert not list(here.iterdir())


def test_a_solver_that_claims_too_much_fails_with_a_reason(capsys, here):
    (here / "my_claim.py").write_text(EXAMPLE.replace("weak_order=1", "weak_order=2"))
    code = run(*QUICK, "--solver", "my_claim:CentredEuler", "--json", "claim.json")
    captured = capsys.readouterr()
    assert code == 1
    assert "1 FAIL" in captured.out
    assert captured.err.splitlines()[-1] == (
        "cldsde validate: error: 1 of 1 failed: my_claim:CentredEuler"
    )
    reason = captured.err.splitlines()[-2]
    assert reason.startswith("my_claim:CentredEuler, weak order on CLD: The order ")
    assert "below the declared 2" in reason
    report = read(here / "claim.json")
    assert report["complete"] is True
    assert report["summary"] == {"my_claim:CentredEuler": "FAIL"}


def test_a_solver_of_ones_own_is_found_where_the_user_stands(tmp_path):
    """Through a process of its own, isolated, so that only the command looks in the folder."""
    (tmp_path / "my_solver.py").write_text(EXAMPLE)
    solvers = ["--solver", "my_solver:CentredEuler", "--solver", "em"]
    result = subprocess.run(
        [sys.executable, "-I", "-m", "cldsde", *QUICK, *solvers, "--json", "report.json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    assert result.returncode == 0, result.stderr
    assert "my_solver:CentredEuler: weak order" in result.stdout
    assert result.stdout.endswith("\n2 of 2 pass.\n")
    report = read(tmp_path / "report.json")
    assert report["summary"] == {"my_solver:CentredEuler": "PASS", "euler-maruyama": "PASS"}
    assert report["complete"] is True
    assert report["cldsde"] == cldsde.__version__
    assert [(c["subject"], c["kind"]) for c in report["checks"]] == [
        ("my_solver:CentredEuler", "weak order"),
        ("my_solver:CentredEuler", "NFE per step"),
        ("euler-maruyama", "weak order"),
        ("euler-maruyama", "strong order"),
        ("euler-maruyama", "NFE per step"),
    ]
    for check in [c for c in report["checks"] if c["estimate"]]:
        assert check["verdict"] == "PASS"
        assert abs(check["measured"] - 1) < 0.1
        assert check["problem"] == "CLD"
        assert len(check["estimate"]["levels"]) == 5


def test_a_page_is_written_with_a_diagram_of_work(capsys, here):
    assert run(*QUICK, "--solver", "sscs", "--out", "deep/page", "--json", "report.json") == 0
    captured = capsys.readouterr()
    page = here / "deep" / "page" / "index.html"
    assert str(page.resolve()) in captured.out
    assert sorted(file.name for file in page.parent.iterdir()) == ["index.html"]
    text = page.read_text(encoding="utf-8")
    # Work and precision on CLD, and the errors of the solver.
    assert text.count("data:image/svg+xml;base64,") == 2
    (table,) = read(here / "report.json")["work_precision"]
    assert (table["problem"], table["metric"]) == ("CLD", "moments")
    assert {point["solver"] for point in table["points"]} == {"sscs"}


def test_the_help_names_what_makes_the_exit_code_1(capsys):
    assert run("validate", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for cause in (
        "a check fails",
        "no problem confirms",
        "no problem applies",
        "cannot be written",
    ):
        assert cause in text


def test_a_seed_decides_what_is_sampled(capsys, here):
    for file, seed in (("a.json", "5"), ("b.json", "5"), ("c.json", "6")):
        assert run(*QUICK, "--solver", "euler-maruyama", "--seed", seed, "--json", file) == 0
    first, again, other = (
        [check["measured"] for check in read(here / file)["checks"]]
        for file in ("a.json", "b.json", "c.json")
    )
    assert first == again
    assert first[0] == other[0]
    assert first[1] != other[1]


class Limited(io.TextIOWrapper):
    """A stdout of Windows before UTF-8."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="cp1252")


def test_letters_that_the_terminal_does_not_know_cost_nothing(monkeypatch, here):
    out = Limited()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(Report, "to_text", lambda self: "sscs: W₂ is 0.1")
    assert run(*QUICK, "--solver", "sscs", "--json", "report.json", "--out", "page") == 0
    assert read(here / "report.json")["complete"] is True
    assert (here / "page" / "index.html").exists()
    printed = out.buffer.getvalue().decode("cp1252")
    assert printed.startswith("sscs: W? is 0.1")
    assert "The page is" in printed


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Windows break otherwise")
def test_results_are_written_where_nobody_reads_the_table(here):
    """As of ``cldsde validate | head -0``."""
    command = [sys.executable, "-m", "cldsde", *QUICK, "--solver", "sscs", "--json", "report.json"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as broken:
        result = subprocess.run(
            command, stdout=broken, stderr=subprocess.PIPE, text=True, check=False, cwd=here
        )
    assert result.returncode == 0, result.stderr
    assert "Broken" not in result.stderr
    report = read(here / "report.json")
    assert report["complete"] is True
    assert report["summary"] == {"sscs": "PASS"}


class Full(io.StringIO):
    """A file on a disk without space."""

    def flush(self) -> None:
        if self.getvalue():
            raise OSError(28, "No space left on device")


def test_a_table_that_cannot_be_printed_is_no_success(capsys, monkeypatch, here):
    monkeypatch.setattr(sys, "stdout", Full())
    assert run(*QUICK, "--solver", "sscs", "--json", "report.json") == 1
    assert "the table cannot be printed: OSError" in capsys.readouterr().err.splitlines()[-1]
    assert read(here / "report.json")["complete"] is True


UNMADE = (
    EXAMPLE
    + """

class Key(CentredEuler):
    def __init__(self):
        raise KeyError("no\\nkey")


class Leaving(CentredEuler):
    def __init__(self):
        raise SystemExit(0)
"""
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--solver", "sscss"], ["'sscss'", "module:ClassName", *named_solvers()]),
        (["--solver", "no_such_module_here:Solver"], ["no_such_module_here"]),
        (["--solver", "cldsde.solvers:NoSuchSolver"], ["NoSuchSolver"]),
        (["--solver", "json:JSONDecoder"], ["must be a solver"]),
        (["--solver", "cldsde.solvers:Solver"], ["cldsde.solvers:Solver"]),
        (["--solver", "my_needy:Needy"], ["my_needy:Needy"]),
        (["--solver", "my_typo:Mine"], ["my_typo"]),
        (["--solver", "my_raising:Mine"], ["my_raising:Mine", "RuntimeError: no module today"]),
        (["--solver", "my_leaving:Mine"], ["my_leaving:Mine", "SystemExit: bye"]),
        (["--solver", "my_unmade:Key"], ["my_unmade:Key", "KeyError"]),
        (["--solver", "my_unmade:Leaving"], ["my_unmade:Leaving", "SystemExit"]),
        (["--problem", "CLD, rotation", "--solver", "sscs"], ["'CLD, rotation'", "sscs"]),
        (["--problem", "VP, two points", "--solver", "sscs"], ["'VP, two points'", "no check"]),
        (["--json", "x" * 252], ["name too long"]),
        (["--json", "taken.json"], ["taken.json.part"]),
        (["--out", "full"], ["index.html"]),
        (["--problem", "CLDD"], ["'CLDD'", *map(repr, problems())]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", "9223372036854775808"], ["--seed"]),
        (["--seed", "x"], ["seed"]),
        (["--json", ""], ["--json"]),
        (["--json", "."], ["--json"]),
        (["--json", "no_such_folder/report.json"], ["no_such_folder"]),
        (["--json", "file/report.json"], ["file"]),
        (["--out", "new/page", "--json", "no_such_folder/report.json"], ["no_such_folder"]),
        (["--out", "new", "--json", f"new/{'x' * 252}"], ["name too long"]),
        (["--out", ""], ["--out"]),
        (["--out", "file"], ["file"]),
        (["--out", "file/page"], ["file"]),
        (["--quik"], ["quik"]),
    ],
    ids=lambda words: " ".join(words) if words[0].startswith("--") else None,
)
def test_what_is_not_understood_is_refused_before_any_work(
    capsys, here, unworkable, arguments, words
):
    (here / "file").write_text("text")
    (here / "my_typo.py").write_text("class Mine(:\n")
    (here / "my_raising.py").write_text("raise RuntimeError('no module\\ntoday')\n")
    (here / "my_leaving.py").write_text("raise SystemExit('bye')\n")
    (here / "my_unmade.py").write_text(UNMADE)
    (here / "taken.json.part").mkdir()
    (here / "full" / "index.html").mkdir(parents=True)
    (here / "my_needy.py").write_text(
        EXAMPLE.replace("CentredEuler", "Needy").replace(
            "    @property", "    option: float\n\n    @property"
        )
    )
    before = sorted(here.iterdir())
    message = refused(capsys, "validate", "--quick", *arguments)
    assert message.startswith("cldsde")
    assert all(word in message for word in words)
    left = sorted(file for file in here.iterdir() if file.name != "__pycache__")
    assert left == before
    assert (here / "file").read_text() == "text"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, which takes no new files")
def test_what_cannot_be_written_even_by_root_is_refused_before_any_work(capsys, here, unworkable):
    assert "/proc" in refused(capsys, *QUICK, "--solver", "sscs", "--json", "/proc/report.json")
    assert "/proc" in refused(capsys, *QUICK, "--solver", "sscs", "--out", "/proc/page")


def test_a_file_in_the_folder_of_the_page_is_written(capsys, here):
    """The folder is made by the same command."""
    code = run(*QUICK, "--solver", "sscs", "--out", "page", "--json", "page/report.json")
    assert code == 0, capsys.readouterr().err
    assert sorted(file.name for file in (here / "page").iterdir()) == ["index.html", "report.json"]


INTERRUPTED = (
    EXAMPLE
    + '''

class Interrupted(CentredEuler):
    """The user loses patience during the second problem."""

    def step(self, z, memory, tables, i, score, noise):
        if z.shape[1] == 2:
            raise KeyboardInterrupt
        return super().step(z, memory, tables, i, score, noise)
'''
)


def test_an_interruption_keeps_what_was_found(capsys, here):
    (here / "my_long.py").write_text(INTERRUPTED)
    (here / "report.json").write_text("of another time")
    code = run(
        *("validate", "--quick", "--problem", "VP", "--problem", "CLD"),
        *("--solver", "my_long:Interrupted", "--json", "report.json", "--out", "page"),
    )
    captured = capsys.readouterr()
    assert code == 130
    assert captured.err.splitlines()[-1].startswith("cldsde validate: interrupted")
    assert "Traceback" not in captured.err
    report = read(here / "report.json")
    assert report["complete"] is False
    made = [(c["problem"], c["kind"], c["verdict"]) for c in report["checks"]]
    assert made == [("VP", "weak order", "PASS"), ("VP", "NFE per step", "PASS")]
    assert "my_long:Interrupted: weak order" in captured.out
    assert "interrupted, incomplete" in (here / "page" / "index.html").read_text()
    assert not list(here.glob("*.part"))


def test_an_interruption_before_the_first_check_leaves_a_report_of_nothing(capsys, here):
    (here / "my_long.py").write_text(INTERRUPTED)
    code = run(*QUICK, "--solver", "my_long:Interrupted", "--json", "report.json")
    assert code == 130
    report = read(here / "report.json")
    assert report["complete"] is False
    assert report["checks"] == []
    assert capsys.readouterr().out.split()[:2] == ["declared", "measured"]


BROKEN = (
    EXAMPLE
    + '''

class Broken(CentredEuler):
    """States that are no numbers."""

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return z * float("nan"), memory


class Raising(CentredEuler):
    """A slip in a step."""

    def step(self, z, memory, tables, i, score, noise):
        return z[:, 7], ()


class Growing(CentredEuler):
    """States that grow without bound, and stay finite."""

    def step(self, z, memory, tables, i, score, noise):
        z, memory = super().step(z, memory, tables, i, score, noise)
        return 3 * z, memory


class Leaving(CentredEuler):
    """Ends the process in the middle of a step."""

    def step(self, z, memory, tables, i, score, noise):
        raise SystemExit(0)


class LeavingEarly(CentredEuler):
    def prepare(self, process, times):
        raise SystemExit(0)


class Undeclared(CentredEuler):
    @property
    def facts(self):
        raise RuntimeError("facts\\nin two lines")


class Wordy(CentredEuler):
    @property
    def facts(self):
        return Facts(applies_to="every linear SDE", nfe_per_step=1, weak_order="1")
'''
)


@pytest.mark.parametrize(
    "name", ["Broken", "Raising", "Growing", "Leaving", "LeavingEarly", "Undeclared", "Wordy"]
)
def test_a_broken_solver_does_not_keep_the_others_from_their_report(capsys, here, name):
    (here / "my_broken.py").write_text(BROKEN)
    code = run(
        *QUICK,
        *("--solver", f"my_broken:{name}", "--solver", "sscs"),
        *("--json", "report.json", "--out", "page"),
    )
    captured = capsys.readouterr()
    assert code == 1
    assert "Traceback" not in captured.err
    assert captured.err.splitlines()[-1] == (
        f"cldsde validate: error: 1 of 2 failed: my_broken:{name}"
    )
    reasons = captured.err.rpartition("\n\n")[2].splitlines()[:-1]
    assert reasons
    assert all(reason.startswith(f"my_broken:{name}, ") for reason in reasons)
    report = read(here / "report.json")
    assert report["complete"] is True
    assert report["summary"]["sscs"] == "PASS"
    assert report["summary"][f"my_broken:{name}"] == "FAIL"
    assert "sscs: weak order" in captured.out
    assert (here / "page" / "index.html").exists()


def test_a_solver_that_was_measured_nowhere_is_not_said_to_pass(capsys, here):
    """SSCS does not apply to VE: nothing is measured, and the user must learn so."""
    code = run("validate", "--quick", "--solver", "sscs", "--problem", "VE", "--json", "a.json")
    captured = capsys.readouterr()
    assert code == 1
    assert "sscs: not applicable" in captured.out
    assert "error: --solver sscs was not measured: SSCS needs" in captured.err
    assert read(here / "a.json")["summary"] == {}


def test_a_solver_without_an_order_is_not_said_to_pass_where_its_law_was_not_looked_at(
    capsys, here
):
    code = run(*QUICK, "--solver", "predictor-corrector", "--json", "a.json")
    captured = capsys.readouterr()
    assert code == 1
    assert "predictor-corrector declares no order, and its samples were not checked" in (
        captured.err
    )
    assert read(here / "a.json")["summary"] == {"predictor-corrector": "INCONCLUSIVE"}
    arguments = ("validate", "--quick", "--problem", "VP, ring", "--problem", "VP")
    assert run(*arguments, "--solver", "predictor-corrector", "--out", "page") == 0


def test_orders_that_nothing_confirms_are_no_success(capsys, here):
    (here / "my_doubt.py").write_text(EXAMPLE.replace("weak_order=1", "weak_order=1.25"))
    code = run(*QUICK, "--solver", "my_doubt:CentredEuler", "--json", "doubt.json")
    captured = capsys.readouterr()
    assert code == 1
    assert "Inconclusive checks: 1 of 2 of my_doubt:CentredEuler" in captured.err
    assert captured.err.splitlines()[-1] == (
        "cldsde validate: error: 1 of 1 are inconclusive, because no problem confirmed a declared "
        "order: my_doubt:CentredEuler"
    )
    report = read(here / "doubt.json")
    assert report["summary"] == {"my_doubt:CentredEuler": "INCONCLUSIVE"}
    assert report["inconclusive"] == {"my_doubt:CentredEuler": "1 of 2"}


def test_the_table_says_why_nothing_confirms_an_order(capsys, here):
    claims = EXAMPLE.replace("weak_order=1", "weak_order=1, strong_order=1")
    (here / "my_claims.py").write_text(claims)
    problems = ("--quick", "--problem", "VP", "--problem", "CLD")
    assert run("validate", *problems, "--solver", "my_claims:CentredEuler") == 1
    _, reasons, closing = capsys.readouterr().out.split("\n\n")
    assert reasons == (
        "my_claims:CentredEuler, strong order on VP, CLD: `strong_order=1` is declared but "
        "`path_noise` is missing: implement it or drop the claim"
    )
    assert closing == "0 of 1 pass.\n"


def test_a_solver_that_draws_its_own_noise_is_told_so(capsys, here):
    drawing = (
        EXAMPLE
        + """
    def step(self, z, *arguments):
        z, memory = super().step(z, *arguments)
        return z + 0.1 * torch.randn_like(z), memory
"""
    )
    (here / "my_drawing.py").write_text(drawing)
    assert run(*QUICK, "--solver", "my_drawing:CentredEuler") == 1
    reasons = capsys.readouterr().err.splitlines()
    text = "the same state and noise gave two different results; does the solver draw noise outside"
    for kind, name in (("weak order", ""), ("NFE per step", "")):
        found = f"my_drawing:CentredEuler, {kind} on CLD: ValueError: {name}{text} `noise.normal`?"
        assert found in reasons


REMOVING = (
    EXAMPLE
    + '''

class Removing(CentredEuler):
    """The folder of the results goes while they are made."""

    def prepare(self, process, times):
        import shutil

        shutil.rmtree("gone", ignore_errors=True)
        return super().prepare(process, times)
'''
)


def test_results_that_cannot_be_written_are_printed_and_the_page_is_kept(capsys, here):
    (here / "gone").mkdir()
    (here / "my_removing.py").write_text(REMOVING)
    code = run(
        *(*QUICK, "--solver", "my_removing:Removing"),
        *("--json", "gone/report.json", "--out", "page"),
    )
    captured = capsys.readouterr()
    assert code == 1
    assert "my_removing:Removing: weak order" in captured.out
    assert captured.err.count("retried at the end") == 1
    last = captured.err.splitlines()[-1]
    assert last.startswith("cldsde validate: error: --json cannot be written: FileNotFoundError")
    assert "Traceback" not in captured.err
    assert "weak order" in (here / "page" / "index.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_made_costs_no_numbers(capsys, here, monkeypatch):
    def fail(self: Report, folder: Path) -> None:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(Report, "write_html", fail)
    code = run(*QUICK, "--solver", "sscs", "--out", "page", "--json", "report.json")
    captured = capsys.readouterr()
    assert code == 1
    assert "--out cannot be written: RuntimeError: no fonts" in captured.err.splitlines()[-1]
    assert read(here / "report.json")["summary"] == {"sscs": "PASS"}
    assert "sscs: weak order" in captured.out


LATE = (
    EXAMPLE
    + '''

class Late(CentredEuler):
    """Breaks for as many states as work and precision have, which no check has."""

    def step(self, z, memory, tables, i, score, noise):
        if len(z) == 8192:
            raise RuntimeError("too\\nmany")
        return super().step(z, memory, tables, i, score, noise)
'''
)


def test_a_solver_that_breaks_at_work_and_precision_fails_and_the_others_are_drawn(capsys, here):
    (here / "my_late.py").write_text(LATE)
    solvers = ["--solver", "my_late:Late", "--solver", "sscs"]
    assert run(*QUICK, *solvers, "--out", "page", "--json", "late.json") == 1
    captured = capsys.readouterr()
    assert "my_late:Late, work and precision on CLD: RuntimeError: too many" in captured.err
    report = read(here / "late.json")
    assert report["summary"] == {"my_late:Late": "FAIL", "sscs": "PASS"}
    (table,) = report["work_precision"]
    assert {point["solver"] for point in table["points"]} == {"sscs"}


def test_rings_are_measured_and_drawn(capsys, here):
    arguments = ("validate", "--quick", "--problem", "CLD, ring", "--solver", "sscs")
    assert run(*arguments, "--out", "page", "--json", "ring.json") == 0
    captured = capsys.readouterr()
    assert "sscs: distribution" in captured.out
    report = read(here / "ring.json")
    (check,) = report["checks"]
    assert (check["kind"], check["problem"], check["verdict"]) == (
        "distribution",
        "CLD, ring",
        "PASS",
    )
    assert 0 < check["measured"] < 1  # of what is allowed
    assert check["declared"] is None
    assert f"{check['measured']:.2f} of the allowed error" in captured.out
    page = (here / "page" / "index.html").read_text(encoding="utf-8")
    assert f"{check['measured']:.2f} of the allowed error" in page
    assert "sliced W₂" in check["message"]
    assert "modes' spread" in check["message"]
    (table,) = report["work_precision"]
    assert (table["problem"], table["metric"]) == ("CLD, ring", "spread")
    assert all(point["error"] > 0 for point in table["points"])


@pytest.mark.slow
def test_the_quick_validation_of_the_package_passes(tmp_path):
    result = subprocess.run(
        [sys.executable, "-I", "-m", "cldsde", "validate", "--quick", "--json", "all.json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    report = read(tmp_path / "all.json")
    assert set(report["summary"]) == {"kernels", *named_solvers()}
    assert "FAIL" not in report["summary"].values()
