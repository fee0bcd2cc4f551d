"""Check that tolerances name their source: ``python tools/bare_tolerances.py tests``.

A tolerance is bare if it is a number alone, or has a small number as a factor: ``abs=1e-9``,
``approx(x, 1e-6)``, ``assert error < 1e-12 * size``. So are the default of a library, and a small
constant without a comment on its lines or directly above. Tolerances come from the constants and
functions of ``tolerances.py``, or from a constant of the test file with a comment. Arguments of a
function of ``tolerances.py`` are facts about the numbers compared, and may be anything.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SMALL = 1e-2
"""Smaller factors count as tolerances; probabilities and data are larger."""

NAMES = {"abs", "rel", "atol", "rtol"}
COMPARISONS = {"approx", "allclose", "isclose", "assert_close", "assert_allclose"}


class Finding(NamedTuple):
    """A place with a bare tolerance."""

    line: int
    excerpt: str
    advice: str


def called(node: ast.expr) -> str:
    """The last name of a function that is called: ``approx`` of ``pytest.approx(…)``."""
    function = node.func if isinstance(node, ast.Call) else node
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def small(node: ast.expr, sources: dict[str, bool]) -> bool:
    """Whether an expression has a small number outside of calls of named sources.

    A source that is False is a constant without a comment, which counts as a number.
    """
    if isinstance(node, ast.Call) and sources.get(called(node)):
        return False
    if isinstance(node, ast.Name):
        return not sources.get(node.id, True)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, float) and 0 < node.value < SMALL
    return any(small(child, sources) for child in ast.iter_child_nodes(node))


def bare(node: ast.expr, sources: dict[str, bool]) -> bool:
    """Whether a tolerance is a number alone, other than 0, or has a small number in it."""
    names = any(isinstance(part, ast.Name) for part in ast.walk(node))
    zero = isinstance(node, ast.Constant) and not node.value
    return small(node, sources) or not (names or zero)


def known_names(tree: ast.Module, lines: list[str]) -> dict[str, bool]:
    """Sources that a file imports, and False for its small constants without a comment.

    Lines are counted from 1. A comment is on the lines of a constant, or directly above it. Entries
    of dictionaries may be data, so these are left out, and so are constants within functions.
    """
    sources = {
        alias.asname or alias.name: True
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "tolerances"
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Dict):
            above, *own = lines[node.lineno - 1 : (node.end_lineno or 0) + 1]
            commented = above.startswith("#") or "#" in "".join(own)
            if not commented and small(node.value, sources):
                names = (x for t in node.targets for x in ast.walk(t) if isinstance(x, ast.Name))
                sources |= {name.id: False for name in names}
    return sources


def findings(source: str) -> Iterator[Finding]:
    """Bare tolerances of one test file, in the order of its syntax tree."""
    tree = ast.parse(source)
    sources = known_names(tree, ["", *source.splitlines()])
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def found(node: ast.expr, advice: str) -> Finding:
        return Finding(node.lineno, ast.unparse(node)[:70], advice)

    for node in ast.walk(tree):
        function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and called(node) in COMPARISONS and function not in own:
            given = [keyword.value for keyword in node.keywords if keyword.arg in NAMES]
            given += node.args[1:] if called(node) == "approx" else []
            names = {keyword.arg for keyword in node.keywords}
            # With rel alone, approx keeps its abs of 1e-12. With abs alone, its rel is 0.
            needed = {"abs"} if called(node) == "approx" else {"rtol", "atol"}
            if None not in names and not needed <= names:  # None stands for **options
                yield found(node, "the default tolerance of a library has no source")
            for value in given:
                if bare(value, sources):
                    yield found(value, "a tolerance names its source")
        elif isinstance(node, ast.Assert):
            for compare in (part for part in ast.walk(node.test) if isinstance(part, ast.Compare)):
                sides = [compare.left, *compare.comparators]
                for left, operator, right in zip(sides, compare.ops, sides[1:], strict=False):
                    if isinstance(operator, ast.Lt | ast.LtE) and small(right, sources):
                        yield found(right, "a bound names its source")
                    if isinstance(operator, ast.Gt | ast.GtE) and small(left, sources):
                        yield found(left, "a bound names its source")


def main() -> None:
    """Print findings; exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", help="test files, or folders of them")
    count = 0
    for path in parser.parse_args().paths:
        if not path.exists():
            parser.error(f"paths must exist; got {path}")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for finding in findings(file.read_text(encoding="utf-8")):
                count += 1
                print(f"{file}:{finding.line}: {finding.advice}: {finding.excerpt}")
    print(f"{count} bare tolerances")
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
