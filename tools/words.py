"""Check that text is plain English: ``python tools/words.py README.md docs``.

Prose of Markdown files, docstrings and comments are searched for long sentences and for words that
have a plainer form. Code, formulas and quoted names are left out. A comment ``words: ignore`` on a
line of a Markdown file leaves out the paragraph that follows.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LONGEST = 25  # words of a sentence

WORDS = {
    r"\b(that|those) of\b": "repeat the noun",
    r"\blaws?\b": "distribution",
    r"\bmend(s|ed|ing)?\b": "correct, repair",
    r"\brefus(e|es|ed|al|als|ing)\b": "reject, raise",
    r"\b(go|goes|went|going) on\b": "resume, continue",
    r"\bin turn\b": "one after the other",
    r"\bwithout bound\b": "unstable, unbounded",
    r"\b(evaluations?|bits?|seconds?|images?|noise|numbers?|seed|stream|processes) a "
    r"(step|sample|dimension|second|image|pixel|process|row|line)\b": "per",
    r"\bwhere (?=(there|it|they|one|that|this|these|no|nothing|a|an|both|all)\b)": "if, when",
    r"\bask(s|ed)? for the score\b": "evaluate the score",
}
ABBREVIATIONS = re.compile(
    r"\b(e\.g|i\.e|etc|et al|cf|vs|eq|eqs|fig|no|resp|approx|pp|vol)\.", re.IGNORECASE
)


class Text(NamedTuple):
    """A paragraph and the line of the file that it starts at."""

    line: int
    words: str
    prose: bool  # sentences, whose length counts


class Finding(NamedTuple):
    """A place that breaks a rule."""

    line: int
    excerpt: str
    advice: str


def without_fences(lines: list[str], first: int) -> Iterator[tuple[int, str]]:
    """Numbered lines outside of code and formulas; an empty line stands for each of these."""
    fence = ""
    for number, raw in enumerate(lines, first):
        line = raw.strip()
        opening = re.match(r"(`{3,}|:{3,}|\$\$|~{3,})", line)
        if fence:
            if line.startswith(fence) and not line.strip(fence[0]):
                fence = ""
        elif opening:
            mark = opening[1]
            prose = mark.startswith(":") or re.match(r"`{3,}\{(note|warning|tip|dropdown)", line)
            one_line = mark == "$$" and len(line) > 2 and line.endswith("$$")
            fence = "" if prose or one_line else mark
            yield number, ""
        else:
            yield number, line


def paragraphs(lines: list[str], first: int) -> Iterator[Text]:
    """Paragraphs of Markdown or of a docstring without code, formulas and directives."""
    held: list[str] = []
    start, ignored = first, False

    def flush() -> Iterator[Text]:
        nonlocal ignored
        if held and not ignored:
            yield Text(start, " ".join(held), prose=True)
        ignored = False if held else ignored
        held.clear()

    for number, line in without_fences(lines, first):
        if "words: ignore" in line:
            yield from flush()
            ignored = True
        elif line.startswith("|"):
            yield from flush()
            for cell in line.strip("|").split("|"):
                yield Text(number, cell.strip(), prose=False)
        elif not line or re.match(r"(>>>|\.\.\.|\.\.|#|:[a-z-]+:|[-=~^*]{3,}$|!\[|<!--|\()", line):
            yield from flush()
            if line.startswith("#"):
                yield Text(number, line.lstrip("# "), prose=False)
        else:
            item = re.match(r"(\* - |[-*:] |\d+\. )", line)
            if item:
                yield from flush()
            if not held:
                start = number
            held.append(line[item.end() :] if item else line)
    yield from flush()


def markdown(text: str) -> Iterator[Text]:
    """Prose of a Markdown file."""
    lines = text.split("\n")
    first = 1
    if lines[0] == "---":
        end = lines.index("---", 1)
        lines, first = lines[end + 1 :], end + 2
    yield from paragraphs(lines, first)


def python(text: str) -> Iterator[Text]:
    """Docstrings and comments of a Python file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                literal = node.body[0]
                plain = re.sub(r">>>.*?(\n\s*\n|\Z)", "\n\n", docstring, flags=re.DOTALL)
                plain = re.sub(r"::\n\n((    .*)?\n)+", "\n\n", plain + "\n")
                yield from paragraphs(plain.split("\n"), literal.lineno)
    held: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and "noqa" not in token.string:
            if token.start[0] != last + 1 and held:
                yield Text(start, " ".join(held), prose=True)
                held.clear()
            if not held:
                start = token.start[0]
            held.append(token.string.lstrip("#: "))
            last = token.start[0]
    if held:
        yield Text(start, " ".join(held), prose=True)


def readable(words: str) -> str:
    """The text as a reader sees it, with one word for each name, formula or link."""
    words = re.sub(r"\{[a-z:]+\}`([^`<]*?)\s*<[^`]*>`", r"\1", words)
    words = re.sub(r"(\{[a-z:]+\}|:[a-z:]+:)`[^`]*`", "NAME", words)
    words = re.sub(r"``.*?``|`[^`]*`", "NAME", words)
    words = re.sub(r"\$[^$]*\$", "FORMULA", words)
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words)
    words = re.sub(r"\([^()]*\)", "", words)
    return re.sub(r"[*_]{1,2}(\S.*?\S|\S)[*_]{1,2}", r"\1", words)


def check(text: Text) -> Iterator[Finding]:
    """Findings in one paragraph."""
    words = readable(text.words)
    for pattern, advice in WORDS.items():
        for found in re.finditer(pattern, words):
            around = words[max(0, found.start() - 30) : found.end() + 30]
            yield Finding(text.line, around, advice)
    if text.prose:
        for found in re.finditer(r"(?<![^.] )\bWhat (?![^.?]*\?)[^.]{,30}", words):
            yield Finding(text.line, found[0], "name the subject; 'What' opens questions")
        whole = ABBREVIATIONS.sub(r"\1", words)
        for sentence in re.split(r"(?<=[.!?:;])\s+", whole):
            count = len(re.findall(r"\w[\w’'–-]*", sentence))
            if count > LONGEST:
                advice = f"{count} words in a sentence; at most {LONGEST}"
                yield Finding(text.line, sentence[:60], advice)


def findings(path: Path) -> list[Finding]:
    """All findings in a file."""
    text = path.read_text(encoding="utf-8")
    texts = python(text) if path.suffix == ".py" else markdown(text)
    return sorted(finding for part in texts for finding in check(part))


def files(paths: list[Path]) -> Iterator[Path]:
    """Markdown and Python files below the paths."""
    for path in paths:
        if path.is_file():
            yield path
        else:
            found = sorted({*path.rglob("*.md"), *path.rglob("*.py")})
            yield from (file for file in found if "_build" not in file.parts)


def main() -> None:
    """Print findings; exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", help="files and folders")
    paths = parser.parse_args().paths
    for path in paths:
        if not path.exists():
            parser.error(f"paths must exist; got {path}")
    count = 0
    for file in files(paths):
        for finding in findings(file):
            count += 1
            print(f"{file}:{finding.line}: {finding.advice}: {finding.excerpt}")
    print(f"{count} findings")
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
