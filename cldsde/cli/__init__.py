"""The command ``cldsde``.

Exit codes: 0 success, 1 the work failed, 2 rejected before any work, 130 interrupted by Ctrl-C, 143
a training was stopped by SIGTERM. Errors are one line on stderr.
"""

from __future__ import annotations

import gc
import re
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper
from typing import Any, NoReturn

import torch

from cldsde.errors import SettingError
from cldsde.messages import brief, one_line

__all__ = ["main"]

_NAMES = ["demo", "train", "sample", "evaluate", "compare", "tune", "validate", "import", "export"]
_FILES = {**{name: name for name in _NAMES}, "import": "import_published"}
# Keys of settings with the options that give them, or their beginning.
_GIVEN_BY = {"process.name": "process", "process.options": "process_set", "options": "set"}
_GIVEN_BY |= {"training.init_from": "init_from"}
_COMMANDS = {name: import_module(f"cldsde.cli.{file}") for name, file in _FILES.items()}
_INTERRUPTED = {
    "tune": "interrupted; the best settings so far are kept",
    "validate": "interrupted; results so far are in the file of --json and the folder of --out",
    **dict.fromkeys(("import", "export"), "interrupted; nothing was written"),
}


class _Parser(ArgumentParser):
    """A parser whose errors are one line."""

    names: Mapping[str, str]  # options as they are written, by their attributes

    def error(self, message: str) -> NoReturn:
        """Print the message alone and exit with code 2."""
        _complain(self.prog, f"{message.removeprefix('argument ')} (see {self.prog} --help)")
        sys.exit(2)


def _complain(program: str, message: object) -> None:
    print(f"{program}: error: {one_line(message)}", file=sys.stderr)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of ``cldsde``, and the parser of each command by its name."""
    about = "Linear SDEs and the diffusion models built on them."
    parser = _Parser(prog="cldsde", usage="cldsde [options] COMMAND ...", description=about)
    parser.add_argument("--version", action="version", version=f"cldsde {version('cldsde')}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, prog="cldsde"
    )
    for name, module in _COMMANDS.items():
        text = str(module.__doc__)
        command = commands.add_parser(
            name, usage=f"cldsde {name} [options]", description=text, help=text.splitlines()[0]
        )
        # No option is a number, so that -1-3 is a value; its error says what is allowed.
        command._negative_number_matcher = re.compile(r"-\d")
        actions = [command.add_argument(*names, **how) for names, how in module.OPTIONS]
        command.names = {x.dest: [str(x.metavar), *x.option_strings][-1] for x in actions}
    return parser, commands.choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command."""
    parser, commands = _parsers()
    options, unknown = parser.parse_known_args(arguments)
    command, name = commands[options.command], options.command
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    # `module:name` in options is imported from the current folder, too.
    if "" not in sys.path:
        sys.path.append("")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # letters that a terminal does not know
    code, interrupted = 2, "interrupted"
    gc.disable()  # imports make many objects and no garbage
    try:
        # All arguments are checked here, before any work is done.
        work = _COMMANDS[name].prepare(options)
        gc.enable()
        code, interrupted = 1, _INTERRUPTED.get(name, "interrupted; the same command resumes")
        work()
    except KeyboardInterrupt:
        print(f"{command.prog}: {interrupted}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        _complain(command.prog, _in_options(error, command.names, vars(options)))
        return code
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (known or "can't allocate memory" in brief(error)):
            raise
        _complain(command.prog, f"out of memory; take smaller networks or batches ({brief(error)})")
        return 1
    finally:
        gc.enable()
    return 0


def _in_options(error: Exception, names: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """An error with options in place of a setting's key, and of arguments in backquotes."""
    if isinstance(error, SettingError):
        key = names.get(error.key, error.key)
        for start, option in _GIVEN_BY.items():
            value, name = given.get(option), key[len(start) + 1 :]
            if isinstance(value, list) and name:  # of key=value; the key may be a run's own
                value = any(x.partition("=")[0] == name for x in value)
            if value and f"{key}.".startswith(f"{start}."):
                key = f"{names[option]} {name}".strip()
        reason = re.sub(r"`(\w+)`", lambda x: names.get(x[1], x[0]), error.reason)
        return f"{key}: {reason}"
    if isinstance(error, ModuleNotFoundError):
        extra = "tune" if error.name == "cma" else "images"
        return f"{error.name} is missing; install the extra: pip install 'cldsde[{extra}]'"
    return str(error)
