"""The checks of words and of tolerances find faults; `tox -e lint` runs them on plain text."""

import pytest

import bare_tolerances
import faults
import words

SOURCES = "from tolerances import rounding\nSAMPLING = 1e-3  # by sampling\nSILENT = 1e-3\n"
BARE = [
    "assert x == pytest.approx(1.0)",
    "assert x == pytest.approx(1.0, 1e-9, abs=0)",
    "assert x == pytest.approx(1.0, rel=SAMPLING)",
    "assert x == pytest.approx(1.0, abs=SILENT)",
    "assert error <= 1e-12",
    "assert all(x < 1e-9 for x in errors)",
]
SENTENCES = [
    "What the solver returns is a state.",
    "A command goes on after a stop.",
    "The mean is that of the data.",
    " ".join(["word"] * 26) + ".",
]


@pytest.mark.parametrize("line", BARE)
def test_bare_tolerances_are_found(line):
    assert len(list(bare_tolerances.findings(SOURCES + line))) == 1


def test_every_fault_can_be_planted(tmp_path):
    package = faults.copied(tmp_path)
    for fault in faults.FAULTS:
        assert (package / fault.file).read_text("utf-8").count(fault.right) == 1, fault.name


@pytest.mark.parametrize("name", ["page.md", "module.py"])
def test_private_words_and_long_sentences_are_found(tmp_path, name):
    text = "\n\n".join(SENTENCES) + "\n"
    file = tmp_path / name
    file.write_text(f'"""{text}"""\n' if name.endswith(".py") else text)
    assert [finding.line for finding in words.findings(file)] == [1, 3, 5, 7]
