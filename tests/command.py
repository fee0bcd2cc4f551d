"""Helpers of the tests of the commands."""

from typing import Any

from cldsde.cli import main


def command(*words: object) -> int:
    """Run the command; return its exit code."""
    return main([str(word) for word in words])


def rejected(capsys: Any, *arguments: object) -> str:
    """Run the command; return its error, which must be one line."""
    capsys.readouterr()
    try:
        code = command(*arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err
