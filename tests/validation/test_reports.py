"""Validations by names: reports of a user's solvers and of posterior samplers, and their files."""

from __future__ import annotations

import pytest

from cldsde.errors import SettingError
from cldsde.solvers import named_solvers
from cldsde.validation import problems
from cldsde.validation.files import ReportFiles
from cldsde.validation.posterior_suite import posterior_reports
from cldsde.validation.report import Report
from cldsde.validation.reports import reports


def validated(*solvers, cases=("CLD",), **options):
    """The last report of a quick validation."""
    *_, report = reports(solvers, cases, quick=True, **options)
    return report


def test_solvers_that_keep_their_claims_pass_each_kind_of_check():
    own, em = "own_solvers:CentredEuler", "euler-maruyama"
    report = validated("sscs", own, "em", draw=True)
    kinds = {"sscs": ["weak order"], own: ["weak order"], em: ["weak order", "strong order"]}
    assert [(check.subject, check.kind) for check in report.checks] == [
        (name, kind) for name in kinds for kind in (*kinds[name], "NFE per step")
    ]
    for check in [check for check in report.checks if check.estimate is not None]:
        assert (str(check.verdict), check.problem) == ("PASS", "CLD")
        assert abs(check.measured - 1) < 0.1
        assert len(check.estimate.levels) == 5
    (table,) = report.tables
    assert (table.problem, table.metric) == ("CLD", "moments")
    assert {point.solver for point in table.points} == set(kinds)
    assert report.judgement(["sscs", own, "em"]) == ([], [])


@pytest.mark.parametrize(
    ("solvers", "cases", "line", "complaint", "summary"),
    [
        (
            ["own_solvers:Claiming"],
            ["CLD"],
            "own_solvers:Claiming, weak order on CLD: The order ",
            "1 of 1 failed: own_solvers:Claiming",
            {"own_solvers:Claiming": "FAIL"},
        ),
        (
            ["own_solvers:Doubtful"],
            ["CLD"],
            "Inconclusive checks: 1 of 2 of own_solvers:Doubtful",
            "because no problem confirmed a declared order: own_solvers:Doubtful",
            {"own_solvers:Doubtful": "INCONCLUSIVE"},
        ),
        (
            ["own_solvers:Drawing"],
            ["CLD"],
            "different results; does the solver draw noise outside `noise.normal`?",
            "1 of 1 failed: own_solvers:Drawing",
            {"own_solvers:Drawing": "FAIL"},
        ),
        (
            ["own_solvers:Late", "sscs"],
            ["CLD"],
            "own_solvers:Late, work and precision on CLD: RuntimeError: too many",
            "1 of 2 failed: own_solvers:Late",
            {"own_solvers:Late": "FAIL", "sscs": "PASS"},
        ),
        (["sscs"], ["VE"], "SSCS needs", "sscs was not measured: ", {}),
        (
            ["predictor-corrector"],
            ["CLD"],
            "predictor-corrector declares no order, and its samples were not checked",
            "",
            {"predictor-corrector": "INCONCLUSIVE"},
        ),
    ],
)
def test_solvers_that_are_not_confirmed_are_a_complaint(solvers, cases, line, complaint, summary):
    report = validated(*solvers, cases=cases, draw=solvers[-1] == "sscs")
    assert report.summary() == summary
    lines, complaints = report.judgement(solvers)
    assert line in "\n".join(lines)
    assert any(complaint in text for text in complaints)


def test_the_text_says_why_nothing_confirms_an_order():
    text = validated("own_solvers:Unproven", cases=("VP", "CLD")).to_text()
    _, reasons, closing = text.split("\n\n")
    assert reasons == (
        "own_solvers:Unproven, strong order on VP, CLD: `strong_order=1` is declared but "
        "`path_noise` is missing: implement it or drop the claim"
    )
    assert closing == "0 of 1 pass."


def test_broken_solvers_do_not_keep_others_from_their_report():
    broken = ["Broken", "Raising", "Growing", "Leaving", "Undeclared", "Wordy"]
    names = [f"own_solvers:{name}" for name in broken]
    report = validated(*names, "sscs")
    assert report.complete
    assert report.summary() == dict.fromkeys(names, "FAIL") | {"sscs": "PASS"}
    lines, [complaint] = report.judgement([*names, "sscs"])
    assert {line.partition(",")[0] for line in lines} == set(names)
    assert complaint.startswith(f"6 of 7 failed: {', '.join(names)}")


def test_distributions_of_solvers_are_measured_on_rings_and_drawn():
    report = validated("sscs", cases=("CLD, ring",), draw=True)
    (check,) = report.checks
    assert (check.kind, str(check.verdict), check.declared) == ("distribution", "PASS", None)
    assert 0 < check.measured < 1  # of the allowed error
    assert f"{check.measured:.2f} of the allowed error" in report.to_text()
    assert "sliced W₂" in check.message
    assert "modes' spread" in check.message
    (table,) = report.tables
    assert (table.problem, table.metric) == ("CLD, ring", "spread")
    assert all(point.error > 0 for point in table.points)


def test_the_seed_decides_on_samples():
    first, again, other = (
        [check.measured for check in validated("em", seed=seed).checks] for seed in (5, 5, 6)
    )
    assert first == again
    assert first[0] == other[0]  # the weak order is exact
    assert first[1] != other[1]


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ("sscss", ["'sscss'", "module:ClassName", *named_solvers()]),
        ("cldsde.solvers:NoSuchSolver", ["NoSuchSolver"]),
        ("json:JSONDecoder", ["must be a solver"]),
        ("cldsde.solvers:Solver", ["cldsde.solvers:Solver"]),
        ("own_solvers:Needy", ["own_solvers:Needy"]),
        ("own_solvers:Key", ["own_solvers:Key", "KeyError"]),
        ("own_solvers:Exit", ["own_solvers:Exit", "SystemExit"]),
    ],
)
def test_solvers_that_cannot_be_made_are_rejected(solver, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 several words are checked
        reports([solver])
    assert all(word in str(caught.value) for word in words)


def test_problems_that_do_not_exist_or_apply_are_rejected():
    with pytest.raises(SettingError, match="problem: must be one of") as caught:
        reports([], ["CLDD"])
    assert all(repr(name) in caught.value.reason for name in problems())
    for name in ("CLD, rotation", "VP, two points"):
        with pytest.raises(SettingError, match=f"'{name}' has no check for sscs"):
            reports(["sscs"], [name])
    with pytest.raises(SettingError, match="problem: must be one of 'two modes'"):
        posterior_reports([], ["CLD"])
    with pytest.raises(SettingError, match="sampler: 'math:pi' must be a function"):
        posterior_reports(["math:pi"])


@pytest.mark.parametrize(("name", "verdict"), [("exact", "PASS"), ("biased", "FAIL")])
def test_a_posterior_sampler_of_ones_own_passes_only_if_it_is_exact(name, verdict):
    *_, report = posterior_reports([f"own_solvers:{name}"], ["two modes"], quick=True)
    own, *planted = (str(error.verdict) for error in report.errors)
    assert (own, *planted) == (verdict, "FAIL", "FAIL")
    assert "planted: must fail" in report.to_text()
    lines, complaints = report.judgement()
    assert len(lines) == len(complaints) == (name == "biased")
    assert all("not the exact posterior that it claims" in line for line in lines)


def test_a_file_that_cannot_be_written_does_not_keep_the_other_away(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    files = ReportFiles(tmp_path / "folder", tmp_path / "page")
    with pytest.raises(SettingError, match=r"json: cannot be written: .*folder is a folder"):
        files.check()
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "page").mkdir()
    report = Report([])
    with pytest.raises(SettingError, match="json: cannot be written now"):
        files.save(report)
    files.save(report)  # is retried at the end only
    assert [error.key for error in files.finish(report)] == ["json"]
    assert (tmp_path / "page" / "index.html").is_file()

    def fail(self, folder):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(Report, "write_html", fail)
    files = ReportFiles(tmp_path / "x.json", tmp_path / "page")
    [error] = files.finish(report)
    assert str(error) == "out: cannot be written: RuntimeError: no fonts"
    assert (tmp_path / "x.json").is_file()
