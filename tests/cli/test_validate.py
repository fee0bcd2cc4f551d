"""The command ``cldsde validate``: verdicts as exit codes, files, rejections and interruption."""

import functools
import json
import shutil
import sys
from contextlib import suppress
from typing import Any

import pytest

import cldsde
import own_solvers
from cldsde.cli import main
from cldsde.solvers.named import validated_solvers
from cldsde.validation import suite
from cldsde.validation.report import Report

QUICK = "--quick --problem CLD"

pytestmark = pytest.mark.usefixtures("undrawn_figures")


@pytest.fixture(autouse=True, scope="module")
def measured_once():
    """All tests take the same measurements: the command is tested, and not what it measures."""
    found, measure = {}, suite._measure

    def measured(kind, solver, problem, shared):
        key = kind, repr(solver), problem.name
        if key not in found:
            found[key] = measure(kind, solver, problem, shared)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "_measure", measured)
        few = functools.partial(suite.work_precision, budgets=(10, 20))
        patch.setattr(suite, "work_precision", few)
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder; changes of the search path are undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return tmp_path


def run(arguments: str) -> int:
    return main(["validate", *arguments.split()])


def read(file: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def test_solvers_that_keep_their_claims_pass_with_a_report_and_plots(capsys, here):
    """Also a solver of one's own, found in the current folder."""
    shutil.copy(own_solvers.__file__, here / "my.py")
    solvers = "--solver sscs --solver my:CentredEuler"
    assert run(f"{QUICK} {solvers} --out deep/page --json deep/page/report.json") == 0
    captured = capsys.readouterr()
    folder = here / "deep" / "page"
    assert captured.out.endswith(f"\n2 of 2 pass.\nThe plots are in {folder.resolve()}\n")
    plots = {"work-and-precision-CLD.svg", "orders-sscs.svg", "orders-my-CentredEuler.svg"}
    assert {file.name for file in folder.iterdir()} == {"report.txt", "report.json", *plots}
    text = (folder / "report.txt").read_text(encoding="utf-8")
    assert captured.out.startswith(text.rstrip())
    report = read(folder / "report.json")
    assert report["summary"] == {"sscs": "PASS", "my:CentredEuler": "PASS"}
    assert (report["complete"], report["cldsde"]) == (True, cldsde.__version__)


def test_a_failed_solver_is_no_success(capsys, here):
    assert run(f"{QUICK} --solver own_solvers:Claiming --solver sscs --json report.json") == 1
    *reasons, last = capsys.readouterr().err.splitlines()
    assert reasons[-1].startswith("own_solvers:Claiming, weak order on CLD: The order ")
    assert last == "cldsde validate: error: 1 of 2 failed: own_solvers:Claiming"
    assert read(here / "report.json")["summary"]["own_solvers:Claiming"] == "FAIL"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file")
def test_results_are_written_if_the_table_cannot_be_printed(here, monkeypatch, capsys):
    monkeypatch.setattr(Report, "to_text", lambda self: "W₂, which is no ASCII")
    with suppress(OSError), open("/dev/full", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run(f"{QUICK} --solver sscs --json report.json") == 1
    assert "the table cannot be printed: No space left" in capsys.readouterr().err.splitlines()[-1]
    report = read(here / "report.json")
    assert (report["complete"], report["summary"]) == (True, {"sscs": "PASS"})


@pytest.mark.slow
def test_an_interruption_keeps_finished_checks(capsys, here):
    (here / "report.json").write_text("of another time")
    words = "--quick --problem VP --problem CLD --solver own_solvers:Interrupted"
    assert run(f"{words} --json report.json --out page") == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("cldsde validate: interrupted")
    report = read(here / "report.json")
    assert report["complete"] is False
    made = [(check["problem"], check["kind"], check["verdict"]) for check in report["checks"]]
    assert made == [("VP", "weak order", "PASS"), ("VP", "NFE per step", "PASS")]
    assert "own_solvers:Interrupted: weak order" in captured.out
    assert "before the interruption" in (here / "page" / "report.txt").read_text()
    assert {file.name for file in here.iterdir()} == {"report.json", "page"}


@pytest.mark.slow
def test_posterior_samplers_are_measured_instead_of_solvers(here, capsys):
    words = ["validate", "--posterior", "--quick", "--problem", "two modes", "--sampler"]
    assert main([*words, "own_solvers:biased", "--json", "found.json"]) == 1
    found = [row["verdict"] for row in read(here / "found.json")["posterior"]]
    assert found == ["FAIL"] * 3  # its own, and two that are planted
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("1 of 3 measurements are not as claimed")


@pytest.mark.slow
def test_the_quick_validation_of_the_package_passes(here):
    assert run("--quick --json all.json") == 0
    report = read(here / "all.json")
    assert set(report["summary"]) == {"kernels", *validated_solvers()}
    assert "FAIL" not in {check["verdict"] for check in report["checks"]}
    # Each kind of order that a solver declares is confirmed.
    passed = {(c["subject"], c["kind"]) for c in report["checks"] if c["verdict"] == "PASS"}
    orders = {"weak order": "weak_order", "strong order": "strong_order", "ODE order": "ode_order"}
    for name, solver in validated_solvers().items():
        declared = {kind for kind, order in orders.items() if getattr(solver.facts, order)}
        assert {(name, kind) for kind in declared} <= passed
