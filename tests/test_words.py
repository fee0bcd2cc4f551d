"""The check of words in ``docs/words.py``."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "words.py"
SENTENCES = [
    "What the solver returns is a state.",
    "The law of the state is Gaussian.",
    "A command goes on after a stop.",
    "It costs one evaluation a step.",
    "The mean is that of the data.",
    " ".join(["word"] * 26) + ".",
]


def check(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(folder / name)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["page.md", "module.py"])
def test_private_words_and_long_sentences_are_found(tmp_path, name):
    text = "\n\n".join(SENTENCES)
    result = check(tmp_path, name, f'"""{text}"""\n' if name.endswith(".py") else text + "\n")
    assert result.returncode == 1
    for line in range(1, 2 * len(SENTENCES), 2):
        assert f"{name}:{line}:" in result.stdout


def test_code_formulas_tables_and_questions_are_left_alone(tmp_path):
    text = """---
title: law
---

# What is it?

What does the solver return? A `law`.

```python
law = "What goes on in turn"
```

$$
\\text{the law of those of}
$$

| a cell |
| --- |
"""
    text += f"| {' '.join(['word'] * 40)} |\n"
    assert check(tmp_path, "page.md", text).returncode == 0
