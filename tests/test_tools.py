"""The checks of words and of tolerances."""

import sys

import pytest

import bare_tolerances
import faults
import words

SOURCES = "from tolerances import rounding\nSAMPLING = 1e-3  # by sampling\nSILENT = 1e-3\n"
BARE = [
    "assert x == pytest.approx(1.0)",
    "assert x == pytest.approx(1.0, 1e-9, abs=0)",
    "assert x == pytest.approx(1.0, abs=0.25)",
    "assert x == pytest.approx(1.0, rel=1e-12 * size, abs=0)",
    "assert x == pytest.approx(1.0, rel=SAMPLING)",
    "assert x == pytest.approx(1.0, abs=SILENT)",
    "assert torch.allclose(x, y)",
    "assert torch.allclose(x, y, rtol=SAMPLING)",
    "torch.testing.assert_close(x, y, rtol=0, atol=1e-12)",
    "np.testing.assert_allclose(x, y)",
    "def assert_close(x):\n    torch.testing.assert_close(x, y)",
    "assert error <= 1e-12",
    "assert 1e-12 * size > error",
    "assert all(x < 1e-9 for x in errors)",
]
NAMED = [
    "assert x == pytest.approx(1.0, abs=SAMPLING)",
    "assert x == pytest.approx(1.0, rel=0, abs=4 / math.sqrt(n))",
    "assert torch.allclose(x, y, rtol=rounding(8, 1e-4), atol=0)",
    "np.testing.assert_allclose(x, y, **options)",
    "assert error <= rounding(64) * size",
    "assert error > 1e-4  # the fault is seen",
    "solve_ivp(slope, ends, y, rtol=1e-9, atol=1e-12)",
    "def assert_close(x, y):\n    pass\nassert_close(x, y)",
]
SENTENCES = [
    "What the solver returns is a state.",
    "The law of the state is Gaussian.",
    "A command goes on after a stop.",
    "It costs one evaluation a step.",
    "The mean is that of the data.",
    " ".join(["word"] * 26) + ".",
]
PLAIN = f"""---
title: law
---

# What is it?

What does the solver return? A `law`.

```python
law = "What goes on in turn"
```

$$
\\text{{the law of those of}}
$$

| a cell |
| --- |
| {" ".join(["word"] * 40)} |
"""


def test_bare_tolerances_are_found_and_other_numbers_left_alone():
    for lines, count in ((BARE, 1), (NAMED, 0)):
        for line in lines:
            assert len(list(bare_tolerances.findings(SOURCES + line))) == count, line


def test_every_fault_can_be_planted(tmp_path):
    package = faults.copied(tmp_path)
    for fault in faults.FAULTS:
        assert (package / fault.file).read_text("utf-8").count(fault.right) == 1, fault.name


@pytest.mark.parametrize("name", ["page.md", "module.py"])
def test_private_words_and_long_sentences_are_found(tmp_path, name, monkeypatch, capsys):
    text = "\n\n".join(SENTENCES) + "\n"
    (tmp_path / name).write_text(f'"""{text}"""\n' if name.endswith(".py") else text)
    monkeypatch.setattr(sys, "argv", ["words.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        words.main()
    assert stopped.value.code == 1
    found = capsys.readouterr().out
    assert all(f"{name}:{line}:" in found for line in range(1, 2 * len(SENTENCES), 2))


def test_code_formulas_tables_and_questions_are_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PLAIN)
    assert not words.findings(page)
