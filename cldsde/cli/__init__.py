"""The command ``cldsde``.

Exit codes: 0 success, 1 the work failed, 2 invalid arguments, 130 interrupted. Errors are one line
on stderr.
"""

from __future__ import annotations

import sys
from argparse import Action
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from cldsde.cli import compare, demo, evaluate, import_published, sample, train, validate

__all__ = ["main"]

_COMMANDS = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "compare": compare,
    "validate": validate,
    "import": import_published,
}
_INTERRUPTED = {
    "validate": "interrupted; results so far are in the file of --json and the page of --out",
    "import": "interrupted; nothing was written",
}


class _Formatter(DefaultHelpFormatter):
    """Help texts with defaults other than None."""

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        if action.default is None:
            text = text.replace(", default: %(default)s", "").replace(" (default: %(default)s)", "")
        return text


class _Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, **settings)

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Print the message alone and exit with code 2."""
        del ex
        _complain("cldsde", f"{message} (see cldsde --help, and cldsde COMMAND --help)")
        sys.exit(2)


def _complain(program: str, message: object) -> None:
    print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)


def _build_parser() -> ArgumentParser:
    parser = _Parser(
        prog="cldsde",
        usage="cldsde [--help] [--version] COMMAND ...",
        description="Linear SDEs and the diffusion models built on them.",
        version=version("cldsde"),
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, module in _COMMANDS.items():
        command = _Parser(usage=f"cldsde {name} [options]", description=module.__doc__)
        module.add_arguments(command)
        commands.add_subcommand(name, command, help=(module.__doc__ or "").splitlines()[0])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command."""
    program, interrupted = "cldsde", "interrupted"
    try:
        options = _build_parser().parse_args(None if arguments is None else list(arguments))
        name = options.command
        program = f"cldsde {name}"
        # `module:name` in options is imported from the current folder, too.
        if "" not in sys.path:
            sys.path.append("")
        try:
            # All arguments are checked here, before any work is done.
            work = _COMMANDS[name].prepare(options[name])
        except (ValueError, ImportError, OSError) as error:
            _complain(program, _rendered(error, name))
            return 2
        interrupted = _INTERRUPTED.get(name, "interrupted; the same command resumes")
        work()
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        _complain(program, _rendered(error, name))
        return 1
    except (MemoryError, RuntimeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        # On the CPU torch has no exception class for a failed allocation.
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (known or "can't allocate memory" in text):
            raise
        _complain(program, f"out of memory; take smaller networks or batches ({text})")
        return 1
    return 0


def _rendered(error: Exception, command: str) -> str:
    """An error with the option of a setting in place of its key, if there is one."""
    key = getattr(error, "key", None)
    if key is None:
        return str(error)
    parser = ArgumentParser()
    _COMMANDS[command].add_arguments(parser)
    options = {x.dest: x.option_strings or [str(x.metavar)] for x in parser._actions}
    name = (options.get(str(key).removeprefix("options.")) or [key])[-1]
    return f"{name}: {getattr(error, 'reason', '')}"
