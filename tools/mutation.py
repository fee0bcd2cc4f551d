"""Mutation testing of linear/, score/ and solvers/: how many small faults do the tests find?

    python tools/mutation.py FOLDER [--mutants N] [--seed N] [--budget SECONDS]

The first run measures which tests execute which line, and the time of each test. Every mutant of
the sample then gets a forked process, which runs the tests that execute the mutated line until one
fails. If a mutant changes only the body of functions, the process replaces their code. A mutant of
code that runs at import is imported again. A later run with the same FOLDER resumes.
FOLDER/survivors lists the mutants that no test found.

Each operator has one replacement, its opposite (comparisons have two: `<` becomes `<=` or `>=`);
a number changes by 1. Replacements that raise an error for every float, such as `<<`, are left out:
any test finds them. No result depends on annotations, signatures without their defaults,
decorators, `raise` statements and f-strings, so they have no mutants. The sample takes the mutants
with the smallest hashes. So an edit of the package keeps the mutants of the lines that it keeps.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import itertools
import json
import os
import re
import resource
import signal
import sys
import traceback
from argparse import ArgumentParser, RawTextHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from hashlib import sha256
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from coverage import CoverageData
from scipy.stats import binomtest

TESTS = Path(__file__).parents[1] / "tests"
FOLDERS = ["linear", "score", "solvers"]

QUIET = ["-q", "--tb=line", "-p", "no:cacheprovider"]
# A test function's other cases are left out after LONG seconds, unless a case is SHORT.
LONG, SHORT = 0.5, 0.03
# Modules that no mutant changes: they are imported once.
LARGE = ["torch", "scipy.linalg", "scipy.optimize", "hypothesis", "mpmath", "torchsde"]
PAIRS = {
    "ReplaceBinaryOperator": "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Div Mod_FloorDiv "
    "BitOr_BitAnd BitAnd_BitOr",
    "ReplaceComparisonOperator": "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE "
    "GtE_Gt GtE_Lt Is_IsNot IsNot_Is",
    "ReplaceUnaryOperator": "Delete_USub Delete_Not Delete_Invert",
}
OPERATORS = [f"{kind}_{pair}" for kind, pairs in PAIRS.items() for pair in pairs.split()] + [
    *("AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse"),
    *("ReplaceFalseWithTrue", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *("ExceptionReplacer", "NumberReplacer", "ZeroIterationForLoop"),
]
NOT_FOUND = {"survived", "no test", "tool failed"}
LEFT_OUT = {"decorator", "raise_stmt", "fstring", "parameters"}
STATEMENTS = {"suite", "file_input", "simple_stmt", "if_stmt", "while_stmt", "for_stmt"}
STATEMENTS |= {"with_stmt", "try_stmt", "funcdef", "classdef"}
to_code = partial(compile, filename="", mode="exec", dont_inherit=True)


def hashed(text: str) -> bytes:
    """The hash of a text: a random order that edits keep."""
    return sha256(text.encode()).digest()


class Mutant(NamedTuple):
    """An occurrence of an operator in a file, its lines, and a name that other edits keep."""

    file: Path
    operator: str
    occurrence: int
    lines: range
    name: str

    def source(self) -> str:
        """The source of the mutated file."""
        operator = get_operator(f"core/{self.operator}")()
        return str(mutate_code(self.file.read_text("utf-8"), operator, self.occurrence))

    def is_valid(self) -> bool:
        """Whether the mutated file is Python."""
        try:
            to_code(self.source())
        except SyntaxError:
            return False
        return True

    def difference(self) -> str:
        """The mutated lines, before and after."""
        texts = self.file.read_text("utf-8").splitlines(), self.source().splitlines()
        return self.name + "\n" + "\n".join([*difflib.unified_diff(*texts, n=0, lineterm="")][2:])


def lines_around(node: Any) -> range:
    """The lines of the statement around a token, or of its header; none if it is left out."""
    while node.parent.type not in STATEMENTS:
        inner, node = node, node.parent
        if node.type == "param" and inner is node.default:
            node = node.parent  # defaults are evaluated on the first line of the function
            return range(node.start_pos[0], node.end_pos[0] + 1)
        if node.type in LEFT_OUT or (node.type == "annassign" and inner is node.children[1]):
            return range(0)
    if node.parent.type == "funcdef" and node is node.parent.annotation:
        return range(0)
    return range(node.start_pos[0], node.end_pos[0] + 1)


def mutants(file: Path) -> Iterator[Mutant]:
    """All mutants of a file."""
    source = file.read_text("utf-8")
    module, text, seen = get_ast(source), source.splitlines(), Counter[str]()
    nodes = list(ast_nodes(module))
    for operator in OPERATORS:
        positions = get_operator(f"core/{operator}")().mutation_positions
        starts = (start for node in nodes for start, _ in positions(node))
        for occurrence, start in enumerate(starts):
            lines = lines_around(module.get_leaf_for_position(start))
            if lines:
                name = f"{file.parent.name}/{file.name} {operator} {text[start[0] - 1].strip()}"
                seen[name] += 1
                yield Mutant(file, operator, occurrence, lines, f"{name} {seen[name]}")


def in_child(work: Callable[[], int], seconds: int, log: Path) -> int:
    """The exit code of a forked process, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.alarm(10 * seconds)  # a mutant may wait for something that never comes
    code = os.EX_SOFTWARE
    try:
        code = work()
    finally:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


def function(name: str) -> str:
    """The name of a test without its case."""
    return name.partition("[")[0]


def outcome(code: int) -> str:
    """The result of a mutant, by the exit code of its tests."""
    if code in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
        return "survived"
    if code == os.EX_SOFTWARE:
        return "tool failed"
    if -code in {signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL}:
        return "timed out"
    return "failed" if code == pytest.ExitCode.TESTS_FAILED else f"exit code {code}"


class Measured:
    """Plugin of pytest that times each test, and skips a function's cases once it took long."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spent, self.cases = Counter[str](), Counter[str]()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        first: dict[str, int] = {}
        for place, item in enumerate(items):
            first.setdefault(function(item.nodeid), place)
        items.sort(key=lambda item: (first[function(item.nodeid)], hashed(item.nodeid)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        name = function(item.nodeid)
        if self.spent[name] > max(LONG, SHORT * self.cases[name]):
            pytest.skip("other cases of the function took long enough")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed:
            self.spent[function(report.nodeid)] += report.duration
            self.cases[function(report.nodeid)] += report.when == "call"
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


class Chosen:
    """Plugin of pytest that runs the chosen tests in their order."""

    def __init__(self, names: list[str]) -> None:
        self.place = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.place]
        items.sort(key=lambda item: self.place[item.nodeid])


def measure(folder: Path) -> int:
    """Run the tests with coverage; write the lines and the time of each test."""
    plugin, suites = Measured(), [str(TESTS / name) for name in FOLDERS]
    options = ["--cov=cldsde", "--cov=solvers", "--cov-branch", "--cov-context=test"]
    code = pytest.main([*QUIET, *options, "--cov-report=", *suites], plugins=[plugin])
    (folder / "times").write_text(json.dumps(plugin.seconds))
    return int(code)


@cache
def contexts_of(lines: CoverageData, file: str) -> dict[int, list[str]]:
    """The tests that execute each line of a file."""
    return lines.contexts_by_lineno(file)


class Tests(NamedTuple):
    """The tests that execute each line, and the time of each test."""

    lines: CoverageData
    times: dict[str, float]

    def contexts(self, mutant: Mutant) -> set[str]:
        """Names of the tests that execute a mutant; the empty name stands for an import.

        An import of this module or of a test makes objects that any test of the module may use.
        """
        contexts = contexts_of(self.lines, str(mutant.file))
        found = {name for line in mutant.lines for name in contexts.get(line, [])}
        return {name for names in contexts.values() for name in names} if "" in found else found

    def of(self, mutant: Mutant, budget: float) -> list[str]:
        """The tests to run: one case of each function, the fastest first, then further cases.

        After an import the tests that mirror the module come first.
        """
        contexts, own = self.contexts(mutant), f"test_{mutant.file.stem}.py"
        names = {name.rpartition("|")[0] for name in contexts} & self.times.keys()
        cases, order = Counter[str](), {}
        for name in sorted(names, key=self.times.__getitem__):
            later = "" in contexts and own not in name
            order[name] = (later, cases[function(name)], self.times[name])
            cases[function(name)] += 1
        chosen = []
        for name in sorted(names, key=order.__getitem__):
            if self.times[name] <= budget:
                chosen.append(name)
                budget -= self.times[name]
        return chosen


def after_import(mutant: Mutant, tests: list[str]) -> int:
    """Import the package with the mutant and run the tests; return pytest's exit code.

    Only the four files with the most of these tests are collected, as that takes a second each.
    """
    source, load = mutant.source(), SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> Any:
        path = loader.get_filename(name)
        return to_code(source, filename=path) if path == str(mutant.file) else load(loader, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    files = Counter(name.partition("::")[0] for name in tests).most_common(4)
    return int(pytest.main([*QUIET, "-x", *(file for file, _ in files)], plugins=[Chosen(tests)]))


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of every function and class of a module."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from codes(inner)


class Replaced:
    """Plugin of pytest that collects tests once, and exchanges the code of imported functions."""

    def __init__(self, mutants: list[Mutant], test: Callable[..., None]) -> None:
        self.mutants, self.test = mutants, test

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        gc.unfreeze()  # tests/conftest.py hides what was imported before
        functions = [f for f in gc.get_objects() if type(f) is FunctionType]
        gc.freeze()  # forked processes share the pages of all objects that they don't change

        def run(mutant: Mutant, tests: list[str]) -> int:
            path = str(mutant.file)
            sources = mutant.file.read_text("utf-8"), mutant.source()
            old, new = (codes(to_code(source, filename=path)) for source in sources)
            replacement = dict(zip(old, new, strict=True))
            for f in functions:
                if f.__code__.co_filename == path:
                    f.__code__ = replacement[f.__code__]
            chosen = [items[name] for name in tests]
            for item, following in zip(chosen, [*chosen[1:], None], strict=True):
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    sys.stdout.write(f"\nFAILED {item.nodeid}\n")
                    return 1
            return 0

        for mutant in self.mutants:
            self.test(mutant, run)
        return True


def main() -> None:
    """Run the sample, or what is left of it; print the score and write the survivors."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the measurements and results")
    parser.add_argument("--mutants", type=int, default=300, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests per mutant")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(TESTS.parent)
    os.environ |= {"HYPOTHESIS_PROFILE": "ci", "COVERAGE_FILE": str(folder / "coverage")}
    for name in LARGE:
        importlib.import_module(name)
    log, results = folder / "log", folder / "results"
    if not (folder / "times").exists() and in_child(lambda: measure(folder), 7200, log):
        sys.exit(f"the tests fail without a mutant, see {log}")

    lines = CoverageData(str(folder / "coverage"))
    lines.read()
    known = Tests(lines, json.loads((folder / "times").read_text()))
    files = [Path(name) for name in sorted(lines.measured_files())]
    every = [mutant for file in files if file.parent.name in FOLDERS for mutant in mutants(file)]
    every.sort(key=lambda mutant: hashed(f"{options.seed} {mutant.name}"))
    sample = [*itertools.islice(filter(Mutant.is_valid, every), options.mutants)]
    results.touch()
    found = dict(json.loads(line) for line in results.read_text().splitlines())

    rest = [mutant for mutant in sample if mutant.name not in found]
    # Read everything now: in a forked process, coverage would begin a new file.
    tests = {mutant: known.of(mutant, options.budget) for mutant in rest}
    executed = {mutant: "" in known.contexts(mutant) for mutant in rest}  # by an import

    def test(mutant: Mutant, run: Callable[[Mutant, list[str]], int]) -> None:
        result = ["no test"]
        if tests[mutant]:
            limit, log = int(20 + 2 * options.budget), folder / "test"
            code = in_child(lambda: run(mutant, tests[mutant]), limit, log)
            failed = re.findall("^FAILED (.*)", log.read_text("utf-8"), re.MULTILINE)
            result = [outcome(code), *failed[:1]]
        with results.open("a") as file:
            print(json.dumps([mutant.name, result]), file=file)

    imported = Replaced([mutant for mutant in rest if not executed[mutant]], test)
    arguments = [*QUIET, "--capture=sys", *(str(TESTS / name) for name in FOLDERS)]
    in_child(lambda: int(pytest.main(arguments, plugins=[imported])), 7200, log)
    for mutant in rest:
        if executed[mutant]:
            test(mutant, after_import)
    found = dict(json.loads(line) for line in results.read_text().splitlines())

    how = {mutant: found[mutant.name][0] for mutant in sample}
    survivors = [mutant for mutant in sample if how[mutant] in NOT_FOUND]
    texts = [f"{how[mutant]}: {mutant.difference()}\n" for mutant in survivors]
    (folder / "survivors").write_text("\n".join(texts), "utf-8")
    killed, n = len(sample) - len(survivors), len(sample)
    low, high = binomtest(killed, n).proportion_ci(method="wilson")
    print(
        f"{killed} of {n} mutants are found: {killed / n:.1%}, 95% interval {low:.1%} to {high:.1%}"
    )
    print(f"of {len(every)} mutants in all;", dict(Counter(how.values())))


if __name__ == "__main__":
    main()
