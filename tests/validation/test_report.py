"""Summaries of checks, reports of them as text, JSON and plots, and names of what is checked."""

import json
import math
from pathlib import Path

import pytest

import own_solvers
from cldsde.errors import SettingError
from cldsde.solvers import SSCS, StochasticHeun, dpm_solver_pp, find_solver, named_solvers
from cldsde.solvers.named import _SHORT, canonical_name, validated_solvers
from cldsde.validation import WorkPrecision, estimate_order, problems, suite
from cldsde.validation.checks import NOT_APPLICABLE, Check
from cldsde.validation.files import ReportFiles
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.posterior_suite import posterior_reports
from cldsde.validation.report import Report
from cldsde.validation.suite import reports
from cldsde.validation.work_precision import WorkPrecisionPoint

PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE
VP, CLD, POINTS = "VP", "CLD", "VP, two points"
WEAK, STRONG, ODE = "weak order", "strong order", "ODE order"
H = [2.0**-level for level in range(4, 10)]


def check(order, expected, *, kind=WEAK, problem="p", name="it"):
    """A check that measured an order; None for one that comes to no conclusion."""
    errors = [math.nan] * len(H) if order is None else [h**order for h in H]
    found = estimate_order(H, errors, expected=expected)
    value = None if order is None else found.order
    return Check(kind, name, problem, expected, value, found.verdict, found.message, 0.1, found)


SUMMARIES = [
    *(([2, 2, 2], PASS), ([2, 2, 1], FAIL), ([3, 3, 3], FAIL), ([3, 3, None], FAIL)),
    *(([3, 3, 2], PASS), ([2, None], PASS)),  # some problems are easy
    ([3, None, None], PASS),  # of one problem it cannot be said
    ([None, None], INCONCLUSIVE),
]


@pytest.mark.parametrize(("orders", "verdict"), SUMMARIES)
def test_a_summary_is_made_of_all_problems(orders, verdict):
    found = [check(order, 2, problem=str(i)) for i, order in enumerate(orders)]
    assert Report(found).summary() == {"it": verdict}


def test_kinds_of_orders_are_not_mixed_and_solvers_are_apart():
    found = [
        *(check(3, 2, kind=kind, problem="a") for kind in (WEAK, STRONG)),
        check(1, 2, kind=ODE, name="other"),
        check(2, 2, kind=WEAK, name="half"),
        check(None, 2, kind=STRONG, name="half"),
        Check("error at 100 steps", "third", "p", None, 0.1, None, "off", 0.1),
    ]
    expected = {"it": PASS, "other": FAIL, "half": INCONCLUSIVE, "third": INCONCLUSIVE}
    assert Report(found).summary() == expected
    assert Report([]).summary() == {}


# Passed, failed, without conclusion, only reported, and of a kernel.
DIVERSE = (
    Check("kernel", "VP", "transition", 1e-10, 3e-14, PASS, "fine", 0.1),
    Check("kernel", "VE", "transition", 1e-10, 5e-13, PASS, "fine", 0.1),
    check(1, 1, problem=VP, name="first"),
    check(1.2, 1, problem=CLD, name="first"),
    check(2, 2, problem=CLD, kind=STRONG, name="first"),
    check(0.5, 1, problem=CLD, name="second"),
    check(None, 1, problem=VP, name="third"),
    Check("error at 100 steps", "third", "CLD, stiff end", None, 0.25, None, "off", 0.1),
    Check("error at 100 steps", "fourth", "CLD, stiff end", None, math.nan, None, "off", 0.1),
    Check("bias", "fifth", POINTS, 1.0, 1.004, FAIL, "E|x| is off", 0.1),
)


def test_a_report_goes_through_strict_json(tmp_path):
    points = (WorkPrecisionPoint("first", 10, 0.1, 0.2, 0.0, pareto=True),)
    report = Report(DIVERSE, [WorkPrecision(CLD, "moments", points)], complete=False)
    report.write_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["complete"] is False
    assert read["summary"] == {name: str(verdict) for name, verdict in report.summary().items()}
    fields = ("kind", "subject", "problem", "declared", "verdict", "message", "seconds")
    for entry, made in zip(read["checks"], DIVERSE, strict=True):
        assert all(entry[name] == getattr(made, name) for name in fields)
        assert entry["measured"] == (None if made.subject == "fourth" else made.measured)
    assert read["work_precision"][0]["points"][0]["error"] == 0.2


def test_the_text_has_a_line_for_each_solver_and_kind():
    table, reasons, closing = Report(DIVERSE).to_text().split("\n\n")
    assert closing == "2 of 6 pass."
    assert reasons.startswith("third, weak order on VP: An order needs")
    assert reasons.endswith("weak_order(solver, problem, steps=(64, 128, …)) of cldsde.validation.")
    lines = [line.split("  ")[0] for line in table.splitlines()[1:]]
    kinds = "first: weak order, first: strong order, second: weak order, third: weak order"
    kinds += ", third: error at 100 steps, fourth: error at 100 steps, fifth: bias"
    assert lines == ["kernels", *kinds.split(", ")]
    failures = Report(DIVERSE).failures()
    assert [line.split(",")[0] for line in failures] == ["second", "fifth"]
    assert failures[1] == f"fifth, bias on {POINTS}: E|x| is off"


def test_the_folder_has_the_table_and_a_plot_of_each_order_and_diagram(tmp_path):
    errors = {"first": 0.1, "second": math.inf}
    points = tuple(WorkPrecisionPoint(name, 10, 0.1, x, 0.0) for name, x in errors.items())
    table = WorkPrecision("CLD, ring", "moments", points, floor=0.01)
    report = Report(DIVERSE, [table], complete=False)
    report.write_plots(tmp_path)
    assert (tmp_path / "report.txt").read_text("utf-8") == report.to_text() + "\n"
    assert "before the interruption" in report.to_text()
    names = {"work-and-precision-CLD-ring.svg", "orders-first.svg", "orders-second.svg"}
    assert {file.name for file in tmp_path.iterdir()} == {"report.txt", *names}
    # Glyphs are drawn as paths, with what they say as a comment.
    assert "1 / number of steps" in (tmp_path / "orders-first.svg").read_text("utf-8")
    diagram = (tmp_path / "work-and-precision-CLD-ring.svg").read_text("utf-8")
    assert "largest error of mean and covariance" in diagram


def test_the_published_report_is_of_all_solvers_and_all_kinds_of_checks():
    """``cldsde validate --json FILE`` makes it anew; no page reads estimates and work_precision."""
    file = Path(__file__).parents[2] / "docs" / "data" / "validation.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["complete"] is True
    assert set(report["summary"]) == {"kernels", *validated_solvers()}
    assert {row["solver"] for row in report["solvers"]} == {
        *map(repr, validated_solvers().values())
    }
    kinds = {"kernel", WEAK, STRONG, ODE, "distribution", "bias", "error at 100 steps"}
    assert {check["kind"] for check in report["checks"]} == kinds | {"NFE per step", NOT_APPLICABLE}
    compared = {check["subject"] for check in report["checks"] if check["kind"] == "distribution"}
    assert compared == set(validated_solvers())


# Names of solvers ------------------------------------------------------------------------------


def test_solvers_are_found_by_their_names(monkeypatch):
    assert {name: find_solver(name) for name in named_solvers()} == named_solvers()
    assert canonical_name("em") == "euler-maruyama"
    assert find_solver("DPM-Solver++") == find_solver("dpmpp_2m") == dpm_solver_pp(2)
    # Every other name is the name of a solver.
    assert {*_SHORT.values()} <= {*named_solvers()}
    assert not {*_SHORT} & {*named_solvers()}
    assert find_solver("em") == named_solvers()["euler-maruyama"]
    assert find_solver("cldsde.solvers:StochasticHeun") == StochasticHeun()
    monkeypatch.setattr(own_solvers, "mine", SSCS(score_step="midpoint"), raising=False)
    assert find_solver("own_solvers:mine") == SSCS(score_step="midpoint")


NO_SOLVERS = [
    ("cldsde.solvers:NoSuchSolver", "NoSuchSolver.* cannot be loaded"),
    ("json:loads", "must be a solver"),
    ("own_solvers:Key", "Key.*Key"),
]


@pytest.mark.parametrize(("name", "words"), NO_SOLVERS)
def test_names_of_no_solver_are_rejected(name, words):
    with pytest.raises(ValueError, match=words):
        find_solver(name)


# Validations by names --------------------------------------------------------------------------


def validated(*solvers, cases=("CLD",), **options):
    """The last report of a quick validation."""
    *_, report = reports(solvers, cases, quick=True, **options)
    return report


# Names, a line and a complaint of the judgement, and the summary.
UNCONFIRMED = [
    ("Doubtful", "checks: 1 of 2 of own", "no problem confirmed a declared", ["INCONCLUSIVE"]),
    ("Claiming Late sscs", "Late, work and precision on", "2 of 3 fail", ["FAIL", "FAIL", "PASS"]),
    ("sscs", "SSCS needs", "sscs was not measured: ", []),
    ("predictor-corrector", "no order, and its samples were not checked", "", ["INCONCLUSIVE"]),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("names", "line", "complaint", "verdicts"), UNCONFIRMED)
def test_solvers_that_are_not_confirmed_are_a_complaint(
    monkeypatch, names, line, complaint, verdicts
):
    monkeypatch.setitem(suite._FINEST_QUICK, "weak order", 128)
    solvers = [name if name.islower() else f"own_solvers:{name}" for name in names.split()]
    problem = "VE" if names == "sscs" else "CLD"
    report = validated(*solvers, cases=[problem], draw=solvers[-1] == "sscs")
    assert report.summary() == dict(zip(solvers[: len(verdicts)], verdicts, strict=True))
    lines, complaints = report.judgement(solvers)
    assert line in "\n".join(lines)
    assert any(complaint in text and solvers[0] in text for text in complaints)


@pytest.mark.slow
def test_the_seed_decides_on_samples(monkeypatch):
    monkeypatch.setitem(suite._FINEST_QUICK, "strong order", 32)
    first, again, other = (
        [check.measured for check in validated("em", cases=["VP"], seed=seed).checks]
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first[0] == other[0]  # the weak order is exact
    assert first[1] != other[1]


def test_problems_that_do_not_exist_or_apply_are_rejected():
    with pytest.raises(KeyError, match=r"one of 'VP', .* got 'CLDD'; did you mean CLD\?"):
        problems()["CLDD"]
    with pytest.raises(SettingError, match="'CLD, rotation' has no check for sscs"):
        reports(["sscs"], ["CLD, rotation"])


@pytest.mark.slow
def test_a_posterior_sampler_of_ones_own_passes_if_it_is_exact():
    *_, report = posterior_reports(["own_solvers:exact"], ["two modes"], quick=True)
    assert [str(error.verdict) for error in report.errors] == ["PASS", "FAIL", "FAIL"]
    assert "planted: must fail" in report.to_text()
    assert report.judgement() == ([], [])


def test_files_of_an_earlier_report_are_replaced_if_that_is_asked_for(tmp_path):
    for name in ("orders-third.svg", "work-and-precision-VP.svg", "mine.svg"):
        (tmp_path / name).touch()
        if name != "mine.svg":
            with pytest.raises(SettingError, match=r"out: .*an earlier validation; .*overwrite"):
                ReportFiles(out=tmp_path).check()
    files = ReportFiles(out=tmp_path, overwrite=True)
    files.check()
    assert files.finish(Report(DIVERSE[2:3])) == []
    left = {"report.txt", "orders-first.svg", "mine.svg"}
    assert {file.name for file in tmp_path.iterdir()} == left
