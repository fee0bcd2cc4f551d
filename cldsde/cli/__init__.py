"""The command ``cldsde``.

Exit codes: 0 success, 1 the work failed, 2 the arguments were refused, 130 interrupted. Errors
are one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from cldsde.cli import demo

__all__ = ["main"]

_COMMANDS = {"demo": demo}


class _Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Print the message alone and exit with code 2."""
        del ex
        line = " ".join(str(message).split())
        print(f"{self.prog}: error: {line} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _build_parser() -> ArgumentParser:
    parser = _Parser(
        prog="cldsde",
        description="Linear SDEs and the diffusion models built on them.",
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, module in _COMMANDS.items():
        command = _Parser(description=module.__doc__)
        module.add_arguments(command)
        commands.add_subcommand(name, command, help=(module.__doc__ or "").splitlines()[0])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments
        Words of the command line after ``cldsde``; None takes the process's own.

    Returns
    -------
    int
        Exit code.
    """
    options = _build_parser().parse_args(None if arguments is None else list(arguments))
    command = options.command
    try:
        _COMMANDS[command].run(options[command])
    except KeyboardInterrupt:
        print(f"cldsde {command}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        line = " ".join(str(error).split())
        print(f"cldsde {command}: error: {line}", file=sys.stderr)
        return 1
    return 0
